"""The depth from which mode ``auto`` is slow-fast: measured once per model, machine and settings, then remembered.

Steps of each kind are timed in a small context of its own at two depths, whose cells are repeated ones. Dense and
slow steps cost a line in the depth, fast steps do not depend on it; where the lines cross, slow-fast begins to pay. While other
programs keep the processor busy nothing is measured: what they do to the time of a step says nothing about tomorrow.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sfi_local.binding import gpu, state_fill
from sfi_local.binding.context import maker
from sfi_local.errors import SfiError
from sfi_local.machine import available_memory, cache_dir, cpu_name, usable_cpus
from sfi_local.params import SfiParams
from sfi_local.params import auto_depth as depth_by_rule
from sfi_local.runtime.memory import ContextCost, by_metadata
from sfi_local.runtime.model import Model
from sfi_local.runtime.slot import Slot
from sfi_local.store import layout
from sfi_local.tuning import remembered

ENV = "SFI_LOCAL_AUTO_DEPTH"  # cells: this depth instead of a measurement; 0: twice the budget
MEAN_SPAN = 20         # fast steps per slow step of the schedule on prose
GAIN = 0.03            # slow-fast must be faster than dense by this share
LIMIT_S = 2.5          # a measurement that would take longer is given up
GPU_LIMIT_S = 8.0      # ... where a deep context has to be filled and its sketch made
ROUND = ("slow", "auto", "fast", "auto", "fast")  # auto: dense, see Timing
ROUNDS = 6             # at each depth, if there is time
MAX_BYTES = 256 << 20  # of K and V that are filled for a measurement
LEAST_DEPTH = 512      # below this the time of a step says little about attention
LEAST_AUTO_DEPTH = 128 # of a policy without slow steps: the cells of its window
LEAST_CPU = 0.65       # of the time of the CPUs at work must be ours: 0.85 to 0.95 on an idle machine, 0.5 beside a program that computes
GPU_DEPTH = 16384      # cells; a GPU reads a few thousand in no time that one could measure
GPU_SHARE = 0.5        # of its free memory, what a measurement may take
PIECE = 16             # cells that are computed and repeated
MAX_DEPTH = 1 << 24


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the fastest step of each kind at a depth; dense: as mode auto takes it below its depth."""

    depth: int
    dense: float
    slow: float
    fast: float


class _CannotMeasure(Exception):
    """Why the rule is used instead; a clause."""


def auto_depth_of(model: "Model", params: SfiParams, type_k: str, type_v: str, anew: bool = False) -> tuple[int, str]:
    """(depth in cells, how it was found), from the environment, the user's cache, a measurement or a rule. Never raises.

    anew: whatever the cache holds
    """
    try:
        given = os.environ.get(ENV, "")
        if given.isdigit():
            return int(given) or _rule(model, params), f"{ENV} is {given}"
        key = _key(model, params, type_k, type_v)
        entry = None if anew else remembered.entries(calibration_file(), _is_entry).get(remembered.spelled(key))
        if entry and entry["timings"]:
            return entry["auto_depth"], "measured before"
        if entry and entry["date"] == _today():
            return _rule(model, params), f"not measured: {entry['why']}"
        return _measure_and_remember(key, model, params, type_k, type_v)
    except Exception as error:  # a calibration must never make a run fail
        return _rule(model, params), f"not measured: {error}"


def _measure_and_remember(key: dict[str, Any], model: "Model", params: SfiParams, type_k: str,
                          type_v: str) -> tuple[int, str]:
    """A measurement that fails is not tried again before tomorrow."""
    try:
        timings = measure(model, params, type_k, type_v)
        depth = break_even(timings, params)
    except _CannotMeasure as error:
        remember(key, _rule(model, params), [], str(error))
        raise
    try:
        remember(key, depth, timings)
    except SfiError:
        pass  # a cache that cannot be written: measured again next time
    return depth, "measured"


def _rule(model: "Model", params: SfiParams) -> int:
    """The depth where nothing was measured; of a GPU, on which attention is a small part of a step below some thousand cells, a later one."""
    return max(depth_by_rule(params), GPU_DEPTH if model.kv_gpus else 0)


def break_even(timings: list[Timing], params: SfiParams) -> int:
    """The smallest depth at which the mean step of slow-fast is faster than a dense one; at least the budget."""
    if not params.refreshes:
        return _break_even_without_slow_steps(timings)
    span = min(MEAN_SPAN, params.max_span)
    dense, dense_slope = _line([(t.depth, t.dense) for t in timings])
    slow, slow_slope = _line([(t.depth, t.slow) for t in timings])
    fast = median(t.fast for t in timings if t.depth >= params.budget)
    per_span = (1 - GAIN) * (span + 1)
    gain = per_span * dense_slope - slow_slope
    if dense_slope <= 0 or gain <= 0:
        raise _CannotMeasure("the times of steps do not grow with the depth here")
    depth = (slow + span * fast - per_span * dense) / gain
    return int(min(MAX_DEPTH, max(params.budget, depth)))


def _break_even_without_slow_steps(timings: list[Timing]) -> int:
    """... where every step is fast, and its time grows with the depth too."""
    dense, dense_slope = _line([(t.depth, t.dense) for t in timings])
    fast, fast_slope = _line([(t.depth, t.fast) for t in timings])
    gain = (1 - GAIN) * dense_slope - fast_slope
    if dense_slope <= 0 or gain <= 0:
        raise _CannotMeasure("the times of steps do not grow with the depth here")
    return int(min(MAX_DEPTH, max(LEAST_AUTO_DEPTH, (fast - (1 - GAIN) * dense) / gain)))


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(height at 0, slope) of the least squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


