"""sfi-local bench: modes side by side, at several depths, on the same state; no time is shown before outputs matched."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import click

from sfi_local.cli.options import (
    COUNT,
    depth_list,
    force_option,
    gpu_option,
    low_memory_option,
    name_list,
    quality_option,
    set_options,
    take_params,
    threads_option,
)
from sfi_local.cli.progress import Runs
from sfi_local.cli.window import width_of
from sfi_local.errors import UsageError
from sfi_local.lab import checks
from sfi_local.lab.bench import report as bench_report
from sfi_local.lab.bench import wait
from sfi_local.lab.bench.session import PIECE, BenchSession, Decoded
from sfi_local.lab.checks import compare
from sfi_local.lab.facts import DEFAULT_TEXT, check_depth, facts, fetch, measured_text, params_facts, params_with_quality, read_bandwidth, text_tokens
from sfi_local.lab.other_work import OtherWork
from sfi_local.lab.tables import FORMATS, check_plot
from sfi_local.loading import load
from sfi_local.params import SfiParams
from sfi_local.runtime.settings import KV_TYPE, Settings
from sfi_local.store.layout import KV_TYPES
from sfi_local.tuning.auto_depth import auto_depth_of

MODES = ("stock", "dense", "frozen", "sfi", "exact", "auto")  # in the order in which they take turns


@click.command("bench", short_help="Measure modes side by side at several depths.")
@click.argument("model")
@click.option("--depth", "depths", default="0,2000", show_default=True, callback=depth_list, metavar="A,B",
              help="Tokens in the KV cache before the first step; 32k is 32768.")
@click.option("--modes", default="stock,dense,sfi", show_default=True, callback=name_list(MODES, "mode"), metavar="A,B",
              help=f"Of {', '.join(MODES)}.")
@click.option("--kv-type", "kv_types", callback=name_list(tuple(KV_TYPES), "KV type"),
              metavar="A,B", help=f"Types of K and V, of {', '.join(KV_TYPES)}.  [default: {KV_TYPE}]")
@low_memory_option
@click.option("-n", "--n", "n", type=COUNT, default=128, show_default=True, metavar="N",
              help="Steps per repetition.")
@click.option("--reps", type=COUNT, default=5, show_default=True, metavar="R",
              help="Repetitions of each mode, which take turns.")
@threads_option
@gpu_option
@force_option
@click.option("--text", metavar="FILE", help="The text that is decoded; - reads stdin [default: Python's own help topics].")
@click.option("--random", "random_tokens", is_flag=True, help="Random tokens instead of text, where boundaries mean nothing.")
@click.option("--fill", type=click.Choice(["prefill", "state"]), default="prefill", show_default=True,
              help="How the cache gets to its depth: a real prefill, or a short one whose cells are repeated.")
@click.option("--slow-every", type=COUNT, metavar="N",
              help="Every Nth step is slow, the first included, instead of the schedule.")
@click.option("--wait", is_flag=True, help="Also what one waits for: the prompt, the first token of three questions, 300 tokens.")
@set_options()
@quality_option
@click.option("-o", "--output", "output", type=click.Choice(list(FORMATS)), default="table", show_default=True)
@click.option("--plot", metavar="FILE", help="Draw tokens/s against depth into FILE.png, .svg or .pdf.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def command(**options: Any) -> None:
    """Measure the decoding speed of MODEL in several modes.

    \b
    sfi-local bench smollm2-135m --depth 0,2000,8000
    sfi-local bench smollm2-135m --depth 8000 --kv-type f16,q8_0 --modes stock,sfi -o json
    sfi-local make-model --shape qwen3-0.6b -o random.gguf
    sfi-local bench random.gguf --depth 32k --fill state --slow-every 24 -n 48

    All modes decode the same text from the same KV cache, by turns (stock, dense, sfi, stock ...), and the medians are
    shown. First their outputs are compared: dense with stock, slow steps with dense ones, and that fast steps did read
    less; where that fails, no time is shown. Mode exact decodes the greedy text that follows, not the given one; it must
    give the tokens of dense steps.

    ceiling is tokens/s of stock at depth 0 over tokens/s of stock at that depth: what a step can gain at most when
    attention costs nothing. --wait adds what a person waits for, each mode loaded as `run` would load it, in processes of their own: tokens/s
    of the prompt, seconds to the first token of a first question, of another in the same process and of a third in a new one, and to
    the end of an answer of 300 tokens. A ! marks rows during which other programs took more than a tenth of the CPUs' time. In a window
    too narrow for all columns the least telling ones are left out; -o md, json and csv have all. GB/s counts weights and the
    K and V that were read once per step; KV GB/s, for stock and dense, is K and V over the time that a step takes beyond one of stock at depth 0.
    """
    asked = take_params(options)
    output, plot = options.pop("output"), options.pop("plot")
    options["kv_types"] = options["kv_types"] or (Settings(low_memory=options["low_memory"]).type_k,)
    request = BenchPlan(**options, params=asked.asked_params, asked=asked)
    if request.wait and (request.random_tokens or request.fill == "state"):
        raise UsageError("--wait asks about a text: leave out --random and --fill state.")
    if request.wait and request.low_memory:
        raise UsageError("--wait measures texts that are kept in memory, and --low-memory keeps none there: leave one of them out.")

    if plot:
        check_plot(plot)
    rows = measure(request)
    click.echo(bench_report.show(output, rows, width_of(sys.stdout) if sys.stdout.isatty() else None))
    if plot:
        bench_report.plot(rows, plot)


@dataclass(frozen=True)
class BenchPlan:
    """What was asked for; the options of the command by their names."""

    model: str
    depths: tuple[int, ...]
    modes: tuple[str, ...]
    kv_types: tuple[str, ...]
    n: int
    reps: int
    threads: int | None
    text: str | None
    random_tokens: bool
    fill: str
    slow_every: int | None
    verbose: bool
    params: SfiParams
    wait: bool = False
    asked: Settings | None = None
    gpu_layers: int | None = None
    force: bool = False
    low_memory: bool = False

    @property
    def need(self) -> int:
        """Cells of the context."""
        return self.depths[-1] + self.n

    @property
    def cases(self) -> list[tuple[int, tuple[str, ...]]]:
        """(depth, modes) to measure; stock at depth 0 is the ceiling of all others."""
        extra = [(0, ("stock",))] if "stock" in self.modes and 0 not in self.depths else []
        return extra + [(depth, self.modes) for depth in self.depths]

    @property
    def loaded_for(self) -> str:
        """The mode whose weights all modes compute with: stock's lie in an order of their own, by which batches may be rounded otherwise."""
        return "exact" if "exact" in self.modes and "stock" not in self.modes else "stock"

    @property
    def n_runs(self) -> int:
        return sum(len(modes) for _, modes in self.cases) * len(self.kv_types) * self.reps


