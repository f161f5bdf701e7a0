"""Ctrl-C while native code runs: a flag instead of an exception that would be lost in a callback."""

from __future__ import annotations

import signal
import threading


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
