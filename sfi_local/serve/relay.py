"""From the worker's thread to an event loop, so that the worker does not wait for the loop.

To wake a loop is a system call, for which a thread lets go of Python's lock: the loop takes it, and the worker had to wait until a token
was written out before it could begin its next step. Here another thread wakes the loop, and gets to it when the worker computes.
"""

from __future__ import annotations

import asyncio
import threading
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any, Callable, Sequence


class Relay:
    """call() from any thread. What is given together is delivered together, in its order."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[asyncio.AbstractEventLoop, Callable[[Any], None], Any]] = SimpleQueue()
        threading.Thread(target=self._run, name="sfi-relay", daemon=True).start()

    def call(self, loop: asyncio.AbstractEventLoop, do: Callable[[Any], None], value: Any) -> None:
        """Call do(value) in the loop; never, if it is closed."""
        self._calls.put((loop, do, value))

    def _run(self) -> None:
        while True:
            calls = [self._calls.get()]
            try:
                while True:
                    calls.append(self._calls.get_nowait())
            except Empty:
                pass
            for loop, of_loop in groupby(calls, key=lambda call: call[0]):
                try:
                    loop.call_soon_threadsafe(_deliver, list(of_loop))
                except RuntimeError:
                    pass  # the loop is closed: nobody listens


def _deliver(calls: Sequence[tuple[Any, Callable[[Any], None], Any]]) -> None:
    for _, do, value in calls:
        do(value)
