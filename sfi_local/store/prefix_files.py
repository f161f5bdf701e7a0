"""The two kinds of files of the prefix store, as bytes: nothing in them is used before its lengths and its checksum are right.

    block   K and V of BLOCK tokens that follow what its parent holds
            head, token ids [n], rows
    entry   a text that was read: the blocks that hold its beginning, and the rest
            head, token ids of the whole text, rows of what fills no block, state of fast steps

The head is a line of JSON, padded; behind its length stands a checksum of it. A block is named for what is in it and before it, so that
two with one name are the same. Pure: the checksum is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from array import array
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Callable, Sequence, Type, TypeVar

BLOCK = 256          # tokens
VERSION = 2          # of both kinds; a store of a newer one is not read
MAX_HEAD = 1 << 20   # bytes; a head that says more is none
MAX_TOKENS = 1 << 26

_START = struct.Struct("<8sIIQ")  # magic, version, bytes of the head, its checksum
Checksum = Callable[[Any], int]
T = TypeVar("T", bound="Head")


class Damaged(Exception):
    """A file that is not what was written. Its text says why."""


class Newer(Damaged):
    """A file of a later version."""


@dataclass(frozen=True)
class Head:
    """fingerprint: of the model and of all that K and V depend on; n: tokens; sums: checksums of the parts behind the head"""

    fingerprint: str
    n: int


@dataclass(frozen=True)
class BlockHead(Head):
    parent: str
    tokens_sum: int
    rows_size: int
    rows_sum: int

    magic = b"sfiblock"

    @property
    def name(self) -> str:
        """Of what is in it and before it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def part_sizes(self) -> tuple[int, ...]:
        return 4 * self.n, self.rows_size


@dataclass(frozen=True)
class EntryHead(Head):
    """blocks: their names, in order; model: its name; settings: types of K and V, and what else K and V depend on, for people;
    text: how it begins; state_size 0: nothing was kept of fast steps"""

    blocks: tuple[str, ...]
    model: str
    settings: str
    text: str
    tokens_sum: int
    rows_size: int
    rows_sum: int
    state_size: int
    state_sum: int

    magic = b"sfientry"

    def part_sizes(self) -> tuple[int, ...]:
        return 4 * self.n, self.rows_size, self.state_size


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as the files have them: 32 bits, the lowest byte first."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpacked(data: bytes) -> list[int]:
    ids = array("i", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def write(path: Path, head: BlockHead | EntryHead, parts: Sequence[Any], checksum: Checksum) -> int:
    """Write a file whole, readable by its owner alone; its bytes. Raises OSError."""
    text = json.dumps(asdict(head)).encode()
    text += b" " * (-(len(text) + _START.size) % 64)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
            for data in (_START.pack(head.magic, VERSION, len(text), checksum(text)), text, *parts):
                _write_all(file, memoryview(data).cast("B"))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return _START.size + len(text) + sum(len(memoryview(data).cast("B")) for data in parts)


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data):]


def read_head(file: BinaryIO, kind: Type[T], checksum: Checksum) -> T:
    """The head of a file that is as long as it says; the file is then at the token ids. Raises Damaged, OSError."""
    start = file.read(_START.size)
    if len(start) < _START.size:
        raise Damaged("it ends too early")
    magic, version, size, total = _START.unpack(start)
    if magic != kind.magic:  # type: ignore[attr-defined]
        raise Damaged("it is another kind of file")
    if version > VERSION:
        raise Newer("a newer version of sfi-local wrote it")
    if version != VERSION or size > MAX_HEAD:
        raise Damaged("its version is unknown")
    text = file.read(size)
    if len(text) != size or checksum(text) != total:
        raise Damaged("its head was changed")
    head = _head_of(text, kind)
    if os.fstat(file.fileno()).st_size != _START.size + size + sum(head.part_sizes()):  # type: ignore[attr-defined]
        raise Damaged("its length is not what it says")
    return head


def _head_of(text: bytes, kind: Type[T]) -> T:
    try:
        values = json.loads(text)
        given: dict[str, Any] = {f.name: tuple(values[f.name]) if f.name == "blocks" else values[f.name] for f in fields(kind)}
        head = kind(**given)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Damaged("its head is none") from None
    numbers = [getattr(head, f.name) for f in fields(kind) if f.type == "int"]
    texts = [getattr(head, f.name) for f in fields(kind) if f.type == "str"] + list(getattr(head, "blocks", ()))
    if not all(type(n) is int and n >= 0 for n in numbers) or not all(type(t) is str for t in texts) or not 0 < head.n <= MAX_TOKENS:
        raise Damaged("its head has what is no number or text")
    return head


def read_packed(file: BinaryIO, head: Any, checksum: Checksum) -> bytes:
    """The token ids behind a head, as the file has them. Raises Damaged, OSError."""
    return bytes(read_part(file, bytearray(4 * head.n), head.tokens_sum, checksum))


def read_tokens(file: BinaryIO, head: Any, checksum: Checksum) -> list[int]:
    """The token ids behind a head. Raises Damaged, OSError."""
    return unpacked(read_packed(file, head, checksum))


def read_part(file: BinaryIO, into: Any, total: int, checksum: Checksum) -> Any:
    """Fill a buffer with the next part, and compare its checksum. Raises Damaged, OSError."""
    left = memoryview(into)
    while left:
        n = file.readinto(left)  # type: ignore[attr-defined]
        if not n:
            raise Damaged("it ends too early")
        left = left[n:]
    if checksum(into) != total:
        raise Damaged("its bytes were changed")
    return into


def is_name(text: str) -> bool:
    """Whether a text can be the name of a block, and never a path."""
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
