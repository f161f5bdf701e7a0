"""The tolerance that keeps a model within a divergence from dense: chosen from what `sfi-local calibrate` measured.

A larger tolerance of policy sketch attends exactly to fewer cells: fewer bytes are read, and the output is further from
dense. How far depends on the model, so it is measured per model, KV type and sketch, and kept in the user's cache.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Sequence

from sfi_local.errors import ArgumentError, InputError
from sfi_local.machine import cache_dir
from sfi_local.params import BUDGET, SKETCH_BITS, SfiParams
from sfi_local.tuning import remembered

TOLERANCES = (4e-3, 2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4)  # that are measured

FLOOR = "floor"      # as close as two dense implementations are to each other
DEFAULT = "default"  # the floor where the model is calibrated, else the tolerance of the parameters



@dataclass(frozen=True)
class Setting:
    """A tolerance; the mean divergence from dense in nats, and the bytes read over dense's, that were measured with it."""

    tolerance: float
    kld_mean: float
    kv_read_share: float


@dataclass(frozen=True)
class Calibration:
    """floor: mean divergence of stock from dense, in nats; budget: n_sink, n_recent, n_selected of the measurement"""

    floor: float
    settings: tuple[Setting, ...]
    budget: tuple[int, int, int]


def choose(settings: Sequence[Setting], bound: float) -> tuple[Setting, bool]:
    """(the setting of the largest tolerance within a bound in nats, True), else (that of the smallest, False)."""
    settings = [s for s in settings if s.kv_read_share < 1] or settings  # what reads more than dense never pays
    within = [s for s in settings if s.kld_mean <= bound]
    if within:
        return max(within, key=lambda s: s.tolerance), True
    return min(settings, key=lambda s: s.tolerance), False


def parse(text: str) -> float | str:
    """What ``--fidelity`` takes: nats, or ``floor``. Raises ArgumentError."""
    try:
        return check(text if text == FLOOR else float(text))
    except ValueError:
        raise ArgumentError(f"The fidelity is {text!r}: give the divergence from dense that you allow, in nats, e.g. 0.004, or "
                            f"{FLOOR}.") from None


def check(fidelity: float | str) -> float | str:
    """Return it, or raise ArgumentError."""
    if fidelity in (FLOOR, DEFAULT) or not isinstance(fidelity, str) and 0 < fidelity < math.inf:
        return fidelity
    raise ArgumentError(f"The fidelity is {fidelity!r}: give a number of nats above 0, e.g. 0.004, or {FLOOR!r}.")


def params_for(params: SfiParams, path: Path, type_k: str, type_v: str, fidelity: float | str | None) -> tuple[SfiParams, str]:
    """(the parameters with the tolerance for a fidelity, a sentence if it is not what was asked for, else "").

    fidelity: nats, FLOOR, DEFAULT, or None: the parameters stay as they are
    Raises ArgumentError (a fidelity or a policy that cannot be meant), InputError (no calibration).
    """
    if fidelity is None or check(fidelity) == DEFAULT and params.policy != "sketch":
        return params, ""
    if params.policy != "sketch":
        raise ArgumentError(f"A fidelity is reached by the tolerance of policy sketch, which policy {params.policy} has not: "
                            f"choose one of the two.")
    found = recall(path, type_k, type_v, params)
    if found is None:
        if fidelity == DEFAULT:
            return params, ""
        raise InputError(f"{path.name} is not calibrated with this version and these settings, so no tolerance is known for a "
                         f"fidelity: run `{command_for(path, type_k, params)}` once, or give --tolerance instead.")
    bound = found.floor if isinstance(fidelity, str) else float(fidelity)
    chosen, reached = choose(found.settings, bound)
    note = "" if fidelity == DEFAULT else _note(chosen, reached, bound, params, found)
    return params.replace(tolerance=chosen.tolerance), note


def _note(chosen: Setting, reached: bool, bound: float, params: SfiParams, found: Calibration) -> str:
    """What the user must know about a fidelity that was asked for."""
    if not reached:
        return (f"No calibrated tolerance keeps the divergence from dense within {bound:.2g} nats: the smallest, "
                f"{chosen.tolerance:g}, is taken, which had {chosen.kld_mean:.2g}; mode dense has 0.")
    if _budget(params) != found.budget:
        return ("The calibration was measured with a budget of {} + {} + {} cells, not with the one given: measure what it does "
                "to the fidelity with `sfi-local eval`.".format(*found.budget))
    return ""


def command_for(path: Path, kv_type: str, params: SfiParams) -> str:
    """The command that makes the calibration."""
    command = ["sfi-local", "calibrate", str(path)]
    if kv_type != "f16":
        command += ["--kv-type", kv_type]
    bits = [str(getattr(params, name)) for name in SKETCH_BITS]
    if set(bits) != {"0"}:
        command += ["--sketch-bits", f"{','.join(bits[:3])}:{','.join(bits[3:5])}:{bits[5]}"]
    if params.second_look != SfiParams.second_look:
        command += ["--second-look", f"{params.second_look:g}"]
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
    return Calibration(entry["floor"], tuple(Setting(**s) for s in entry["settings"]), tuple(entry["budget"]))


def remember(path: Path, kv_type: str, params: SfiParams, floor: float, settings: Sequence[Setting], **how: Any) -> None:
    """Keep a calibration in place of an older one. how: further fields, for people. Raises SfiError."""
    remembered.store(fidelity_file(), {
        "key": _key(path, kv_type, kv_type, params), **how, "floor": floor, "budget": list(_budget(params)),
        "settings": [asdict(s) for s in settings]}, _is_entry)


def _key(path: Path, type_k: str, type_v: str, params: SfiParams) -> dict[str, Any]:
    """What a calibration depends on; not the machine, whose rounding is within the noise floor."""
    return {**remembered.model_key(path), "type_k": type_k, "type_v": type_v,
            "sketch": {name: getattr(params, name) for name in (*SKETCH_BITS, "second_look")}}


def _budget(params: SfiParams) -> tuple[int, int, int]:
    return tuple(getattr(params, name) for name in BUDGET)


def _is_entry(e: dict[str, Any]) -> bool:
    fields = set(Setting.__dataclass_fields__)
    return (_is_share(e["floor"]) and len(e["budget"]) == 3 and all(isinstance(n, int) for n in e["budget"])
            and bool(e["settings"]) and all(set(s) == fields and all(map(_is_share, s.values())) for s in e["settings"]))


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float)) and 0 <= x < math.inf
