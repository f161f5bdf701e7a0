"""Stopping native code: flags instead of exceptions, which would be lost in a callback."""

from __future__ import annotations

import ctypes
import signal
import threading
from typing import Any

from sfi_local.binding.library import open_library


class InterruptFlag:
    """Inside ``with InterruptFlag() as flag`` Ctrl-C sets ``flag.requested``; leaving raises KeyboardInterrupt.

    Native callbacks read the flag and stop the work, so that nothing is left half done. A second Ctrl-C raises at
    once. Where the program has its own handler, or outside the main thread, nothing is changed.
    """

    requested = False

    def __enter__(self) -> "InterruptFlag":
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self.requested:
            raise KeyboardInterrupt

    def _on_interrupt(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class CancelFlag:
    """A flag that any thread may set, and that llama.cpp reads between two operations of a graph, without Python."""

    def __init__(self) -> None:
        native = open_library()
        self._value, self._llama = native.ffi.new("bool *"), native.llama_cpp
        address = lambda pointer: int(native.ffi.cast("uintptr_t", pointer))  # noqa: E731
        self._read = self._llama.ggml_abort_callback(address(native.ffi.addressof(native.lib, "sfi_flag_is_set")))
        self._data = ctypes.c_void_p(address(self._value))

    def __bool__(self) -> bool:
        return self._value[0]

    def set(self) -> None:
        self._value[0] = True

    def clear(self) -> None:
        self._value[0] = False

    def watch(self, context: Any) -> None:
        """Let it end the graphs of a context (llama_cpp._internals.LlamaContext), which keeps it alive."""
        context.cancel_flag = self
        self._llama.llama_set_abort_callback(context.ctx, self._read, self._data)