def measure(request: BenchPlan) -> list[dict[str, Any]]:
    """All rows, see row(). Raises InputError, CheckError, and what loading a model raises."""
    path = fetch(request.model)
    check_depth(path, request.depths[-1], request.n)
    settled = {kv_type: with_quality(request, path, kv_type) for kv_type in request.kv_types}
    widest = max(request.kv_types, key=KV_TYPES.get)
    with Runs(request.n_runs) as bar, load(path, mode=request.loaded_for, n_ctx=request.need, n_threads=request.threads, type_k=widest,
                                    type_v=widest, gpu_layers=request.gpu_layers,
                                    force=request.force, cache=False, low_memory=request.low_memory, verbose=request.verbose) as model:
        facts, tokens = run_facts(request, model), take_tokens(request, model)
        rows = []
        for kv_type in request.kv_types:
            fitted = replace(request, params=fit_params(settled[kv_type], model, kv_type))
            rows += measure_kv_type(fitted, model, kv_type, tokens, facts, bar)
        return rows


def with_quality(request: BenchPlan, path: Any, kv_type: str) -> BenchPlan:
    """With the tolerance for the quality. Raises InputError where the model is not calibrated."""
    return replace(request, params=params_with_quality(request.params, path, kv_type, request.asked))


def measure_kv_type(request: BenchPlan, model: Any, kv_type: str, tokens: list[int], facts: dict, bar: Any) -> list[dict]:
    """The rows of one KV type, all in one context."""
    measured = []
    with BenchSession(model, request.need + 1, request.params, kv_type, tokens, request.fill) as session:
        for depth, modes in request.cases:
            session.go_to(depth, bar.filling)
            bar.say(f"{kv_type} @ {depth}: checking")
            checks = check_outputs(session, modes, request)
            greedy = session.greedy(request.n) if "exact" in modes else []
            turns = {mode: [] for mode in modes}
            for rep in range(request.reps):
                for mode in modes:
                    bar.say(f"{kv_type} @ {depth}: {mode}, {rep + 1} of {request.reps}")
                    others = OtherWork()
                    decoded = session.decode(mode, request.n, request.slow_every, params_of(mode, request))
                    turns[mode].append(replace(decoded, other_work=others.share()))
                    check_kinds(turns[mode][-1], mode, depth, request, greedy)
                    bar.advance()
            measured.append((depth, turns, checks))
    rows = [row(mode, depth, turns, measured, checks, {**facts, **params_facts(params_of(mode, request))}, kv_type, session)
            for depth, turns, checks in measured for mode in turns]
    return [{**r, **wait_of(r, request, model, bar)} for r in rows]


