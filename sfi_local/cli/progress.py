"""Progress on stderr: of one piece of work a line that is redrawn, of a measurement a bar; few plain lines where it is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from sfi_local.machine import human_bytes

REDRAW_S = 0.1
PLAIN_S = 10.0


class Progress:
    """Callable with (done, total); erases its line when closed, so that nothing stays between answer and prompt.

    label: what is going on, e.g. "prefill"; unit: "tokens", "bytes" or "%"
    """

    def __init__(self, label: str, unit: str, stream=None):
        self.label, self.unit = label, unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._start = self._last = time.monotonic()
        self._drawn = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __call__(self, done: float, total: float) -> None:
        now = time.monotonic()
        if now - self._last < (REDRAW_S if self.live else PLAIN_S):
            return
        self._last = now
        self._write(self._text(done, total, now - self._start))

    def close(self) -> None:
        if self.live and self._drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self._drawn = False

    def _write(self, text: str) -> None:
        self.stream.write(f"\r\x1b[K{text}" if self.live else f"{text}\n")
        self.stream.flush()
        self._drawn = True

    def _text(self, done: float, total: float, seconds: float) -> str:
        if self.unit == "%":
            return f"{self.label} {100 * done / total if total else 0:.0f} %"
        if self.unit == "bytes":
            return f"{self.label} {human_bytes(done)} of {human_bytes(total)}" if total else (
                f"{self.label} {human_bytes(done)}")
        rate = f", {done / seconds:.0f} {self.unit}/s" if seconds > 0 and done else ""
        return f"{self.label} {done} of {total} {self.unit}{rate}"


class Bar:
    """The progress of a measurement of n_runs parts, which leaves nothing behind; plain lines where stderr is no terminal."""

    def __init__(self, n_runs: int):
        self._total, self._live, self._said, self._bar = n_runs, sys.stderr.isatty(), "", None

    def __enter__(self) -> "Bar":
        if self._live:
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("loading", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """What is going on, ``case: detail``; in plain lines only where the case changes."""
        if self._bar:
            self._bar.update(self._task, description=text)
        elif text.partition(":")[0] != self._said:
            self._said = text.partition(":")[0]
            click.echo(f"sfi-local: measuring {self._said}", err=True)

    def advance(self) -> None:
        """One part is done."""
        if self._bar:
            self._bar.advance(self._task)

    def filling(self, n_done: int, n_total: int) -> None:
        """A prefill is going on."""
        if self._bar:
            self._bar.update(self._task, description=f"prefill {n_done} of {n_total}")


class Quiet:
    """A progress bar that shows nothing."""

    def say(self, text: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def filling(self, n_done: int, n_total: int) -> None:
        pass
