"""How far from dense a model is at several tolerances, as `sfi-local calibrate` measured it; chosen by a quality, see quality.py.

A larger tolerance of policy sketch attends exactly to fewer cells: fewer bytes are read, and the output is further from
dense. How far depends on the model, so it is measured per model, KV type and sketch, and kept in the user's cache.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Sequence

from sfi_local.errors import SfiError
from sfi_local.machine import cache_dir
from sfi_local.params import BUDGET, SKETCH_BITS, SfiParams
from sfi_local.tuning import remembered

SKETCH = (*SKETCH_BITS, "second_look")  # the fields of a sketch's format, which a calibration holds for
TOLERANCES = (4e-3, 2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4)  # that are measured


@dataclass(frozen=True)
class Setting:
    """A tolerance; the mean divergence from dense in nats, and the bytes read over dense's, that were measured with it."""

    tolerance: float
    kld_mean: float
    kv_read_share: float


@dataclass(frozen=True)
class Calibration:
    """floor: mean divergence of stock from dense, in nats; budget: n_sink, n_recent, n_selected of the measurement; date: of it, or "" """

    floor: float
    settings: tuple[Setting, ...]
    budget: tuple[int, int, int]
    date: str = ""


def choose(settings: Sequence[Setting], bound: float) -> tuple[Setting, bool]:
    """(the setting of the largest tolerance within a bound in nats, True), else (that of the smallest, False)."""
    settings = [s for s in settings if s.kv_read_share < 1] or settings  # what reads more than dense never pays
    within = [s for s in settings if s.kld_mean <= bound]
    if within:
        return max(within, key=lambda s: s.tolerance), True
    return min(settings, key=lambda s: s.tolerance), False


def command_for(path: Path, kv_type: str, params: SfiParams) -> str:
    """The command that makes the calibration."""
    command = ["sfi-local", "calibrate", str(path)]
    if kv_type != "f16":
        command += ["--kv-type", kv_type]
    changed = [f"{name}={getattr(params, name)}" for name in SKETCH if getattr(params, name) != getattr(SfiParams, name)]
    if changed:
        command += ["--set", ",".join(changed)]
    return shlex.join(command)


# ---- remembering -----------------------------------------------------------------------------------------------------

def fidelity_file() -> Path:
    """JSON, see remembered; an entry has ``floor``, ``budget``, ``settings``, and how and when they were measured."""
    return cache_dir() / "fidelity.json"


def known() -> list[dict[str, Any]]:
    """All entries, the oldest first."""
    return list(remembered.entries(fidelity_file(), _is_entry).values())


def recall(path: Path, type_k: str, type_v: str, params: SfiParams) -> Calibration | None:
    """The calibration of a model file with these types of K and V and this sketch; None if there is none."""
    key = remembered.spelled(_key(path, type_k, type_v, params))
    entry = remembered.entries(fidelity_file(), _is_entry).get(key)
    if entry is None:
        return None
    return Calibration(entry["floor"], tuple(Setting(**s) for s in entry["settings"]), tuple(entry["budget"]), str(entry.get("date", "")))


def expired(path: Path, type_k: str, type_v: str, params: SfiParams) -> str:
    """A sentence about a calibration of another build of the library, said once; "" where there is none."""
    key = _key(path, type_k, type_v, params)
    for entry in known():
        if {**entry["key"], "source_id": ""} != {**key, "source_id": ""} or entry.get("expired_for") == key["source_id"]:
            continue
        try:
            remembered.store(fidelity_file(), {**entry, "expired_for": key["source_id"]}, _is_entry)
        except SfiError:
            pass  # a cache that cannot be written: said again next time
        return (f"The calibration of {path.name} is of another build of the library and is not used any more: "
                f"`{command_for(path, type_k, params)}` makes a new one.")
    return ""


def forget(path: Path | None) -> int:
    """Remove the calibrations of a model file, None: of all; how many there were. Raises SfiError where the file cannot be written."""
    return remembered.forget(fidelity_file(), path, _is_entry)


def remember(path: Path, kv_type: str, params: SfiParams, floor: float, settings: Sequence[Setting], **how: Any) -> None:
    """Keep a calibration in place of an older one. how: further fields, for people. Raises SfiError."""
    remembered.store(fidelity_file(), {
        "key": _key(path, kv_type, kv_type, params), **how, "floor": floor, "budget": list(_budget(params)),
        "settings": [asdict(s) for s in settings]}, _is_entry)


def _key(path: Path, type_k: str, type_v: str, params: SfiParams) -> dict[str, Any]:
    """What a calibration depends on; not the machine, whose rounding is within the noise floor."""
    return {**remembered.model_key(path), "type_k": type_k, "type_v": type_v,
            "sketch": {name: getattr(params, name) for name in SKETCH}}


def _budget(params: SfiParams) -> tuple[int, int, int]:
    return tuple(getattr(params, name) for name in BUDGET)


def _is_entry(e: dict[str, Any]) -> bool:
    fields = set(Setting.__dataclass_fields__)
    return (_is_share(e["floor"]) and len(e["budget"]) == 3 and all(isinstance(n, int) for n in e["budget"])
            and bool(e["settings"]) and all(set(s) == fields and all(map(_is_share, s.values())) for s in e["settings"]))


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float)) and 0 <= x < math.inf
