"""Threads with little stack, as hosts make them."""

from __future__ import annotations

import threading
from typing import Any, Callable


def on_a_small_stack(call: Callable[[], Any], n_bytes: int = 1 << 18) -> Any:
    """The result of a call on a thread with as little stack as a host may give."""
    out: list[Any] = []
    before = threading.stack_size(n_bytes)
    try:  # the size is one for the process, so it is set back when all threads that the call starts are there
        thread = threading.Thread(target=lambda: out.append(call()))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    return out[0]
