"""What settings come to for one model: parameters, mode, and what is said about them. A pure function of what was asked and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfi_local.errors import InputError
from sfi_local.params import BUDGET, SfiParams
from sfi_local.runtime.settings import CLOSE, FAST, SAME, Quality, Settings
from sfi_local.tuning.tolerance import Calibration, Setting, choose, command_for

FASTER = 5  # times the divergence of quality close, or its tolerance


@dataclass(frozen=True)
class Taken:
    """params:      for a context that is large enough
    portable:    instead of them, where a device lacks the operations of their policy; None: nothing
    fits_budget: the budget may be made smaller where the context is
    quality:     how close to dense that is, in words; "" where nothing says it
    notes:       what the user must know, in sentences
    """

    mode: str
    params: SfiParams
    portable: SfiParams | None
    fits_budget: bool
    quality: str = ""
    notes: tuple[str, ...] = ()


def take(asked: Settings, path: Path, found: Calibration | None, exact_works: bool = True) -> Taken:
    """What is taken for a model file, found being its calibration. Raises InputError where there is none and one was asked for.

    exact_works: the model and its devices can have mode exact; otherwise llama.cpp's own decoding is what is the same as dense
    """
    mode, params, quality = asked.mode, asked.asked_params, ""
    notes: tuple[str, ...] = ()
    if asked.quality == SAME and mode == "auto":
        mode = "exact" if exact_works else "stock"
    if mode in ("exact", "dense", "stock"):
        quality = SAME
    elif asked.chooses_tolerance:
        params, quality, note = with_quality(params, asked.quality, path, asked.type_k, found)
        notes = (note,) if note else ()
    return Taken(mode, params, asked.portable_params, asked.fits_budget, quality, notes)


def with_quality(params: SfiParams, quality: Quality | None, path: Path, type_k: str,
                 found: Calibration | None) -> tuple[SfiParams, str, str]:
    """(parameters with the tolerance for a quality, the quality in words, a sentence if it is not what was asked for)."""
    strict = quality not in (None, CLOSE, FAST)
    if found is None:
        if strict:
            raise InputError(f"{path.name} is not calibrated with this version and these settings, so no tolerance is known for a "
                             f"divergence: run `{command_for(path, type_k, params)}` once, or choose quality {CLOSE} or {FAST}.")
        factor = FASTER if quality == FAST else 1
        return params.replace(tolerance=factor * params.tolerance), f"{quality or CLOSE} (not calibrated)", ""
    bound = found.floor * (FASTER if quality == FAST else 1) if isinstance(quality, str) or quality is None else float(quality)
    chosen, reached = choose(found.settings, bound)
    word = f"{quality or CLOSE}" if isinstance(quality, str) or quality is None else f"within {quality:g} nats"
    when = f"calibrated {found.date[:10]}" if found.date else "calibrated"
    note = _note(chosen, reached, bound, params, found) if strict else ""
    return params.replace(tolerance=chosen.tolerance), f"{word} ({when})", note


def _note(chosen: Setting, reached: bool, bound: float, params: SfiParams, found: Calibration) -> str:
    """What the user must know about a divergence that was asked for."""
    if not reached:
        return (f"No calibrated tolerance keeps the divergence from dense within {bound:.2g} nats: the smallest, "
                f"{chosen.tolerance:g}, is taken, which had {chosen.kld_mean:.2g}; quality {SAME} has 0.")
    if tuple(getattr(params, name) for name in BUDGET) != found.budget:
        return ("The calibration was measured with a budget of {} + {} + {} cells, not with the one given: measure what it does "
                "to the fidelity with `sfi-local eval`.".format(*found.budget))
    return ""

