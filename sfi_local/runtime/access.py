"""Who may be inside a native object, and when it is freed: never under a thread.

A call into llama.cpp lets other threads run. Each stands in ``with access:``, so that whoever closes the object waits for
the calls that are inside; where one of them is the closer's own (a callback, a signal), the last one out frees.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Iterator, TypeVar

from sfi_local.binding.interrupt import CancelFlag
from sfi_local.binding.library import check_process
from sfi_local.errors import AbortedError, BusyError, DetachedError

T = TypeVar("T")

BUSY = ("Another thread or another answer is at work on this model: let it end, close its iterator or call cancel(), or load a model of "
        "your own.")
CANCELLED = "The answer was cancelled."


class Access:
    """The way into an object that several threads may use at a time.

    what: what it is called in a sentence
    free: frees it; called once
    within: what it stands on, which is freed after it
    Entering raises DetachedError after close(), and LibraryError in a fork of the process that made the object.
    """

    def __init__(self, what: str, free: Callable[[], None], within: "Access | None" = None):
        self.what, self.closed, self._free, self._within = what, False, free, within
        # with a lock that its owner may take again: a signal handler or a destructor can come in between
        self._changed = threading.Condition()
        self._inside: list[int] = []
        self._parts: set[Access] = set()
        self._begun_to_free = self._freed = False
        if within:
            within._parts.add(self)

    def __enter__(self) -> "Access":
        check_process()
        with self._changed:
            self._admit(threading.get_ident())
            self._inside.append(threading.get_ident())
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._inside.remove(threading.get_ident())
            self._left()
        self._free_if_due()

    def close(self) -> None:
        """Refuse new calls, wait for those inside, free. May be called twice, and from a call that is inside."""
        if not check_process(quiet=True):
            return  # a fork: the memory and the threads that go with it belong to the parent
        for part in list(self._parts):
            part.close()
        with self._changed:
            self.closed = True
        self._free_if_due()
        with self._changed:
            while not self._freed and not self._holds(threading.get_ident()):
                self._changed.wait()

    @property
    def is_freed(self) -> bool:
        """Whether somebody frees it, or has. If not, nobody begins while this thread is inside or at work in a turn."""
        with self._changed:
            return self._begun_to_free

    def check_open(self) -> None:
        """Raise DetachedError after close()."""
        if self.closed:
            raise DetachedError(f"This {self.what} was closed: load it again.")

    def _admit(self, thread: int) -> None:
        self.check_open()

    def _left(self) -> None:
        """A call has left; the lock is held."""

    def _holds(self, thread: int) -> bool:
        """Whether it cannot be freed as long as this thread waits."""
        return thread in self._inside or any(part._holds(thread) for part in list(self._parts))

    def _is_idle(self) -> bool:
        return not self._inside and not self._parts

    def _free_if_due(self) -> None:
        with self._changed:
            if not self.closed or not self._is_idle() or self._begun_to_free:
                return
            self._begun_to_free = True
        try:
            self._free()
        finally:
            with self._changed:
                self._freed = True
                self._changed.notify_all()
            if self._within:
                self._within._part_is_freed(self)

    def _part_is_freed(self, part: "Access") -> None:
        with self._changed:
            self._parts.discard(part)
        self._free_if_due()


class Turn:
    """A generation, from its first item to its last. thread: that is at work in it now; None between two of its items"""

    thread: int | None = None
    cancelled = False


class Turns(Access):
    """The way into an object that one thread at a time may use, and one generation from its first item to its last.

    flag: set while what is inside shall end
    A second thread or generation gets BusyError before anything changes.
    """

    def __init__(self, what: str, free: Callable[[], None], within: Access | None = None):
        super().__init__(what, free, within)
        self.flag = CancelFlag()
        self._turn: Turn | None = None
        _open.add(self)

    @property
    def cancelled(self) -> bool:
        """Whether the running generation was cancelled."""
        return self._turn is not None and self._turn.cancelled

    def cancel(self) -> None:
        """End what is running, with AbortedError: a computation within one operation. Nothing, if nothing is running.

        From any thread, a callback or a signal handler.
        """
        with self._changed:
            if self._turn:
                self._turn.cancelled = True
            if self._turn or self._inside:
                self.flag.set()

    def close(self) -> None:
        """End what is running, with DetachedError, wait until it has left, and free."""
        if check_process(quiet=True):
            with self._changed:
                self.closed = True
                self.flag.set()
        super().close()

    def check_free(self) -> None:
        """Raise what the first item of a new generation would raise now."""
        check_process()
        with self._changed:
            self._check(threading.get_ident())

    def turn(self, items: Iterator[T]) -> Iterator[T]:
        """Pass on what items yields, as one turn; it begins with the first item and ends with the last, or with close().

        Inside another turn, from the code that is at work in it, it is a part of that turn.
        """
        turn, mine = self._begin()
        try:
            while True:
                with self._at_work(turn):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            with self._at_work(turn):
                items.close()  # type: ignore[attr-defined]  # generators, all of them
            if mine:
                self._end()

    def _begin(self) -> tuple[Turn, bool]:
        check_process()
        me = threading.get_ident()
        with self._changed:
            self._check(me)
            if self._turn:
                return self._turn, False
            self._turn = Turn()
            return self._turn, True

    def _end(self) -> None:
        with self._changed:
            self._turn = None
            self._left()

    def _check(self, me: int) -> None:
        self.check_open()
        if self._inside or (self._turn and self._turn.thread != me):
            raise BusyError(BUSY)

    def _admit(self, thread: int) -> None:
        self._check(thread)
        if self.cancelled:
            raise AbortedError(CANCELLED)

    def _left(self) -> None:
        if not self.closed and not self.cancelled:
            self.flag.clear()

    def _holds(self, thread: int) -> bool:
        return super()._holds(thread) or (self._turn is not None and self._turn.thread == thread)

    def _is_idle(self) -> bool:
        return super()._is_idle() and (self._turn is None or self._turn.thread is None)

    @contextmanager
    def _at_work(self, turn: Turn) -> Iterator[None]:
        """Between two items of a turn also what is no call of a slot, such as sampling, sees the context."""
        with self._changed:
            before, turn.thread = turn.thread, threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                turn.thread = before
            self._free_if_due()


_open: "weakref.WeakSet[Turns]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A daemon thread may still be inside when the interpreter frees what it knows."""
    for turns in list(_open):
        turns.close()
