"""sfi-local bench: modes side by side, at several depths, on the same state; no time is shown before outputs matched."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from sfi_local.errors import InputError, UsageError
from sfi_local.kv_layout import KV_TYPES
from sfi_local.options import sfi_options, take_params
from sfi_local.params import SfiParams

if TYPE_CHECKING:
    from sfi_local.bench_session import BenchSession, Decoded

MODES = ("stock", "dense", "sfi", "exact", "auto")  # in the order in which they take turns
FORMATS = ("table", "md", "json", "csv")


def _items(allowed: tuple[str, ...], what: str) -> Any:
    """A callback that parses a list of names."""
    def parse(ctx: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.3)
                meant = f" did you mean {near[0]}?" if near else ""
                raise UsageError(f"There is no {what} {name!r}:{meant} There are {', '.join(allowed)}.")
        if not names:
            raise UsageError(f"{option.opts[0]} is empty: give one or more of {', '.join(allowed)}.")
        return tuple(name for name in allowed if name in names)
    return parse


def _depths(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Depths in ascending order; 32k is 32768."""
    depths = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(k?)\s*", item, re.I)
        if not match:
            raise UsageError(f"{item.strip()!r} is not a depth: write e.g. --depth 0,2000,8000 or --depth 32k (32768).")
        depths.add(int(match[1]) * (1024 if match[2] else 1))
    return tuple(sorted(depths))


@click.command("bench", short_help="Measure modes side by side at several depths.")
@click.argument("model")
@click.option("--depth", "depths", default="0,2000", show_default=True, callback=_depths, metavar="A,B",
              help="Tokens in the KV cache before the first step; 32k is 32768.")
@click.option("--modes", default="stock,dense,sfi", show_default=True, callback=_items(MODES, "mode"), metavar="A,B",
              help=f"Of {', '.join(MODES)}.")
@click.option("--kv-type", "kv_types", default="f16", show_default=True, callback=_items(tuple(KV_TYPES), "KV type"),
              metavar="A,B", help=f"Types of K and V, of {', '.join(KV_TYPES)}.")
@click.option("-n", "--n", "n", type=click.IntRange(1), default=128, show_default=True, metavar="N",
              help="Steps per repetition.")
@click.option("--reps", type=click.IntRange(1), default=5, show_default=True, metavar="R",
              help="Repetitions of each mode, which take turns.")
@click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads [default: one per core].")
@click.option("--text", metavar="FILE", help="The text that is decoded; - reads stdin [default: Python's own help topics].")
@click.option("--random", "random_tokens", is_flag=True, help="Random tokens instead of text, where boundaries mean nothing.")
@click.option("--fill", type=click.Choice(["prefill", "state"]), default="prefill", show_default=True,
              help="How the cache gets to its depth: a real prefill, or a short one whose cells are repeated.")
@click.option("--slow-every", type=click.IntRange(1), metavar="N",
              help="Every Nth step is slow, the first included, instead of the schedule.")
