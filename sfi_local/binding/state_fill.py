"""Fill a KV cache to a depth through the state API: cells of a short piece, repeated, with positions counted up.

For measuring speed where a real prefill would take too long. Keys keep the rotation (RoPE) of the position they were
computed at, so attention over the copies means nothing; its cost is that of real cells.

The state of one sequence is what llama_kv_cache::state_write() writes at the pin: a header, (position, sequences) of
every cell, then K of every layer and V of every layer, one row per cell. The state of 131072 cells is as large as the
cache itself, so it is not built in memory: it is address space in which the pages of the piece appear again and again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

from sfi_local.binding.library import open_library
from sfi_local.errors import DecodeError, InputError, Remedy

READ = Remedy("take {}", "fill", "prefill")
MAX_MAPPINGS = 1 << 13  # Linux allows 65530 per process

_HEADER = struct.Struct("<IiII")   # magic, sequence, streams, cells
_CELL = struct.Struct("<iIi")      # position, number of sequences, sequence
_LAYERS = struct.Struct("<II")     # V transposed, layers
_TENSOR = struct.Struct("<iQ")     # type, bytes per row


@dataclass(frozen=True)
class Part:
    """``data`` in a state, repeated over n_bytes (which are its length where it is not repeated)."""

    data: bytes
    n_bytes: int


def fill(context: int, depth: int) -> None:
    """Repeat the cells that sequence 0 of a context holds until it has ``depth`` cells.

    context: address of the llama_context. No more memory is taken than the piece's.
    Raises InputError where the model's state is not that of a plain KV cache, DecodeError where it is refused.
    """
    llama = open_library().llama_cpp
    n = llama.llama_state_seq_get_size(context, 0)
    piece = (ctypes.c_uint8 * n)()
    if llama.llama_state_seq_get_data(context, piece, n, 0) != n:
        raise DecodeError("llama.cpp did not give the state of the sequence.")
    whole = parts(bytes(piece), depth)
    llama.llama_memory_clear(llama.llama_get_memory(context), False)  # or the cells would begin behind the piece
    with laid_out(whole) as (address, size):
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if llama.llama_state_seq_set_data(context, pointer, size, 0) != size:
            raise DecodeError(f"llama.cpp refused a state of {depth} cells", READ)


def parts(state: bytes, depth: int) -> list[Part]:
    """The state of ``depth`` cells that repeat those of ``state``. Raises InputError where that is not understood."""
    try:
        return _parts(state, depth)
    except (struct.error, ValueError):
        raise InputError("The state of this model is not that of one plain KV cache, so it cannot be filled by repeating "
                         "cells", READ) from None


def _parts(state: bytes, depth: int) -> list[Part]:
    magic, seq, n_stream, n_cells = _HEADER.unpack_from(state)
    if n_stream != 1 or not n_cells:
        raise ValueError
    positions = b"".join(_CELL.pack(pos, 1, seq) for pos in range(depth))
    at = _HEADER.size + n_cells * _CELL.size
    transposed, n_layer = _LAYERS.unpack_from(state, at)
    out = [_plain(_HEADER.pack(magic, seq, 1, depth) + positions + state[at:at + _LAYERS.size])]
    at += _LAYERS.size
    for _ in range(2 * n_layer):  # K of every layer, then V of every layer
        row = _TENSOR.unpack_from(state, at)[1]
        out.append(_plain(state[at:at + _TENSOR.size]))
        at += _TENSOR.size
        out.append(Part(state[at:at + n_cells * row], depth * row))
        at += n_cells * row
    if at != len(state) or transposed:
        raise ValueError
    return out


def _plain(data: bytes) -> Part:
    return Part(data, len(data))


@contextmanager
def laid_out(all_parts: list[Part]) -> Iterator[tuple[int, int]]:
    """(address, size) of memory that holds the parts one after the other, read only by what is inside ``with``."""
    size = sum(part.n_bytes for part in all_parts)
    anonymous = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE} if os.name == "posix" else {}
    memory = mmap.mmap(-1, size, **anonymous)
    first = ctypes.c_char.from_buffer(memory)
    try:
        at = 0
        for part in all_parts:
            _lay(memory, ctypes.addressof(first), at, part, _least_copies(all_parts))
            at += part.n_bytes
        yield ctypes.addressof(first), size
    finally:
        del first
        memory.close()


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


def _least_copies(all_parts: list[Part]) -> int:
    """Copies of a part's data that are mapped at once, so that there are not too many mappings."""
    repeats = sum(part.n_bytes // len(part.data) for part in all_parts if part.n_bytes > len(part.data))
    return -(-repeats // MAX_MAPPINGS)


def _lay(memory: mmap.mmap, base: int, at: int, part: Part, least_copies: int) -> None:
    """Repeat a part's data from offset ``at``: whole pages are mapped from one file, the ends are copied."""
    data, end, page = part.data, at + part.n_bytes, mmap.PAGESIZE
    period = math.lcm(len(data), page)
    period *= -(-least_copies * len(data) // period)
    start, stop = -(-at // page) * page, end // page * page
    if os.name != "posix" or stop - start <= period:
        start = stop = end
    memory[at:start] = _repeated(data, 0, start - at)
    if start < stop:
        with tempfile.TemporaryFile() as file:
            file.write(_repeated(data, start - at, period))
            file.flush()
            for offset in range(start, stop, period):
                _map(base + offset, min(period, stop - offset), file.fileno())
    memory[stop:end] = _repeated(data, stop - at, end - stop)


def _repeated(data: bytes, start: int, n: int) -> bytes:
    """n bytes of endlessly repeated data, from byte ``start``."""
    start %= len(data)
    return (data * (-(-(start + n) // len(data)) if n else 0))[start:start + n]


def _map(address: int, n_bytes: int, fd: int) -> None:
    """Show the head of a file at an address inside our own mapping."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    fixed = 0x10  # MAP_FIXED, of Linux, macOS and the BSDs
    if libc.mmap(address, n_bytes, mmap.PROT_READ, mmap.MAP_PRIVATE | fixed, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "mmap failed")
