"""How much of the processor's time other programs took while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sfi_local.cpus import import_psutil, usable_cpus

BUSY = 0.1  # share of the time of all CPUs this process may use, from which a measurement says little


class OtherWork:
    """``share()`` is that of the time since the last call, or since this was made."""

    def __init__(self, stat: Path = Path("/proc/stat")):
        self._stat, self._cpus = stat, usable_cpus()
        self._last = self._now()

    def share(self) -> float | None:
        """In 0 to 1; None where the system does not tell."""
        last, self._last = self._last, self._now()
        return share_between(last, self._last, len(self._cpus))

    def _now(self) -> tuple[float, float | None, float]:
        """Seconds: of the clock, of all work on these CPUs, of our own"""
        own = os.times()
        return time.perf_counter(), busy_seconds(self._stat, self._cpus), own.user + own.system


def share_between(before: tuple, after: tuple, n_cpus: int) -> float | None:
    """Of two readings of the clock, all work, and our own, in seconds."""
    (start, all_before, own_before), (end, all_after, own_after) = before, after
    if None in (all_before, all_after) or end <= start:
        return None
    others = (all_after - all_before) - (own_after - own_before)
    return min(1.0, max(0.0, others / (n_cpus * (end - start))))


def busy_seconds(stat: Path, cpus: set[int]) -> float | None:
    """Seconds that these CPUs have worked since the system began, time that a hypervisor gave to others included."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu") and line[3:4].isdigit()]
        ticks = [list(map(int, fields)) for name, *fields in lines if int(name[3:]) in cpus]
        return sum(sum(t[:3]) + sum(t[5:8]) for t in ticks) / os.sysconf("SC_CLK_TCK") if ticks else None  # not idle, not iowait
    except (OSError, ValueError, AttributeError):
        return _by_psutil()


def _by_psutil() -> float | None:
    try:
        times = import_psutil().cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0)
    except Exception:  # no psutil, or none of this on this system
        return None
