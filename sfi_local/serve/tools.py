"""Functions that a model may call: how they are told to it, the schema of a call that must come, and calls found in what it writes. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from sfi_local.runtime.template import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
MOST_HELD = 16384  # characters of an object at the beginning that may still be a call
MARKS = (OPEN, CLOSE, MISTRAL)  # the names of tokens without text that are part of an answer with calls

_LONGEST_FENCE = "```json"
_FENCE = re.compile(r"```(?:json)?\s*")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_TOLD = """You can call functions. Each is described by a line of JSON:
{tools}
To call one, write nothing but
<tool_call>
{{"name": "its name", "arguments": {{its arguments as a JSON object}}}}
</tool_call>
What it gives comes in the next message. Where no function is needed, answer as usual."""


@dataclass(frozen=True)
class Text:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True)
class Call:
    """A piece of a call. index: which call of the answer; name: with its first piece, else ""; arguments: the next characters of JSON"""

    index: int
    name: str
    arguments: str


def schema_of_call(tools: Sequence[dict], name: str | None) -> dict[str, Any]:
    """JSON schema of a call of one of the functions, or of the named one."""
    wanted = [tool["function"] for tool in tools if name is None or tool["function"]["name"] == name]
    return {"anyOf": [{"type": "object", "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
                       "required": ["name", "arguments"], "additionalProperties": False} for f in wanted]}


def told(messages: Sequence[Message], tools: Sequence[dict]) -> list[Message]:
    """The messages for a template that knows nothing of tools: all of it in words."""
    out = [_in_words(m) for m in messages]
    if tools:
        text = _TOLD.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if out and out[0].role == "system":
            out[0] = Message("system", [*out[0].parts, "\n\n" + text])
        else:
            out.insert(0, Message("system", [text]))
    return out


def _in_words(message: Message) -> Message:
    calls = message.extra.get("tool_calls", ())
    if message.role == "tool":
        return Message("user", ["<tool_response>\n", *message.parts, "\n</tool_response>"])
    if not calls:
        return Message(message.role, message.parts, message.thought)
    said = [f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls]
    return Message(message.role, [*message.parts, "\n".join(said)], message.thought)


class NoCalls:
    """All text is the answer."""

    def push(self, text: str) -> Iterator[Text | Call]:
        if text:
            yield Text(text)

    def finish(self) -> Iterator[Text | Call]:
        yield from ()


class Calls:
    """Text in, pieces of the answer and of calls out, each as soon as it is sure what it is.

    names:  of the functions; a call of another one is text
    source: the chat template, which shows how this model writes calls
    bound:  the whole text is one call, as schema_of_call() has it
    """

    def __init__(self, names: Sequence[str], source: str = "", bound: bool = False):
        self._names, self._n = set(names), 0
        self._array = MISTRAL if MISTRAL in source and OPEN not in source else ""
        self._bound = bound
        self._held, self._state = "", "call" if bound else "start"
        self._scan = _Scanner()

    def push(self, text: str) -> Iterator[Text | Call]:
        self._held += text
        while True:
            state, before = self._state, len(self._held)
            yield from getattr(self, f"_{state}")()
            if (state, before) == (self._state, len(self._held)):
                return

    def finish(self) -> Iterator[Text | Call]:
        """What is left: a call that did not end is text, unless its arguments have begun."""
        held, self._held = self._held, ""
        if self._state == "arguments":
            if held:
                yield Call(self._n - 1, "", held)
        elif self._state == "call":
            yield from self._whole(held)
        elif (held.strip() or held and not self._n) and self._state != "fenced":
            yield Text(held)

    # ---- states: each takes what it is sure of from the held text ----

    def _start(self) -> Iterator[Text | Call]:
        """Nothing but blanks and calls so far; an object here may be a call without marks, or in a fence, as small models like to write it."""
        text = self._held.lstrip()
        if _LONGEST_FENCE.startswith(text):
            return
        fence = _FENCE.match(text)
        text = text[fence.end():] if fence else text
        if text.startswith("{") and not self._array:
            end = _Scanner().end(text)
            if end is None and len(text) < MOST_HELD:
                return
            found = list(self._calls_in(text[:end]))
            if found:
                self._held, self._state = text[end:], "fenced" if fence else "start"  # found: so it ended
                yield from found
                return
        if text:
            self._state = "text"

    def _fenced(self) -> Iterator[Text | Call]:
        """The end of a fence around a call."""
        text = self._held.lstrip()
        if text.startswith("```"):
            text = text[3:]
        elif "```".startswith(text):
            return
        self._held, self._state = text, "start"
        yield from ()

    def _text(self) -> Iterator[Text | Call]:
        mark = self._array or OPEN
        at = self._held.find(mark)
        n = at if at >= 0 else len(self._held) - _partial(self._held, mark)
        shown = self._held[:n].rstrip()  # blanks before a call and after one are none of the answer
        if shown:
            yield Text(shown)
        self._held = self._held[len(shown):]
        if at >= 0:
            self._held, self._state = self._held[n - len(shown) + len(mark):], "call"

    def _call(self) -> Iterator[Text | Call]:
        head = None if self._array else _HEAD.match(self._held)
        if head and (name := json.loads(head[1], strict=False)) in self._names:
            self._held, self._state, self._scan = self._held[head.end():], "arguments", _Scanner()
            self._n += 1
            yield Call(self._n - 1, name, "")
            return
        end = _Scanner().end(self._held)
        if end is not None:
            text, self._held, self._state = self._held[:end], self._held[end:], "after"
            yield from self._whole(text)

    def _arguments(self) -> Iterator[Text | Call]:
        end = self._scan.end(self._held)
        taken = self._held if end is None else self._held[:end]
        self._held = self._held[len(taken):]
        if taken:
            yield Call(self._n - 1, "", taken)
        if end is not None:
            self._state = "after"

    def _after(self) -> Iterator[Text | Call]:
        """The end of the object, and of the marks."""
        text = self._held.lstrip(" \r\n\t}")
        if self._bound:
            self._held = ""
        elif text.startswith(CLOSE):
            self._held, self._state = text[len(CLOSE):], "text"
        elif text and not CLOSE.startswith(text):
            self._held, self._state = text, "text"
        yield from ()

    def _whole(self, text: str) -> Iterator[Text | Call]:
        found = list(self._calls_in(text))
        if found:
            yield from found
        elif text:
            yield Text(text if self._bound else (self._array or OPEN) + text)

    def _calls_in(self, text: str) -> Iterator[Call]:
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and isinstance(one.get("name"), str) and one["name"] in self._names:
                arguments = one.get("arguments", one.get("parameters", {}))
                self._n += 1
                yield Call(self._n - 1, one["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


class _Scanner:
    """Finds where a JSON object or array ends, over several pieces of text."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """Where it ends in this piece; None: not here."""
        for i, c in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or c != '"'
                self._escaped = c == "\\" and not self._escaped
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _partial(text: str, mark: str) -> int:
    """Length of the longest end of a text that may become a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
