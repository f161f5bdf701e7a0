"""What this machine has: cores, memory, disk, CPU flags, and where models are kept. Every probe has a fallback."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Where pulled models are kept: SFI_LOCAL_CACHE, or the user's cache directory of the platform."""
    override = os.environ.get("SFI_LOCAL_CACHE")
    if override:
        return Path(override)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sfi-local"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "sfi-local"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfi-local"


def usable_cpus() -> set[int]:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Cores this process may use: hardware threads of one core count once, a container's quota is respected.

    Decoding is bound by memory bandwidth, so a second thread on a core gains nothing.
    """
    siblings = {_siblings(cpu) for cpu in usable_cpus()}
    return max(1, min(len(siblings), _quota_cpus()))


def _siblings(cpu: int) -> str:
    text = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return text or str(cpu)


def _quota_cpus() -> int:
    """CPUs that a cgroup (v2) quota allows, rounded up."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota.isdigit() or not period.isdigit():
        return 1 << 30
    return -(-int(quota) // int(period))


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping; None if the system does not tell."""
    known = [n for n in (_meminfo_available(), _cgroup_available(), _sysconf_available()) if n is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """What a container's memory limit leaves; its file cache counts as free because it can be dropped."""
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if not limit.isdigit() or not used.isdigit():
        return None
    cached = next((int(line.split()[1]) for line in _read("/sys/fs/cgroup/memory.stat").splitlines()
                   if line.startswith("file ")), 0)
    return max(0, int(limit) - int(used) + cached)


def _sysconf_available() -> int | None:
    if os.path.exists("/proc/meminfo") or not hasattr(os, "sysconf"):
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return None


def cpu_flags() -> set[str] | None:
    """CPU feature flags as Linux names them; None where they cannot be read."""
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return None


def cpu_name() -> str:
    """The CPU's marketing name, or its architecture."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine if hasattr(os, "uname") else "unknown"


def human_bytes(n: float) -> str:
    """A size for people: 98.4 MB, 1.2 GB (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
