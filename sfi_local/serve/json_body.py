"""A request's body: read within limits of size and time, and parsed without surprises."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from sfi_local.serve.problems import Problem

MAX_BODY = 32 << 20      # bytes
MAX_SECONDS = 60.0       # for all of the body
SMALL = 1 << 20          # bytes; a smaller one cannot become many values
MAX_VALUES = 1_000_000
MAX_DEPTH = 64

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


async def read_body(receive: Any, declared: str | None) -> bytes:
    """All of a body. Raises Problem: 413, 408, 400 where the client goes away."""
    if declared and declared.isdigit() and int(declared[:20]) > MAX_BODY:
        raise _too_large()
    try:
        return await asyncio.wait_for(_parts(receive), MAX_SECONDS)
    except asyncio.TimeoutError:
        raise Problem(f"The request's body took longer than {MAX_SECONDS:.0f} seconds to arrive.", 408) from None


async def _parts(receive: Any) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem("The client went away.", 400)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise _too_large()
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large() -> Problem:
    return Problem(f"The request's body has more than {MAX_BODY >> 20} MB.", 413)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Problem."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"The request's body is not UTF-8 (byte {error.start}).") from None
    if len(body) > SMALL and _n_values(body) > MAX_VALUES:
        raise Problem(f"The request's body has more than {MAX_VALUES} JSON values.", 413)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Problem(f"The request's body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Problem("The request's body is no JSON object.")
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse values within values within values. Raises Problem."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> Problem:
    return Problem(f"The request's JSON is nested deeper than {MAX_DEPTH} levels.")


def _n_values(body: bytes) -> int:
    bare = _STRING.sub(b"", body)
    return bare.count(b",") + bare.count(b"[") + bare.count(b"{")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
