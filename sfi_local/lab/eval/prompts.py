"""Prompts whose answer is known: a pass key in prose, lines of LongEval, key-value pairs, a passage to copy; and prompts that are
just text. Pure but for the model's tokenizer and chat template."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Sequence

from sfi_local.errors import InputError
from sfi_local.runtime.template import Message

N_PLACES = 10      # depths at which a pass key or a passage lies
N_BEGINNING = 32   # tokens of a passage that say which one is to be copied
N_SLACK = 8        # tokens that an answer may be longer than the right one


@dataclass(frozen=True)
class Prompt:
    """A prompt, at most n tokens of answer, and the right one: a text, or the tokens themselves; None: no answer is right."""

    tokens: list[int]
    n: int
    answer: str | list[int] | None

    def score(self, tokens: Sequence[int], text: str) -> float:
        """1.0 if the text has the answer as a word of its own, else 0.0; of tokens the share before the first wrong one."""
        if self.answer is None:
            return 0.0
        if isinstance(self.answer, str):
            return float(bool(re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text)))
        equal = [a == b for a, b in zip(tokens, self.answer)] + [False]
        return equal.index(False) / len(self.answer)


def ask(model: Any, content: str, opening: str, answer: str) -> Prompt:
    """A question in the model's chat template; the answer's opening is given, so that only the fact is asked for."""
    tokens = model.template.tokens([Message("user", [content])])
    if opening:
        tokens = tokens + model.vocabulary.continued(opening, tokens[-1])
    return Prompt(tokens, len(model.tokenize(answer)) + N_SLACK, answer)


# ---- a pass key in prose ---------------------------------------------------------------------------------------------

NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key?"
OPENING = "The pass key is"


def passkeys(model: Any, text: str, source: str, depth: int, n: int) -> list[Prompt]:
    """n prompts of about ``depth`` tokens, never more. Every ten share their prose and differ in key and place.

    The deepest place comes first, so that what two prompts have in common is prefilled once.
    Raises InputError where the text is too short.
    """
    filler = model.tokenize(text[:16 * depth * -(-n // N_PLACES)])
    if len(filler) < depth:
        filler = model.tokenize(text)
    if len(filler) < depth:
        raise InputError(f"The text ({source}) has {len(filler)} tokens, and --depth {depth} takes {depth}: give a longer "
                         f"one with --text, or lower --depth.")
    prompts = []
    for first in range(0, n, N_PLACES):
        places = min(N_PLACES, n - first)
        start = first // N_PLACES * depth % (len(filler) - depth + 1)
        for i in reversed(range(places)):
            key = str(random.Random(f"passkey {first + i}").randrange(10_000, 100_000))
            prompts.append(passkey(model, filler[start:start + depth], (i + 0.5) / places, key, depth))
    return prompts


def passkey(model: Any, filler: list[int], place: float, key: str, depth: int) -> Prompt:
    """One prompt: prose, the key at a place in [0, 1] of it, more prose, the question."""
    n = len(filler)
    while n >= 0:
        prose = model.detokenize(filler[:n])
        cut = sentence_end(prose, round(place * len(prose)), len(prose) // 40)
        prompt = ask(model, prose[:cut] + NEEDLE.format(key=key) + prose[cut:] + QUESTION, OPENING, key)
        if len(prompt.tokens) <= depth:
            return prompt
        n -= max(1, min(n, len(prompt.tokens) - depth)) if n else 1
    raise InputError(f"A pass key and its question take {len(prompt.tokens)} tokens: give a --depth of {len(prompt.tokens)} "
                     f"or more.")


def sentence_end(text: str, at: int, reach: int) -> int:
    """The last end of a sentence in the ``reach`` characters before a place, else of a word, else the place itself."""
    near = text[max(0, at - reach):at + 1]
    ends = [m.end() for m in re.finditer(r"[.!?][\"')]*(?=\s)", near)] or [m.start() for m in re.finditer(r"\s", near)]
    return max(0, at - reach) + ends[-1] if ends else at


# ---- a passage to copy -----------------------------------------------------------------------------------------------

def copies(model: Any, tokens: list[int], depth: int, n: int) -> list[Prompt]:
    """Prompts of a text, a blank line, and the beginning of a passage of n tokens in it, which is to go on as it did.

    tokens: of the text, at least ``depth``; the passages lie at N_PLACES places. No chat template: the text goes on.
    Raises InputError.
    """
    head, line = min(N_BEGINNING, n // 2), model.tokenize("\n\n")
    room = depth - len(line) - head
    if room < n:
        raise InputError(f"A passage of {n} tokens, its beginning and a blank line take {n + head + len(line)}, and --depth is "
                         f"{depth}: raise it, or lower --copy.")
    starts = dict.fromkeys(round(i * (room - n) / (N_PLACES - 1)) for i in range(N_PLACES))
    return [Prompt(tokens[:room] + line + tokens[at:at + head], n - head, tokens[at + head:at + n]) for at in starts]


# ---- just text --------------------------------------------------------------------------------------------------------

def excerpts(model: Any, text: str, source: str, depth: int, n_prompts: int, n: int) -> list[Prompt]:
    """n_prompts prompts of depth tokens, cut from a text at even distances, each to go on for n tokens.

    They overlap where the text is short. No chat template. Raises InputError where the text has no so many.
    """
    bos = model.tokenize("", add_bos=model.vocabulary.add_bos)
    tokens, length = model.tokenize(text), depth - len(bos)
    last = len(tokens) - length
    if length < 1 or last < n_prompts - 1:
        raise InputError(f"The text ({source}) has {len(tokens) + len(bos)} tokens, and {n_prompts} prompts of --depth {depth} take "
                         f"{max(depth, 1 + len(bos)) + n_prompts - 1}: give a longer one with --text, or lower --depth.")
    starts = [round(i * last / max(1, n_prompts - 1)) for i in range(n_prompts)]
    return [Prompt(bos + tokens[at:at + length], n, None) for at in starts]


# ---- task files ------------------------------------------------------------------------------------------------------

def task_file(text: str, source: str) -> list[tuple[str, str, str]]:
    """(content, opening, answer) of every line of a JSONL file. Raises InputError that names a broken line.

    A line is an object of LongEval's lines (``prompt``, ``expected_number``, ``random_idx``), of key-value retrieval
    (``ordered_kv_records``, ``key``, ``value``), or has ``prompt`` and ``answer``.
    """
    tasks = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                tasks.append(_task(json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise InputError(f"{source}, line {number} {_what_is_wrong(error)}: correct it or take it out.") from None
    if not tasks:
        raise InputError(f"{source} has no tasks in it: give a file with one JSON object per line.")
    return tasks


class _Broken(ValueError):
    """What a line lacks; a clause."""


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg} at column {error.colno})"
    return str(error) if isinstance(error, _Broken) else "has a field of the wrong type"


def _task(line: Any) -> tuple[str, str, str]:
    if not isinstance(line, dict):
        raise _Broken("is not a JSON object")
    if "expected_number" in line:
        _need(line, "prompt", "expected_number")
        return _text(line, "prompt"), _line_opening(line), str(int(line["expected_number"]))
    if "ordered_kv_records" in line:
        _need(line, "ordered_kv_records", "key", "value")
        return _key_value(line)
    if "prompt" in line:
        _need(line, "prompt", "answer")
        return _text(line, "prompt"), "", _text(line, "answer")
    raise _Broken("has neither expected_number, nor ordered_kv_records, nor prompt and answer")


def _need(line: dict[str, Any], *names: str) -> None:
    for name in names:
        if line.get(name) in (None, "", []):
            raise _Broken(f"lacks {name}")


def _text(line: dict[str, Any], name: str) -> str:
    if not isinstance(line[name], str):
        raise _Broken(f"has a {name} that is no text")
    return line[name]


def _line_opening(line: dict[str, Any]) -> str:
    index = line.get("random_idx")
    return f"The <REGISTER_CONTENT> in line {index[0]} is <" if isinstance(index, list) and index else ""


def _key_value(line: dict[str, Any]) -> tuple[str, str, str]:
    key, value, records = _text(line, "key"), _text(line, "value"), line["ordered_kv_records"]
    pairs = {k: v for k, v in records}
    if pairs.get(key) != value:
        raise _Broken("has a key whose value is not among its records")
    listed = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs.items())
    return f"Here is a JSON object:\n\n{{{listed}}}\n\nWhich value does the key {json.dumps(key)} have?", f'"{key}": "', value
