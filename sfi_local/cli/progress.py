"""Progress on stderr: one line that moves by itself on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any, Sequence

from sfi_local.cli.window import can_redraw, width_of
from sfi_local.machine import human_bytes

TICK_S = 0.25    # between two drawings; what is over sooner is not shown
PLAIN_S = 10.0   # between two lines where nothing can be drawn over
RECENT_S = 10.0  # of which the time that is left is reckoned
BAR = 16         # characters


_drawn: set["Progress"] = set()  # those whose line is on the screen


def erase_drawn() -> None:
    """Before something else is written: what is drawn goes, and comes again behind it."""
    for one in list(_drawn):
        one.erase()


class Pace:
    """How fast a piece of work has been going of late: reading slows down with the depth, so its mean says too little."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, done: float, now: float) -> None:
        """done: in any unit; now: seconds"""
        if len(self._points) > 1 and now - self._points[-2][0] < TICK_S:
            self._points.pop()
        self._points.append((now, done))
        while len(self._points) > 3 and now - self._points[1][0] > RECENT_S:
            self._points.popleft()

    def left(self, total: float, now: float) -> float | None:
        """Seconds until total; None where nothing is known."""
        if len(self._points) < 2:
            return None
        (start, first), (end, done) = self._points[0], self._points[-1]
        if done <= first or end <= start:
            return None
        return max(0.0, (total - done) * (end - start) / (done - first) - (now - end))


class Progress:
    """Callable with (done, total); on a terminal erased when closed, so that nothing stays between prompt and answer.

    label:  what is going on, e.g. "reading"; unit: "tokens", "bytes", "runs" or "%"
    before: what goes on until the first call
    done, total: of the last call
    """

    def __init__(self, label: str, unit: str, before: str = "", stream: Any = None):
        self.label, self.unit, self.before = label, unit, before or label
        self.stream = stream or sys.stderr
        self.live = can_redraw(self.stream)
        self.detail = ""  # said behind the label
        self.done, self.total = 0.0, 0.0
        self._pace, self._start = Pace(), time.monotonic()
        self._last_plain = self._start
        self._began = False
        self._lock, self._closed = threading.Lock(), threading.Event()
        if self.live:
            threading.Thread(target=self._tick, daemon=True).start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, done: float, total: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._pace.add(done, now)
            self.done, self.total, self._began = done, total, True
        if not self.live and now - self._last_plain >= PLAIN_S:
            self._last_plain = now
            self._write(f"{self._forms(now)[1]}\n")

    def close(self) -> None:
        """May be called twice."""
        self._closed.set()
        self.erase()

    def erase(self) -> None:
        """Take the line away until it is drawn again."""
        with self._lock:
            if self in _drawn:
                self._write("\r\x1b[K")
                _drawn.discard(self)

    def _tick(self) -> None:
        while not self._closed.wait(TICK_S):
            with self._lock:
                if not self._closed.is_set():
                    self._write("\r\x1b[K" + first_that_fits(self._forms(time.monotonic()), width_of(self.stream) - 1))
                    _drawn.add(self)

    def _forms(self, now: float) -> list[str]:
        if not self._began:
            return waiting(self.before, now - self._start)
        label = f"{self.label} {self.detail}".strip()
        return forms(label, self.unit, self.done, self.total, now - self._start, self._pace.left(self.total, now))

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone: no reason to end the work
            self._closed.set()


class Runs(Progress):
    """The progress of a measurement of n parts."""

    def __init__(self, n: int, stream: Any = None):
        super().__init__("measuring", "runs", "loading", stream)
        self._n, self._n_done, self._said = n, 0, ""

    def say(self, text: str) -> None:
        """What is going on, ``case: detail``; in plain lines only where the case changes."""
        self.detail = text
        if self.live:
            self._began, self.total = True, self._n
        elif text.partition(":")[0] != self._said:
            self._said = text.partition(":")[0]
            self._write(f"sfi-local: measuring {self._said}\n")

    def advance(self) -> None:
        """One part is done."""
        self._n_done += 1
        self(self._n_done, self._n)

    def filling(self, n_done: int, n_total: int) -> None:
        """A prefill is going on."""
        self.detail = f"{self.detail.partition(':')[0]}: reading {n_done} of {n_total} tokens" if n_done < n_total else ""


class Quiet:
    """A progress that shows nothing."""

    def say(self, text: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def filling(self, n_done: int, n_total: int) -> None:
        pass


# ---- what is shown ---------------------------------------------------------------------------------------------------

def waiting(label: str, seconds: float) -> list[str]:
    """... where nothing is known but that it goes on."""
    return [f"{label}, {spoken(seconds)}", label]


def forms(label: str, unit: str, done: float, total: float, seconds: float, left: float | None) -> list[str]:
    """The same progress in fewer and fewer columns."""
    if not total:
        return waiting(f"{label} {human_bytes(done)}" if unit == "bytes" else label, seconds)
    ending = f", {spoken(left)} left" if left is not None else f", {spoken(seconds)}"
    share = f"{100 * min(1.0, done / total):.0f} %"
    amount = share if unit == "%" else f"{_number(done, unit)} of {_number(total, unit)}"
    unit = f" {unit}" if unit in ("tokens", "runs") else ""
    if not done and unit == " tokens":
        amount = _number(total, unit)
    return [f"{label} {bar(done / total)} {amount}{unit}{ending}", f"{label} {amount}{unit}{ending}", f"{label} {share}{ending}",
            f"{share}{ending}", share]


def first_that_fits(texts: Sequence[str], width: int) -> str:
    """The first text of at most width columns; of none the last, cut."""
    return next((text for text in texts if len(text) <= width), texts[-1][:max(0, width)])


def bar(share: float) -> str:
    """``[####....]``"""
    n = round(BAR * min(1.0, max(0.0, share)))
    return f"[{'#' * n}{'.' * (BAR - n)}]"


def spoken(seconds: float) -> str:
    """``40 s``, ``3 min``, ``1 h 5 min``"""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(n: float, unit: str) -> str:
    return human_bytes(n) if unit == "bytes" else f"{n:.0f}"
