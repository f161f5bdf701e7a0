"""The depth from which mode ``auto`` is slow-fast: measured once per model, machine and settings, then remembered.

Steps of each kind are timed in a small context of its own at three depths, whose cells are repeated ones. Dense and
slow steps cost a line in the depth, fast steps do not depend on it; where the lines cross, slow-fast begins to pay.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_local.machine import available_memory, cache_dir
from sfi_local.params import SfiParams
from sfi_local.params import auto_depth as depth_by_rule

if TYPE_CHECKING:
    from sfi_local.model import Model
    from sfi_local.session import Session

ENV = "SFI_LOCAL_AUTO_DEPTH"  # cells: this depth instead of a measurement; 0: twice the budget
MEAN_SPAN = 20         # fast steps per slow step of the schedule on prose
GAIN = 0.03            # slow-fast must be faster than dense by this share
LIMIT_S = 2.5          # a measurement that would take longer is given up
ROUNDS = 6             # of one slow, two dense and two fast steps, at each depth
LEAST_DEPTH = 512      # below this a step's time says little about attention
PIECE = 16             # cells that are computed and repeated
MAX_ENTRIES = 200      # of the file
MAX_DEPTH = 1 << 24


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the fastest step of each kind at a depth."""

    depth: int
    dense: float
    slow: float
    fast: float


class _CannotMeasure(Exception):
    """Why the rule is used instead; a clause."""


def auto_depth_of(model: "Model", params: SfiParams, type_k: str, type_v: str) -> tuple[int, str]:
    """(depth in cells, how it was found), from the environment, the user's cache, a measurement or a rule. Never raises."""
    try:
        given = os.environ.get(ENV, "")
        if given.isdigit():
            return int(given) or depth_by_rule(params), f"{ENV} is {given}"
        key = _key(model, params, type_k, type_v)
        if (known := _entries(calibration_file()).get(key)) is not None:
            return known["auto_depth"], "measured before"
        timings = measure(model, params, type_k, type_v)
        depth = break_even(timings, params)
        remember(key, depth, timings)
        return depth, "measured"
    except Exception as error:  # a calibration must never make a run fail
        return depth_by_rule(params), f"not measured: {error}"


def break_even(timings: list[Timing], params: SfiParams) -> int:
    """The smallest depth at which the mean step of slow-fast is faster than a dense one; at least the budget."""
    span = min(MEAN_SPAN, params.max_span)
    dense, dense_slope = _line([(t.depth, t.dense) for t in timings])
    slow, slow_slope = _line([(t.depth, t.slow) for t in timings])
    fast = sum(t.fast for t in timings) / len(timings)
    per_span = (1 - GAIN) * (span + 1)
    gain = per_span * dense_slope - slow_slope
    if dense_slope <= 0 or gain <= 0:
        raise _CannotMeasure("the times of steps do not grow with the depth here")
    depth = (slow + span * fast - per_span * dense) / gain
    return int(min(MAX_DEPTH, max(params.budget, depth)))


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(height at 0, slope) of the least squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


# ---- measuring -------------------------------------------------------------------------------------------------------

def measure(model: "Model", params: SfiParams, type_k: str, type_v: str) -> list[Timing]:
    """Time steps at one, two and three times the budget, in a context that is freed again."""
    from sfi_local import kv_layout
    from sfi_local.session import Session

    deadline = time.perf_counter() + LIMIT_S
    params = params.replace(auto_depth=0, max_span=max(params.max_span, 5))
    depths = [i * max(LEAST_DEPTH, params.budget) for i in (1, 2, 3)]
    n_ctx = depths[-1] + 5 * ROUNDS
    available = available_memory()
    if available is not None and 2 * kv_layout.kv_bytes(kv_layout.layers(model.file), n_ctx, type_k, type_v) > available:
        raise _CannotMeasure("too little memory is left")
    session = Session(model._weights, n_ctx, "sfi", params, model.n_threads, type_k, type_v)
    try:
        token = (model.tokenize("the") or [0])[-1]
        session.prefill([token] * PIECE)
        return [_time_at(session, depth, token, deadline, LIMIT_S / 3) for depth in depths]
    finally:
        session.close()


def _time_at(session: "Session", depth: int, token: int, deadline: float, limit_s: float) -> Timing:
    from sfi_local import state_fill

    state_fill.fill(session._llama, session.context.ctx, depth)
    session.tokens[:] = [token] * depth
    start, best = time.perf_counter(), {"slow": float("inf"), "dense": float("inf"), "fast": float("inf")}
    for n_done in range(ROUNDS):
        for kind in ("slow", "dense", "fast", "dense", "fast"):
            info = session.step(token, lambda *_: kind)
            best[info.kind] = min(best[info.kind], info.t_ms)
            if time.perf_counter() > deadline:
                raise _CannotMeasure(f"the model is too slow to measure it in {LIMIT_S:g} s")
        if n_done and time.perf_counter() - start > limit_s / 2:
            break
    return Timing(depth, best["dense"], best["slow"], best["fast"])


# ---- remembering -----------------------------------------------------------------------------------------------------

def calibration_file() -> Path:
    """JSON: a list of entries, see remember(); a file that cannot be read counts as empty."""
    return cache_dir() / "auto.json"


def known() -> list[dict[str, Any]]:
    """All entries, the oldest first."""
    return list(_entries(calibration_file()).values())


def remember(key: str, depth: int, timings: list[Timing]) -> None:
    """Add an entry; the file is replaced as a whole. Raises OSError."""
    path = calibration_file()
    entries = {k: e for k, e in _entries(path).items() if k != key}
    entries[key] = {"key": json.loads(key), "auto_depth": depth, "date": time.strftime("%Y-%m-%d"),
                    "timings": [asdict(t) for t in timings]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(list(entries.values())[-MAX_ENTRIES:], indent=1), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """key -> entry; what is not an entry is left out."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        return {_spelled(e["key"]): e for e in items if 0 <= int(e["auto_depth"]) <= MAX_DEPTH}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _key(model: "Model", params: SfiParams, type_k: str, type_v: str) -> str:
    """What a measurement depends on."""
    from sfi_local.library import source_id
    from sfi_local.machine import cpu_name

    stat = model.path.stat()
    return _spelled({
        "model": str(model.path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns, "source_id": source_id(),
        "cpu": cpu_name(), "threads": model.n_threads, "type_k": type_k, "type_v": type_v, "support": params.support,
        "budget": [params.n_sink, params.n_recent, params.n_selected], "max_span": params.max_span})


def _spelled(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
