"""A conversation as a JSON file: texts, and the token ids of answers. What a file says is checked before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Sequence

from sfi_local.errors import InputError
from sfi_local.runtime.template import Message
from sfi_local.whole_file import written_whole

FORMAT = "sfi-local chat"
VERSION = 1
LARGEST = 256 << 20  # bytes
MOST_MESSAGES = 100_000

Detokenize = Callable[[Sequence[int]], str]


def save(path: str, model: str, messages: Sequence[Message], detokenize: Detokenize) -> None:
    """Write a conversation, whole or not at all, readable by its owner alone. Raises InputError, SfiError."""
    if os.path.exists(path) and not _is_saved_chat(path):
        raise InputError(f"{path} is there and is no saved conversation: give another name.")
    data = {"format": FORMAT, "version": VERSION, "model": model,
            "messages": [{"role": m.role, "parts": [_spelled(part, detokenize) for part in m.parts]} for m in messages]}
    with written_whole(path) as part:
        part.touch(mode=0o600)
        part.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def load(path: str, model: str, n_vocab: int, detokenize: Detokenize) -> tuple[list[Message], bool]:
    """(the messages of a file, whether their token ids are those of this model). Raises InputError.

    Ids that do not spell the text beside them, as those of another model, are dropped, and the text is taken.
    """
    data = _read(path)
    messages = data.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
        raise _broken(path, "its messages are no list of 1 to 100,000")
    same = data.get("model") == model
    read = [_message(path, i, m) for i, m in enumerate(messages)]
    if (wrong := _order(read)) is not None:
        raise _broken(path, f"message {wrong + 1} does not follow from the one before: questions and answers take turns")
    exact = True
    out = []
    for role, parts in read:
        kept = []
        for text, tokens in parts:
            fits = tokens is not None and same and all(t < n_vocab for t in tokens) and detokenize(tokens) == text
            exact = exact and (tokens is None or fits)
            kept.append(tokens if tokens is not None and fits else text)
        out.append(Message(role, kept))
    return out, exact


def _spelled(part: str | list[int], detokenize: Detokenize) -> dict[str, Any]:
    return {"text": part} if isinstance(part, str) else {"text": detokenize(part), "tokens": list(part)}


def _read(path: str) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > LARGEST:
            raise InputError(f"{path} is larger than {LARGEST >> 20} MB, which no conversation is: check the path.")
        data = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the path.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    except (ValueError, RecursionError):
        raise _broken(path, "it is no JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _broken(path, f"it does not say `\"format\": \"{FORMAT}\"`")
    if data.get("version") != VERSION:
        raise InputError(f"{path} was saved by another version of sfi-local (format {data.get('version')!r}, here {VERSION}): use "
                         f"that one.")
    return data


def _message(path: str, number: int, data: Any) -> tuple[str, list[tuple[str, list[int] | None]]]:
    """(role, [(text, token ids or None), ...])"""
    role, parts = (data.get("role"), data.get("parts")) if isinstance(data, dict) else (None, None)
    if role not in ("system", "user", "assistant") or not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise _broken(path, f"message {number + 1} has no role or no parts")
    return role, [_part(path, number, p) for p in parts]


def _part(path: str, number: int, data: dict[str, Any]) -> tuple[str, list[int] | None]:
    text, tokens = data.get("text"), data.get("tokens")
    if not isinstance(text, str) or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise _broken(path, f"message {number + 1} has a part without text")
    if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)):
        raise _broken(path, f"message {number + 1} has tokens that are no ids")
    return text, tokens


def _order(messages: Sequence[tuple[str, Any]]) -> int | None:
    """The first message out of order; None: a system message or none, then questions and answers by turns."""
    roles = [role for role, _ in messages]
    first = 1 if roles[0] == "system" else 0
    wanted = ["system"] * first + ["user", "assistant"] * len(roles)
    return next((i for i, role in enumerate(roles) if role != wanted[i]), None)


def _broken(path: str, why: str) -> InputError:
    return InputError(f"{path} is no conversation that /save wrote: {why}.")


def _is_saved_chat(path: str) -> bool:
    try:
        _read(path)
    except InputError:
        return False
    return True