def wait_of(row: dict[str, Any], request: BenchPlan, model: Any, bar: Any) -> dict[str, Any]:
    """The wait of a row's mode at its depth, where it was asked for and a command has the mode; see wait.measure."""
    if not request.wait or not row["depth"] or row["mode"] == "frozen":
        return wait.NONE
    bar.say(f"{row['kv_type']} @ {row['depth']}: {row['mode']}, the wait")
    return wait.measure(model.path, row["mode"], row["kv_type"], row["depth"], measured_text(request.text)[0], model.n_threads,
                        params_of(row["mode"], request))


# ---- what is decoded -------------------------------------------------------------------------------------------------

def fit_params(request: BenchPlan, model: Any, kv_type: str) -> SfiParams:
    """The parameters of the run: a budget that fits the context, spans as long as --slow-every, the depth of auto."""
    params = request.params
    if request.asked is None or request.asked.fits_budget:
        params = params.fit_context(request.need)
    elif "sfi" in request.modes:
        params.check_context(request.need)
    if request.slow_every and params.refreshes:
        params = params.replace(max_span=max(params.max_span, request.slow_every))
    if "auto" in request.modes:
        params = params.replace(auto_depth=auto_depth_of(model, params, kv_type, kv_type)[0])
    return params


def take_tokens(request: BenchPlan, model: Any) -> list[int]:
    """The tokens of the text, enough for the deepest case; random ones if asked. Raises InputError."""
    need = request.need if request.fill == "prefill" else min(request.depths[-1], PIECE) + request.n
    if request.random_tokens:
        return _random_tokens(model.weights.n_vocab(), need)
    return text_tokens(model, *measured_text(request.text), need, f"--depth {request.depths[-1]} with -n {request.n} takes",
                       "lower --depth, or use --fill state")


def _random_tokens(n_vocab: int, n: int) -> list[int]:
    import random

    rng = random.Random(0)
    return [rng.randrange(n_vocab) for _ in range(n)]


# ---- outputs before times --------------------------------------------------------------------------------------------

N_CHECKED = 8         # steps whose logits are compared
# nats; what two correct kernels of different rounding may differ by. Repeated cells are a state that no text leads to,
# in which a model amplifies rounding
MAX_KL = {"prefill": 0.02, "state": 0.1}
MAX_KL_SLOW = 0.002   # slow and dense steps run the same kernel


def check_outputs(session: "BenchSession", modes: tuple[str, ...], request: BenchPlan) -> dict[str, float]:
    """Compare the logits of the modes; returns the mean KL of each comparison. Raises CheckError."""
    engines = [mode for mode in modes if mode != "stock"]
    if not engines:
        return {}
    n = min(request.n, N_CHECKED)
    dense = session.logits("dense", n)
    found = {"kl_dense_stock": compare("dense", dense, "stock", session.logits("stock", n), MAX_KL[request.fill])}
    if "sfi" in engines:
        slow = session.logits("sfi", n, lambda *_: "slow")
        found["kl_slow_dense"] = compare("sfi with every step slow", slow, "dense", dense, MAX_KL_SLOW)
    if "frozen" in engines:
        slow = session.logits("sfi", n, lambda *_: "slow", params_of("frozen", request))
        compare("frozen with every step slow", slow, "dense", dense, MAX_KL_SLOW)
    return found


def params_of(mode: str, request: BenchPlan) -> SfiParams:
    """Mode frozen is mode sfi with another policy, beside the one asked for."""
    if mode != "frozen":
        return request.params
    params = SfiParams.of("frozen").fit_context(request.need)
    return params.replace(max_span=max(params.max_span, request.slow_every or 0))


