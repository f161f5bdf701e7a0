"""What slows this machine down beside other programs: heat, too little power, a low clock, memory that lies on a disk. Linux alone.

root: where /proc and /sys are looked for; only tests look elsewhere.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from sfi_local.cgroup import read

CPU_COOLING = ("cpufreq", "cpu", "processor")  # cooling devices that work by slowing the CPU have these in their type
KIND_CLOCKS = ("intel_pstate", "amd-pstate", "intel_cpufreq")  # drivers whose governor powersave is no lowest clock
PRESSURE = 5.0  # percent of a minute that something waited for memory, from which on it is worth a word

# bits of the firmware of a Raspberry Pi, of now; 16 higher: of the time since its start
PI_BITS = {0: "its supply gives too little voltage: take a stronger one", 1: "the firmware holds its clock down",
           2: "the firmware slows it because of heat or voltage: cool it", 3: "it is near its limit of heat: cool it"}


@dataclass(frozen=True)
class Swap:
    """Bytes of swap, and of them in use; pressure: percent of the last minute in which something waited for memory, None: not told"""

    total: int
    used: int
    pressure: float | None

    @property
    def hurts(self) -> bool:
        """Whether what runs now is likely to wait for it: by the pressure, or where that is not told by how full it is."""
        return self.used > 0 and (self.pressure >= PRESSURE if self.pressure is not None else 2 * self.used > self.total)


def temperature(root: str = "/") -> float | None:
    """Degrees Celsius of the hottest sensor; None where there is none."""
    found = [_number(path) for path in _files(root, "sys/class/thermal/thermal_zone*/temp")]
    return max((n / 1000 for n in found if n is not None and 0 < n < 150_000), default=None)


def slowed_by(root: str = "/") -> list[str]:
    """What holds the CPU below its speed, each a clause with its remedy if there is one."""
    return [*_cooling(root), *_firmware(root), *_counted(root), *_clock(root)]


def swap(root: str = "/") -> Swap:
    """As the kernel tells it."""
    memory = dict(line.split(":", 1) for line in read(os.path.join(root, "proc/meminfo")).splitlines() if ":" in line)
    total, free = (int(memory.get(name, "0 kB").split()[0]) * 1024 for name in ("SwapTotal", "SwapFree"))
    return Swap(total, max(0, total - free), _pressure(read(os.path.join(root, "proc/pressure/memory"))))


def _pressure(text: str) -> float | None:
    for line in text.splitlines():
        name, *fields = line.split()
        for field in fields:
            if name == "some" and field.startswith("avg60="):
                return float(field[6:])
    return None


def _cooling(root: str) -> list[str]:
    """Of the kernel's cooling devices those that slow the CPU now."""
    found = []
    for folder in _files(root, "sys/class/thermal/cooling_device*"):
        kind, now, most = read(os.path.join(folder, "type")), _number(os.path.join(folder, "cur_state")), _number(os.path.join(folder, "max_state"))
        if now and most and any(name in kind.lower() for name in CPU_COOLING):
            found.append(f"heat: {kind} is at {now} of {most}: cool it")
    return found


def _firmware(root: str) -> list[str]:
    """What the firmware of a Raspberry Pi says of now, or else of the time since the start."""
    text = read(os.path.join(root, "sys/devices/platform/soc/soc:firmware/get_throttled"))
    try:
        bits = int(text, 16)
    except ValueError:
        return []
    now = [clause for bit, clause in PI_BITS.items() if bits >> bit & 1]
    before = [f"{clause} (not now, but since it was started)" for bit, clause in PI_BITS.items() if bits >> bit + 16 & 1]
    return now or before


def _counted(root: str) -> list[str]:
    """Times that an x86 CPU slowed itself down because of heat."""
    counts = [_number(path) or 0 for path in _files(root, "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    return [f"heat: a core slowed itself down {max(counts)} times since the start"] if any(counts) else []


def _clock(root: str) -> list[str]:
    """A limit on the clock, or a governor that keeps it low."""
    found: dict[str, None] = {}
    for folder in _files(root, "sys/devices/system/cpu/cpu*/cpufreq"):
        limit, most = _number(os.path.join(folder, "scaling_max_freq")), _number(os.path.join(folder, "cpuinfo_max_freq"))
        if limit and most and limit < most:
            found[f"its clock may reach {limit / 1e6:.1f} of {most / 1e6:.1f} GHz (scaling_max_freq)"] = None
        if read(os.path.join(folder, "scaling_governor")) == "powersave" and read(os.path.join(folder, "scaling_driver")) not in KIND_CLOCKS:
            found["the governor powersave keeps its clock low: choose schedutil or performance"] = None
    return list(found)


def _files(root: str, pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(root), pattern)))


def _number(path: str) -> int | None:
    text = read(path)
    return int(text) if text.lstrip("-").isdigit() else None