@sfi_options
@click.option("-o", "--output", "output", type=click.Choice(FORMATS), default="table", show_default=True)
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
    attention costs nothing. GB/s counts weights and the K and V that were read once per step; KV GB/s, for stock and
    dense, is K and V over the time that a step takes beyond one of stock at depth 0.
    """
    params, fit_budget = take_params(options)
    output, plot = options.pop("output"), options.pop("plot")
    request = Request(**options, params=params, fit_budget=fit_budget)
    from sfi_local import bench_report

    if plot:
        bench_report.check_plot(plot)
    rows = measure(request)
    click.echo(bench_report.FORMATS[output](rows))
    if plot:
        bench_report.plot(rows, plot)


@dataclass(frozen=True)
class Request:
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
    fit_budget: bool

    @property
    def need(self) -> int:
        """Cells of the context."""
        return self.depths[-1] + self.n

    @property
    def cases(self) -> list[tuple[int, tuple[str, ...]]]:
        """(depth, modes) to measure; stock at depth 0 is the ceiling of all others."""
        extra = [(0, ("stock",))] if "stock" in self.modes and 0 not in self.depths else []
        return extra + [(depth, self.modes) for depth in self.depths]


def measure(request: Request) -> list[dict[str, Any]]:
    """All rows, see row(). Raises InputError, CheckError, and what loading a model raises."""
    from sfi_local.model import load
    from sfi_local.progress import Progress
    from sfi_local.run import resolve_noted

    with Progress("fetching", "bytes") as fetching:
        path = resolve_noted(request.model, fetching)
    check_depth(path, request)
    widest = max(request.kv_types, key=KV_TYPES.get)
    with _Bar(request) as bar, load(path, mode="stock", n_ctx=request.need, n_threads=request.threads, type_k=widest,
                                    type_v=widest, verbose=request.verbose) as model:
        facts, tokens = run_facts(request, model), take_tokens(request, model)
        rows = []
        for kv_type in request.kv_types:
            fitted = replace(request, params=fit_params(request, model, kv_type))
            rows += measure_kv_type(fitted, model, kv_type, tokens, {**facts, **params_facts(fitted.params)}, bar)
        return rows


def measure_kv_type(request: Request, model: Any, kv_type: str, tokens: list[int], facts: dict, bar: Any) -> list[dict]:
    """The rows of one KV type, all in one context."""
    from sfi_local.bench_session import BenchSession

    measured = []
    with BenchSession(model, request.need, request.params, kv_type, tokens, request.fill) as session:
        for depth, modes in request.cases:
            session.go_to(depth, bar.filling)
            bar.say(f"{kv_type} @ {depth}: checking")
            checks = check_outputs(session, modes, request)
            greedy = session.greedy(request.n) if "exact" in modes else []
            turns = {mode: [] for mode in modes}
            for rep in range(request.reps):
                for mode in modes:
                    bar.say(f"{kv_type} @ {depth}: {mode}, {rep + 1} of {request.reps}")
                    turns[mode].append(session.decode(mode, request.n, request.slow_every))
                    check_kinds(turns[mode][-1], mode, depth, request, greedy)
                    bar.advance()
            measured.append((depth, turns, checks))
    return [row(mode, depth, turns, measured, checks, facts, kv_type, session)
            for depth, turns, checks in measured for mode in turns]


# ---- what is decoded -------------------------------------------------------------------------------------------------

def check_depth(path: Any, request: Request) -> None:
    """Refuse a depth that the model was not made for, before its weights are read."""
    from sfi_local.gguf_file import read_gguf

    trained = read_gguf(path).n_ctx_train
    if 0 < trained < request.need:
        raise InputError(f"--depth {request.depths[-1]} and -n {request.n} need a context of {request.need} tokens, and this "
                         f"model was trained on {trained}: lower --depth, or measure a model with random weights of the "
                         f"same shape (`sfi-local make-model`).")


def fit_params(request: Request, model: Any, kv_type: str) -> SfiParams:
    """The parameters of the run: a budget that fits the context, spans as long as --slow-every, the depth of auto."""
    params = request.params
    if request.fit_budget:
        params = params.fit_context(request.need)
    elif "sfi" in request.modes:
        params.check_context(request.need)
    if request.slow_every:
        params = params.replace(max_span=max(params.max_span, request.slow_every))
    if "auto" in request.modes:
        from sfi_local.calibrate import auto_depth_of

        params = params.replace(auto_depth=auto_depth_of(model, params, kv_type, kv_type)[0])
    return params


def take_tokens(request: Request, model: Any) -> list[int]:
    """The tokens of the text, enough for the deepest case; random ones if asked. Raises InputError."""
    from sfi_local.bench_session import PIECE

    need = request.need if request.fill == "prefill" else min(request.depths[-1], PIECE) + request.n
    if request.random_tokens:
        return _random_tokens(model._weights.n_vocab(), need)
    text, source = default_text() if request.text is None else read_text(request.text)
    bos = model.tokenize("", add_bos=model.vocabulary.add_bos)
    tokens = bos + model.tokenize(text[:16 * need])
    if len(tokens) < need:
        tokens = bos + model.tokenize(text)
    if len(tokens) < need:
        raise InputError(f"The text ({source}) has {len(tokens)} tokens, and --depth {request.depths[-1]} with -n {request.n} "
                         f"takes {need}: give a longer one with --text, lower --depth, or use --fill state.")
    return tokens[:need]


def _random_tokens(n_vocab: int, n: int) -> list[int]:
    import random

    rng = random.Random(0)
    return [rng.randrange(n_vocab) for _ in range(n)]


def default_text() -> tuple[str, str]:
    """(text, name): English prose that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()), "Python's help topics"


def read_text(path: str) -> tuple[str, str]:
    from sfi_local import text_input

    return text_input.from_file(path), path


# ---- outputs before times --------------------------------------------------------------------------------------------

N_CHECKED = 8         # steps whose logits are compared
# nats; what two correct kernels of different rounding may differ by. Repeated cells are a state that no text leads to,
# in which a model amplifies rounding
MAX_KL = {"prefill": 0.02, "state": 0.1}
MAX_KL_SLOW = 0.002   # slow and dense steps run the same kernel