# ---- measuring -------------------------------------------------------------------------------------------------------

def measure(model: "Model", params: SfiParams, type_k: str, type_v: str) -> list[Timing]:
    """Time steps at two depths, in a context that is freed again."""
    limit = GPU_LIMIT_S if model.kv_gpus else LIMIT_S
    deadline = time.perf_counter() + limit
    depths = _depths(model, params, type_k, type_v)
    longest = max(params.max_span, ROUND.count("fast")) if params.refreshes else 0
    params = params.replace(auto_depth=MAX_DEPTH, max_span=longest)
    kv_host = bool(model.gpus) and not model.kv_gpus
    slot = Slot(maker(model.weights, model.n_threads, type_k, type_v, kv_host=kv_host), depths[-1] + len(ROUND) * ROUNDS, "sfi", params)
    try:
        slot.set_auto_depth(params.auto_depth)  # mode sfi leaves it out
        token = (model.tokenize("the") or [0])[-1]
        slot.prefill([token] * PIECE)
        n_cpus = 0 if model.kv_gpus else min(model.n_threads, len(usable_cpus()))
        return [_time_at(slot, depth, token, (deadline, limit), n_cpus) for depth in depths]
    finally:
        slot.close()


def _depths(model: "Model", params: SfiParams, type_k: str, type_v: str) -> list[int]:
    """Where to measure: far apart, but where the deeper one would take long to fill or more memory than there is."""
    unit, layers = max(2 * LEAST_DEPTH, params.budget), layout.layers(model.file)
    if model.kv_gpus:
        return _gpu_depths(unit, ContextCost(by_metadata(model.file, layers, type_k, type_v), layers, type_k, type_v, params))
    available = available_memory()
    if available is not None and 2 * layout.kv_bytes(layers, unit, type_k, type_v) > available:
        raise _CannotMeasure("too little memory is left")
    return [unit // 2, 2 * unit if layout.kv_bytes(layers, 2 * unit, type_k, type_v) <= MAX_BYTES else unit]


def _gpu_depths(unit: int, cost: ContextCost) -> list[int]:
    """The same for layers on GPUs."""
    deep = min(max(2 * unit, GPU_DEPTH), cost.cells(int(GPU_SHARE * sum(g.free for g in gpu.gpus()))))
    if deep < 2 * unit:
        raise _CannotMeasure("too little memory is left on the GPU")
    return [deep // 4, deep]


def _time_at(slot: Slot, depth: int, token: int, until: tuple[float, float], n_cpus: int) -> Timing:
    """Rounds at one depth: several if there is time, the first three steps at least.

    until:  when the measurement must end, and the seconds that it has in all
    n_cpus: that the threads can keep busy; 0 where they mostly wait for a GPU
    """
    state_fill.fill(slot.context.ctx, depth)
    slot.tokens[:] = [token] * depth
    start, cpu = time.perf_counter(), time.process_time()
    deadline, limit = until
    end = min(deadline, start + limit / 3)
    best = {"slow": float("inf"), "dense": float("inf"), "fast": float("inf")}
    for kind in ROUND * ROUNDS:
        info = slot.step(token, lambda *_: kind)
        best[info.kind] = min(best[info.kind], info.t_ms)
        whole = max(best.values()) < float("inf")
        if whole and time.perf_counter() > end:
            break
        if not whole and time.perf_counter() > deadline:
            raise _CannotMeasure(f"the model is too slow to measure it in {limit:g} s")
    used, passed = time.process_time() - cpu, time.perf_counter() - start
    if used < LEAST_CPU * n_cpus * passed:
        raise _CannotMeasure("other programs kept the processor busy")
    return Timing(depth, best["dense"], best["slow"], best["fast"])


# ---- remembering -----------------------------------------------------------------------------------------------------

def calibration_file() -> Path:
    """JSON, see remembered; of an entry see remember()."""
    return cache_dir() / "auto.json"


def known() -> list[dict[str, Any]]:
    """All entries, the oldest first."""
    return list(remembered.entries(calibration_file(), _is_entry).values())


def remember(key: dict[str, Any], depth: int, timings: list[Timing], why: str = "") -> None:
    """Add an entry; without timings ``why`` says why there are none. Raises SfiError where it cannot be written."""
    remembered.store(calibration_file(), {"key": key, "auto_depth": depth, "date": _today(), "why": why,
                                          "timings": [asdict(t) for t in timings]}, _is_entry)


def forget(path: Path | None) -> int:
    """Remove what was measured for a model file, None: for all; how many entries. Raises SfiError where the file cannot be written."""
    return remembered.forget(calibration_file(), path, _is_entry)


def _is_entry(e: dict[str, Any]) -> bool:
    return (0 < e["auto_depth"] <= MAX_DEPTH and isinstance(e["timings"], list) and isinstance(e["why"], str)
            and isinstance(e["date"], str))


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _key(model: "Model", params: SfiParams, type_k: str, type_v: str) -> dict[str, Any]:
    """What a measurement depends on."""
    attends = {"dense": "stock"} if model.kv_gpus else {"kv": "host"}
    on_gpu = {"gpu": model.gpus, "gpu_layers": model.gpu_layers, **attends} if model.gpus else {}
    return {**remembered.model_key(model.path), "cpu": cpu_name(), "threads": model.n_threads, "type_k": type_k,
            "type_v": type_v, "budget": params.budget, "params": {**asdict(params), "auto_depth": 0}, **on_gpu}
