"""K and V of a sequence as rows, the state of what fast steps need of it, and a checksum for both: see ``sfi.h``.

Rows are of a llama_cpp._internals.LlamaContext, with an Engine or without; no other thread may be inside it.
"""

from __future__ import annotations

import mmap
from typing import Any, Sequence

from sfi_local.binding.engine import Engine, status_error
from sfi_local.binding.library import open_library
from sfi_local.errors import NoSupportError
from sfi_local.machine import new_memory

COPIED = 256  # tokens that are copied at a time: of most models some megabytes, which stay in the cache


def rows_size(context: Any, n: int) -> int:
    """Bytes of the rows of n tokens. Raises ModelError or ContextError where a sequence cannot be kept as rows."""
    return _check(open_library().lib.sfi_rows_size(_context(context), n))


def get_rows(context: Any, first: int, n: int, rows: Any, seq: int = 0) -> None:
    """Fill a writable buffer of rows_size(n) bytes with the rows of the tokens [first, first + n)."""
    native = open_library()
    with native.ffi.from_buffer("char[]", rows, require_writable=True) as data:
        _check(native.lib.sfi_get_rows(_context(context), seq, first, n, data, len(data)))


def all_rows(context: Any, n: int) -> mmap.mmap:
    """The rows of the first n tokens, in memory of their own."""
    rows = new_memory(rows_size(context, n))
    get_rows(context, 0, n, rows)
    return rows


def add_rows(context: Any, tokens: Sequence[int], rows: Any, n_rows: int, seq: int = 0) -> None:
    """Append tokens whose rows are the first of n_rows in a buffer. Raises ContextFullError, and leaves the sequence as it was."""
    native = open_library()
    with native.ffi.from_buffer("char[]", rows) as data:
        ids = native.ffi.new("llama_token[]", list(tokens))
        _check(native.lib.sfi_add_rows(_context(context), seq, ids, len(tokens), data, n_rows, len(data)))


def copy_rows(source: Any, target: Any, tokens: Sequence[int]) -> None:
    """Append all tokens of a context's first sequence to that of another; a thread reads what is written next.

    Raises ModelError, ContextError or ContextFullError; the other sequence then has a part of them.
    """
    from concurrent.futures import ThreadPoolExecutor

    size, places = rows_size(source, 1), range(0, len(tokens), COPIED)
    buffers = [new_memory(size * min(COPIED, len(tokens))) for _ in range(2)]

    def read(i: int) -> memoryview:
        n = min(COPIED, len(tokens) - places[i])
        rows = memoryview(buffers[i % 2])[:n * size]
        get_rows(source, places[i], n, rows)
        return rows

    with ThreadPoolExecutor(1, "sfi-copy") as reader:
        coming = reader.submit(read, 0)
        for i, first in enumerate(places):
            rows = coming.result()
            if i + 1 < len(places):
                coming = reader.submit(read, i + 1)
            part = tokens[first:first + COPIED]
            add_rows(target, part, rows, len(part))


def get_state(engine: Engine, seq: int = 0) -> bytearray:
    """What fast steps need of a sequence; empty where there is nothing to keep."""
    native, handle = open_library(), engine._handle()
    state = bytearray(_check(native.lib.sfi_state_size(handle, seq)))
    if state:
        with native.ffi.from_buffer("char[]", state, require_writable=True) as data:
            _check(native.lib.sfi_get_state(handle, seq, data, len(data)))
    return state


def set_state(engine: Engine, state: Any, seq: int = 0) -> str:
    """Give a sequence, whose rows are there, a state of a text that begins with its tokens; "" or why it does not serve."""
    native = open_library()
    try:
        with native.ffi.from_buffer("char[]", state) as data:
            _check(native.lib.sfi_set_state(engine._handle(), seq, data, len(data)))
        return ""
    except NoSupportError as error:
        return str(error)


def checksum(data: Any, begin: int = 0) -> int:
    """A 64-bit number that tells whether bytes have changed by accident, at the speed of memory. begin: that of the bytes before"""
    native = open_library()
    with native.ffi.from_buffer("char[]", data) as bytes_:
        return native.lib.sfi_checksum(begin, bytes_, len(bytes_))


def _context(context: Any) -> Any:
    return open_library().ffi.cast("struct llama_context *", context.ctx)


def _check(status: int) -> int:
    if status < 0:
        raise status_error(status)
    return status
