"""What this machine has: cores, memory, disk, CPU flags, and where models are kept. Every probe has a fallback."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path

from sfi_local import cgroup, cpus
from sfi_local.cgroup import read
from sfi_local.cpus import usable_cpus  # noqa: F401  # part of what this machine has


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


def physical_cores() -> int:
    """Threads to compute with: see cpus.choose()."""
    return cpus.choose().n


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping; None if the system does not tell."""
    known = [n for n in (_meminfo_available(), cgroup.available_memory(), _available_elsewhere()) if n is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    """The kernel's own estimate, and what ZFS would give back of its cache, which the kernel counts as used."""
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + _zfs_cache()
    return None


def _zfs_cache() -> int:
    stats = dict(fields[::2] for line in read("/proc/spl/kstat/zfs/arcstats").splitlines() if len(fields := line.split()) == 3)
    return max(0, int(stats.get("size", 0)) - int(stats.get("c_min", 0)))


def _available_elsewhere() -> int | None:
    """Where there is no /proc."""
    if os.path.exists("/proc/meminfo"):
        return None
    psutil = cpus.import_psutil()
    return psutil.virtual_memory().available if psutil else None


def cpu_flags() -> set[str] | None:
    """CPU feature flags as Linux names them; None where they cannot be read."""
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return None


def reads_mapped_weights() -> bool:
    """Prompts are read faster from weights as they lie in the file than from those that llama.cpp has put into another order.

    Of AVX2 it was measured (docs/speed-log.md: 2.4 times as fast in the product, decoding is the same), of AVX-512 not.
    """
    flags = cpu_flags() or set()
    return "avx2" in flags and "avx512f" not in flags


def cpu_name() -> str:
    """The CPU's marketing name, or its architecture."""
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine if hasattr(os, "uname") else "unknown"


def new_memory(n: int) -> mmap.mmap:
    """n bytes of zeros, that take memory as they are written, in huge pages where the system has them, and give it back at once."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, max(1, n))
    memory = mmap.mmap(-1, max(1, n), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass
    return memory


def step_back() -> None:
    """Let the calling thread have less of the processors than those that compute, where the system tells threads apart (Linux)."""
    if sys.platform == "linux":
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        except OSError:
            pass  # it was below that


def human_bytes(n: float) -> str:
    """A size for people: 98.4 MB, 1.2 GB (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"

