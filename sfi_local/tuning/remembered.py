"""What was measured once and is kept in the user's cache: JSON files, each a list of entries.

An entry is an object whose ``key``, an object too, says what the measurement depends on. A file that cannot be read counts
as empty; it is replaced as a whole, so that a half-written one is never seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from sfi_local.binding.library import source_id
from sfi_local.errors import SfiError
from sfi_local.whole_file import written_whole

MAX_ENTRIES = 200  # of a file; the oldest are dropped

Entries = dict[str, dict[str, Any]]


def model_key(path: Path) -> dict[str, Any]:
    """The part of a key that says which model file and which build of the library. Raises OSError, LibraryError."""
    stat = path.stat()
    return {"model": str(path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns, "source_id": source_id()}


def spelled(key: dict[str, Any]) -> str:
    """The key as a text: equal for equal keys."""
    return json.dumps(key, sort_keys=True)


def entries(path: Path, is_entry: Callable[[Any], bool]) -> Entries:
    """spelled(key) -> entry, the oldest first; what is not an entry is left out. is_entry: of what lies beside the key"""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {spelled(e["key"]): e for e in items if _holds(e, is_entry)} if isinstance(items, list) else {}


def store(path: Path, entry: dict[str, Any], is_entry: Callable[[Any], bool]) -> None:
    """Add an entry as the latest, in place of one with its key. Raises SfiError where the file cannot be written."""
    kept = [e for key, e in entries(path, is_entry).items() if key != spelled(entry["key"])]
    _write(path, [*kept, entry][-MAX_ENTRIES:])


def forget(path: Path, model: Path | None, is_entry: Callable[[Any], bool]) -> int:
    """Remove the entries of a model file, None: of all models; how many there were. Raises SfiError."""
    known = entries(path, is_entry).values()
    kept = [] if model is None else [e for e in known if e["key"].get("model") != str(model.resolve())]
    if len(kept) < len(known):
        _write(path, kept)
    return len(known) - len(kept)


def _write(path: Path, items: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SfiError(f"{path.parent} cannot be made ({error.strerror}): set SFI_LOCAL_CACHE to a directory that you may "
                       f"write to.") from None
    with written_whole(path) as part:
        part.write_text(json.dumps(items, indent=1), encoding="utf-8")


def _holds(entry: Any, is_entry: Callable[[Any], bool]) -> bool:
    try:
        return isinstance(entry["key"], dict) and is_entry(entry)
    except (TypeError, KeyError, ValueError):
        return False
