"""What K and V depend on, as one name: the bytes of the model and its adapters, not where they lie, and how they are computed.

Files are read once; their digests are remembered by path, size, time and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Sequence

from sfi_local.catalogue import split_parts
from sfi_local.errors import SfiError
from sfi_local.store.prefix_files import VERSION
from sfi_local.whole_file import written_whole

CHUNK = 4 << 20
MAX_KNOWN = 200


def parts_of(path: Path) -> list[Path]:
    """The files of a model, from the path of one."""
    return [path.with_name(name) for name in split_parts(path.name)]


def fingerprint(files: Sequence[Path], known_in: Path, **settings: Any) -> str:
    """Of these files and settings, 32 hexadecimal digits. Raises OSError.

    known_in: the folder where digests are remembered
    """
    digests = [_digest(path, known_in / "models.json") for path in files]
    text = json.dumps({"version": VERSION, "files": digests, **settings}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: Path, known: Path) -> str:
    stat = os.stat(path)
    key, now = os.path.realpath(path), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    before = _read(known)
    if isinstance(before.get(key), list) and before[key][:3] == now:
        return str(before[key][3])
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    _write(known, {**_read(known), key: [*now, digest.hexdigest()]})
    return digest.hexdigest()


def _read(known: Path) -> dict[str, Any]:
    try:
        found = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, list) and len(value) == 4} if isinstance(found, dict) else {}


def _write(known: Path, digests: dict[str, Any]) -> None:
    """What cannot be remembered is computed again."""
    try:
        known.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with written_whole(known) as part:
            part.write_text(json.dumps(dict(list(digests.items())[-MAX_KNOWN:]), indent=1), encoding="utf-8")
    except (OSError, SfiError):
        pass