def check_kinds(decoded: "Decoded", mode: str, depth: int, request: BenchPlan, greedy: list[int]) -> None:
    """Raise CheckError where a mode did not do the steps it stands for; greedy: the tokens of dense steps."""
    params = params_of(mode, request)
    budget, auto = params.budget, params.auto_depth
    if mode == "exact":
        checks.same_tokens(decoded, greedy)
    elif mode in ("stock", "dense") or mode == "auto" and depth + request.n <= auto:
        checks.only(decoded, mode if mode != "auto" else "dense")
    elif mode in ("frozen", "sfi") or depth > auto:
        checks.slow_and_fast(decoded, budget, depth, request.slow_every if params.refreshes else None)


# ---- rows ------------------------------------------------------------------------------------------------------------

def row(mode: str, depth: int, turns: dict[str, list], measured: list, checks: dict, facts: dict, kv_type: str,
        session: "BenchSession") -> dict[str, Any]:
    """One mode at one depth; times in milliseconds, rates in tokens or 1e9 bytes per second, shares and ratios in 1.

    decode_tps is the median of the repetitions, spread (largest - smallest) / median of them, other_work the largest share of the
    CPUs' time that other programs took in one of them; accepted: share of the drafted tokens that was kept, verify_cost: a pass over 8
    tokens in dense steps, both of mode exact; ratios are medians of
    the ratios of the repetitions that followed each other; ms_* are medians over all steps of that kind.
    """
    mine, stock, dense = turns[mode], turns.get("stock"), turns.get("dense")
    rates = [d.tps for d in mine]
    tps = median(rates)
    origin = next((t["stock"] for d, t, _ in measured if d == 0 and "stock" in t), None)
    kv_bytes = median(d.kv_bytes for d in mine)
    beyond = _median_ms(mine) - _median_ms(origin) if origin and depth and mode in ("stock", "dense") else 0.0
    return {
        "model": facts["model"], "kv_type": kv_type, "depth": depth, "mode": mode, "decode_tps": tps,
        "spread": (max(rates) - min(rates)) / tps if len(rates) > 1 else None, "tps_reps": rates,
        "other_work": max((d.other_work for d in mine if d.other_work is not None), default=None), "ms_step": _median_ms(mine),
        "ms_slow": _median_ms(mine, "slow"), "ms_fast": _median_ms(mine, "fast"), "steps": _steps(mine),
        "reasons": mine[0].reasons, "n_drafted": mine[0].n_drafted, "n_accepted": mine[0].n_accepted,
        "drafted_by_ngrams": list(mine[0].by_ngrams), "accepted": mine[0].n_accepted / mine[0].n_drafted if mine[0].n_drafted else None,
        "verify_cost": mine[-1].verify_cost, "kv_read_share": median(d.kv_read_share for d in mine),
        "ratio_to_stock": _ratio(mine, stock), "ratio_to_dense": _ratio(mine, dense),
        "ceiling": median(d.tps for d in origin) / median(d.tps for d in stock) if origin and stock else None,
        "gbps": (facts["weight_bytes"] + kv_bytes) * tps / 1e9,
        "kv_gbps": kv_bytes / beyond / 1e6 if beyond > 0 else None,
        **checks, **{name: value for name, value in facts.items() if name not in ("model", "weight_bytes")},
    }


def run_facts(request: BenchPlan, model: Any) -> dict[str, Any]:
    """What is the same in all rows; read_bandwidth in 1e9 bytes per second, weight_bytes read per step."""
    return {
        **facts(request.model, model), "weight_bytes": weight_bytes(model), "fill": request.fill,
        "text": "random tokens" if request.random_tokens else request.text or DEFAULT_TEXT,
        "n": request.n, "reps": request.reps, "slow_every": request.slow_every,
        "read_bandwidth": read_bandwidth(model.n_threads) / 1e9,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: all tensors, but of a separate token embedding one row."""
    import gguf

    tensors = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(model.path).tensors}
    total = sum(tensors.values())
    return total - tensors.get("token_embd.weight", 0) if "output.weight" in tensors else total


def _median_ms(runs: list, kind: str | None = None) -> float | None:
    times = [ms for run in runs for k, ms in zip(run.kinds, run.ms) if kind in (None, k)]
    return median(times) if times else None


def _steps(runs: list) -> dict[str, int]:
    """Steps of each kind in one repetition; they are the same in all of them, or the run was refused."""
    return {kind: runs[0].kinds.count(kind) for kind in ("slow", "fast", "dense", "stock")}


def _ratio(mine: list, other: list | None) -> float | None:
    return median(a.tps / b.tps for a, b in zip(mine, other)) if other else None