def check_outputs(session: "BenchSession", modes: tuple[str, ...], request: Request) -> dict[str, float]:
    """Compare the logits of the modes; returns the mean KL of each comparison. Raises CheckError."""
    from sfi_local.bench_check import compare

    engines = [mode for mode in modes if mode != "stock"]
    if not engines:
        return {}
    n = min(request.n, N_CHECKED)
    dense = session.logits("dense", n)
    found = {"kl_dense_stock": compare("dense", dense, "stock", session.logits("stock", n), MAX_KL[request.fill])}
    if "sfi" in engines:
        slow = session.logits("sfi", n, lambda *_: "slow")
        found["kl_slow_dense"] = compare("sfi with every step slow", slow, "dense", dense, MAX_KL_SLOW)
    return found


def check_kinds(decoded: "Decoded", mode: str, depth: int, request: Request, greedy: list[int]) -> None:
    """Raise CheckError where a mode did not do the steps it stands for; greedy: the tokens of dense steps."""
    from sfi_local import bench_check

    budget, auto = request.params.budget, request.params.auto_depth
    if mode == "exact":
        bench_check.same_tokens(decoded, greedy)
    elif mode in ("stock", "dense") or mode == "auto" and depth + request.n <= auto:
        bench_check.only(decoded, mode if mode != "auto" else "dense")
    elif mode == "sfi" or depth > auto:
        bench_check.slow_and_fast(decoded, budget, depth, request.slow_every)


# ---- rows ------------------------------------------------------------------------------------------------------------

def row(mode: str, depth: int, turns: dict[str, list], measured: list, checks: dict, facts: dict, kv_type: str,
        session: "BenchSession") -> dict[str, Any]:
    """One mode at one depth; times in milliseconds, rates in tokens or 1e9 bytes per second, shares and ratios in 1.

    decode_tps is the median of the repetitions, spread (largest - smallest) / median of them; ratios are medians of
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
        "spread": (max(rates) - min(rates)) / tps, "tps_reps": rates, "ms_step": _median_ms(mine),
        "ms_slow": _median_ms(mine, "slow"), "ms_fast": _median_ms(mine, "fast"), "steps": _steps(mine),
        "reasons": mine[0].reasons, "n_drafted": mine[0].n_drafted, "n_accepted": mine[0].n_accepted, "kv_read_share": median(d.kv_read_share for d in mine),
        "ratio_to_stock": _ratio(mine, stock), "ratio_to_dense": _ratio(mine, dense),
        "ceiling": median(d.tps for d in origin) / median(d.tps for d in stock) if origin and stock else None,
        "gbps": (facts["weight_bytes"] + kv_bytes) * tps / 1e9,
        "kv_gbps": kv_bytes / beyond / 1e6 if beyond > 0 else None,
        **checks, **{name: value for name, value in facts.items() if name not in ("model", "weight_bytes")},
    }


def run_facts(request: Request, model: Any) -> dict[str, Any]:
    """What is the same in all rows; read_bandwidth in 1e9 bytes per second, weight_bytes read per step."""
    from datetime import datetime, timezone

    from sfi_local.bandwidth import read_bandwidth
    from sfi_local.library import source_id
    from sfi_local.machine import cpu_name, physical_cores

    return {
        "model": request.model, "weight_bytes": weight_bytes(model), "fill": request.fill,
        "text": "random tokens" if request.random_tokens else request.text or "pydoc_data.topics",
        "threads": model.n_threads, "n": request.n, "reps": request.reps, "slow_every": request.slow_every,
        "read_bandwidth": read_bandwidth(model.n_threads) / 1e9, "source_id": source_id(),
        "machine": f"{cpu_name()}, {physical_cores()} cores", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["sfi-local", *sys.argv[1:]]),
    }


def params_facts(p: SfiParams) -> dict[str, Any]:
    """The budget in its three parts, and everything else that was set."""
    return {"budget": {"n_sink": p.n_sink, "n_recent": p.n_recent, "n_selected": p.n_selected}, "params": asdict(p)}


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


# ---- progress --------------------------------------------------------------------------------------------------------

class _Bar:
    """A progress bar on stderr that leaves nothing behind; plain lines where stderr is no terminal."""

    def __init__(self, request: Request):
        total = sum(len(modes) for _, modes in request.cases) * len(request.kv_types) * request.reps
        self._total, self._live, self._said = total, sys.stderr.isatty(), ""

    def __enter__(self) -> "_Bar":
        self._bar = None
        if self._live:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("loading", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """What is going on; in plain lines only where the depth changes."""
        if self._bar:
            self._bar.update(self._task, description=text)
        elif text.partition(":")[0] != self._said:
            self._said = text.partition(":")[0]
            click.echo(f"sfi-local: measuring {self._said}", err=True)

    def advance(self) -> None:
        if self._bar:
            self._bar.advance(self._task)

    def filling(self, n_done: int, n_total: int) -> None:
        if self._bar:
            self._bar.update(self._task, description=f"prefill {n_done} of {n_total}")
