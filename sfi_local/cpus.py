"""How many threads to compute with: one per core that is as fast as the fastest, within what this process may use.

All threads of a step wait for each other at every operation. A thread more than the quota lets run, or one on a core half
as fast, therefore delays all of them; and a second thread on a core finds its memory bandwidth used up.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Iterable

from sfi_local import cgroup
from sfi_local.cgroup import read

# A core is slow below this share of the fastest one's capacity (Linux's measure of work done per second), or clock. Big and little
# cores of one chip lie on both sides of it, the favoured cores that boost a little higher do not.
LEAST_CAPACITY = 0.5
LEAST_CLOCK = 0.7


@dataclass(frozen=True)
class Choice:
    """n: threads for decoding and for prefill; why: what decided it, for ``doctor``."""

    n: int
    why: str


def usable_cpus() -> set[int]:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    psutil = import_psutil()
    try:
        return set(psutil.Process().cpu_affinity())
    except Exception:  # no psutil, or none of this on this system
        return set(range(os.cpu_count() or 1))


def choose(root: str = "/", usable: Iterable[int] | None = None) -> Choice:
    """The number of threads, and why. root: where /sys and /proc are looked for; usable: CPUs, None: this process's"""
    cpus = set(usable_cpus() if usable is None else usable)
    reasons = []
    n_cpus = os.cpu_count() or 1
    if len(cpus) < n_cpus:
        reasons.append(f"this process may run on {len(cpus)} of {n_cpus} CPUs")
    fast, named = _fast_cpus(cpus, root)
    if named:
        reasons.append(f"{len(fast)} of {len(cpus)} CPUs are the fast ones ({named})")
    n = len({_siblings(cpu, root) for cpu in fast})
    if usable is None and sys.platform in ("darwin", "win32"):
        n = min(n, _cores_elsewhere() or n)
    if n < len(fast):
        reasons.append(f"they are hardware threads of {n} cores")
    quota = cgroup.cpu_quota(root)
    if quota is not None and quota < n:
        reasons.append(f"a cgroup quota allows {quota:g} CPUs")
        n = int(quota)
    return Choice(max(1, n), "; ".join(reasons) or "one per core")


def _fast_cpus(cpus: set[int], root: str) -> tuple[set[int], str]:
    """The CPUs on fast cores, and which system file told them apart; all and "" where nothing does."""
    performance = parse_list(read(os.path.join(root, "sys/devices/cpu_core/cpus"))) & cpus
    if performance and performance < cpus:
        return performance, "cpu_core"
    for file, least in (("cpu_capacity", LEAST_CAPACITY), ("cpufreq/cpuinfo_max_freq", LEAST_CLOCK)):
        speeds = {cpu: read(os.path.join(root, f"sys/devices/system/cpu/cpu{cpu}/{file}")) for cpu in cpus}
        if cpus and all(speed.isdigit() for speed in speeds.values()):
            fastest = max(map(int, speeds.values()))
            fast = {cpu for cpu, speed in speeds.items() if int(speed) >= least * fastest}
            if fast < cpus:
                return fast, os.path.basename(file)
    return cpus, ""


def parse_list(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it, e.g. ``0-3,8``."""
    found: set[int] = set()
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        if not first.strip().isdigit() or last and not last.strip().isdigit():
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def _siblings(cpu: int, root: str) -> str:
    """The hardware threads of a CPU's core; its own number where the system does not tell."""
    return read(os.path.join(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)


def _cores_elsewhere() -> int | None:
    """Performance cores of macOS, cores of Windows; None where they are not known."""
    if sys.platform == "darwin":
        import subprocess

        try:
            done = subprocess.run(["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            done = None
        if done and done.stdout.strip().isdigit():
            return int(done.stdout)
    psutil = import_psutil()
    return psutil.cpu_count(logical=False) if psutil else None


def import_psutil():
    """psutil, which is asked where there is no /proc; None where it is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil
