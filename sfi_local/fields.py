"""Settings that are typed as FIELD=VALUE: the fields of a dataclass, what they hold, and what its docstring says of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, Iterable, Mapping

from sfi_local.errors import UsageError

MAX_INT = 2**31 - 1  # the library counts in 32 bits
_KINDS = {"int": int, "float": float, "bool": bool, "str": str}
_WANTED = {int: "a whole number", float: "a number", bool: "on or off", str: "a name"}
_SPELLED = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
_UNIT = re.compile(r"(cells|steps|tokens|nats|bytes|a share)\b.*")


def kinds(cls: type, without: Iterable[str] = ()) -> dict[str, type]:
    """name: int, float, bool or str, of the fields of a dataclass that can be typed."""
    spelled = {f.name: getattr(f.type, "__name__", f.type) for f in dataclasses.fields(cls)}
    return {name: _KINDS[kind] for name, kind in spelled.items() if kind in _KINDS and name not in without}


def parse(text: str, allowed: Mapping[str, type], source: str) -> dict[str, Any]:
    """The fields of ``FIELD=VALUE,FIELD=VALUE``. source: what refusals begin with. Raises UsageError."""
    return dict(_parse_one(item, allowed, source) for item in text.split(",") if item.strip())


def meant(name: str, allowed: Iterable[str]) -> str:
    """`` did you mean NAME?`` where one is near, else nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.3)
    return f" did you mean {near[0]}?" if near else ""


def _parse_one(item: str, allowed: Mapping[str, type], source: str) -> tuple[str, Any]:
    name, _, value = (part.strip() for part in item.partition("="))
    if name not in allowed:
        raise UsageError(f"{source}: there is no field {name!r}:{meant(name, allowed) or ' there are ' + ', '.join(allowed) + '.'}")
    try:
        found = _value(value, allowed[name])
    except (ValueError, KeyError):
        raise UsageError(f"{source}: {name} takes {_WANTED[allowed[name]]}, not {value!r}.") from None
    if isinstance(found, int) and abs(found) > MAX_INT:
        raise UsageError(f"{source}: {name} is {value}, which needs more than 32 bits: give at most {MAX_INT}.")
    return name, found


def _value(text: str, kind: type) -> Any:
    """Raises ValueError, KeyError."""
    if kind is bool:
        return _SPELLED[text.lower()]
    value = kind(text)
    if text == "" or kind is float and not math.isfinite(value):
        raise ValueError
    return value


# ---- what a docstring says -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Described:
    """unit: as the docstring gives it at the end, or "" """

    text: str
    unit: str


def described(cls: type) -> dict[str, Described]:
    """name: what the docstring says of a field; of several in one entry (``a, b: ...``, ``a ... d: ...``) the same."""
    names = [f.name for f in dataclasses.fields(cls)]
    found: dict[str, Described] = {}
    for entry in re.split(r"\n(?=[a-z])", re.sub(r"\n    ", "\n", "\n" + (cls.__doc__ or ""))):
        head, colon, text = entry.strip().partition(":")
        those = _named(head, names) if colon else []
        found.update(dict.fromkeys(those, _described(" ".join(text.split()))))
    return found


def _named(head: str, names: list[str]) -> list[str]:
    """The fields that the beginning of an entry names."""
    first, dots, last = head.partition(" ... ")
    if dots and first in names and last in names:
        return names[names.index(first):names.index(last) + 1]
    listed = [name.strip() for name in head.split(",")]
    return listed if set(listed) <= set(names) else []


def _described(text: str) -> Described:
    """The unit is what stands after the last semicolon, if it is one."""
    before, _, last = text.rpartition("; ")
    return Described(before, last) if before and _UNIT.fullmatch(last) else Described(text, "")
