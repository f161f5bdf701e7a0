"""Which kept texts begin like another, without reading them all: of each, hashes of its first 64, 128, 256 ... tokens.

The file is a help and no more: a text that it does not name is read, what it names is compared with the text itself, and whoever may write
here may delete it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Iterable

FIRST = 64    # tokens of the first hash; each further one is of twice as many
N_HASHES = 20

_RECORD = struct.Struct(f"<16s{N_HASHES}Q")  # name of an entry, hashes of its text; 0 where it is shorter
Hashes = tuple[int, ...]


def hashes(packed: bytes) -> Hashes:
    """Of a text of packed token ids, 4 bytes each."""
    digest, out, done = hashlib.blake2b(digest_size=8), [], 0
    for i in range(N_HASHES):
        end = 4 * FIRST << i
        if end > len(packed):
            break
        digest.update(packed[done:end])
        done = end
        out.append(int.from_bytes(digest.digest(), "little") or 1)
    return (*out, *[0] * (N_HASHES - len(out)))


def alike(a: Hashes, b: Hashes) -> int:
    """How many hashes two texts begin with alike."""
    n = 0
    while n < N_HASHES and a[n] == b[n] != 0:
        n += 1
    return n


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Index:
    """Of one model's entries."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> dict[str, Hashes]:
        """name -> hashes; of what cannot be read, none."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return {}
        whole = len(data) // _RECORD.size * _RECORD.size
        return {name.hex(): tuple(rest) for name, *rest in _RECORD.iter_unpack(data[:whole])}

    def add(self, name: str, packed: bytes) -> None:
        """Raises OSError."""
        with open(self._path, "ab", buffering=0, opener=_private) as file:
            half = file.tell() % _RECORD.size
            if half:  # what a killed writer left
                file.truncate(file.tell() - half)
            file.write(_RECORD.pack(bytes.fromhex(name), *hashes(packed)))

    def keep(self, names: Iterable[str]) -> None:
        """Forget the others, where there are many. Raises OSError."""
        known, names = self.read(), set(names)
        if len(known) > 2 * len(names) + 16:
            part = self._path.with_name(f".{self._path.name}.part")
            with open(part, "wb", opener=_private) as file:
                file.writelines(_RECORD.pack(bytes.fromhex(name), *known[name]) for name in known if name in names)
            part.replace(self._path)

    def likely(self, names: Iterable[str], packed: bytes, least: int) -> list[str]:
        """Those of some entries among which is the one that shares most tokens with a text, if any shares as many as least."""
        known, mine = self.read(), hashes(packed)
        depths = {name: alike(known[name], mine) if name in known else -1 for name in names}
        most = max(depths.values(), default=-1)
        if most == 0 and least >= FIRST:
            return [name for name, depth in depths.items() if depth < 0]
        return [name for name, depth in depths.items() if depth in (most, -1)]
