"""Rows of eval: their fields, and how they are shown, saved and drawn."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from sfi_local.lab import tables
from sfi_local.lab.checks import CheckError
from sfi_local.lab.eval.exact import compare
from sfi_local.lab.eval.greedy import NEAR_TIE
from sfi_local.lab.eval.request import EvalPlan
from sfi_local.lab.eval.score import Score
from sfi_local.lab.eval.text import TextScore
from sfi_local.lab.facts import DEFAULT_TEXT, facts, params_facts
from sfi_local.lab.tables import Columns, Rows, kinds, number, percent
from sfi_local.machine import human_bytes
from sfi_local.whole_file import written_whole

LEAST_KL = 1e-6  # nats; what is below is drawn at it, for the axis is logarithmic


# ---- fields ----------------------------------------------------------------------------------------------------------

def text_rows(found: list["TextScore"], request: "EvalPlan", model: Any) -> Rows:
    """A row per TextScore. kld_*, delta_nll and greedy_gap in nats, top1 and shares in 1, kv_bytes per step.

    greedy_*, null without --greedy, see greedy.Greedy; greedy_first is null where there is no difference.
    """
    common = _common(request, model)
    return [{
        "task": "text", **_names(one, request), "depth": one.depth, "n": len(one.kl), "kld_mean": mean(one.kl),
        "kld_median": median(one.kl), "kld_p99": quantile(one.kl, 0.99), "kld_max": max(one.kl), "top1": mean(one.same_top),
        "delta_nll": mean(one.delta_nll) if one.delta_nll else None, "kv_read_share": one.kv_read_share,
        "kv_bytes": one.kv_bytes, "steps": _steps(one.kinds), "reasons": one.reasons, **_greedy(one),
        "text": request.text or DEFAULT_TEXT, **_params(one), **common,
    } for one in found]


def task_rows(scores: list["Score"], task: str, depth: int | None, request: "EvalPlan", model: Any) -> Rows:
    """A row per Score; the first score is dense's.

    depth: that was asked for, else the mean length of the prompts. passed_of_dense: prompts that dense passes as well,
    minus_dense: accuracy minus dense's; mean_score: of copies the mean share before the first wrong token
    """
    common, dense = _common(request, model), scores[0].passed
    source = request.tasks if task == "tasks" else request.text or DEFAULT_TEXT
    return [{
        "task": task, **_names(one, request), "depth": depth or one.depth, "passed": sum(one.passed), "total": len(one.passed),
        "dense_passed": sum(dense), "passed_of_dense": sum(a and b for a, b in zip(one.passed, dense)),
        "minus_dense": (sum(one.passed) - sum(dense)) / len(dense), "mean_score": mean(one.scores), "skipped": one.n_skipped,
        "kv_read_share": one.kv_read_share, "kv_bytes": mean(one.bytes_per_step), "steps": _steps(one.kinds),
        "reasons": dict(one.reasons), "failed": [i for i, passed in enumerate(one.passed) if not passed], "text": source,
        **_params(one), **common,
    } for one in scores]


def exact_rows(scores: list["Score"], depth: int, request: "EvalPlan", model: Any) -> Rows:
    """A row per Score of mode exact; the first score is dense's.

    n: tokens per prompt at most; n_tokens, n_equal, verdict, complaint and differences see exact.Comparison; n_ties: tokens
    that noise could have changed, whether it did or not; noise: the largest difference of a logit between a batch and a dense
    step; n_by_ngrams: of the drafts that were kept those
    by the text itself; kept_per_span: mean number of drafts that verification kept; n_dense: steps without drafts
    """
    common, rows = _common(request, model), []
    for one in (score for score in scores if score.row.decodes.verifies):
        found = compare(one, scores[0])
        rows.append({
            "task": "exact", **_names(one, request), "depth": depth, "n_prompts": found.n_prompts, "n": request.n,
            "n_tokens": found.n_tokens, "n_equal": found.n_equal, "verdict": found.verdict, "complaint": found.complaint,
            "n_ties": sum(map(sum, one.ties)), "differences": [asdict(d) for d in found.differences], "noise": one.noise,
            "draft": one.row.draft, "n_spans": one.n_spans, "n_drafted": one.n_drafted, "n_accepted": one.n_accepted,
            "n_by_ngrams": one.n_by_ngrams,
            "kept_per_span": one.n_accepted / one.n_spans, "n_dense": len(one.kinds) - one.n_accepted - one.n_spans,
            "temp": request.temp, "seed": request.seed, "kv_read_share": one.kv_read_share, "kv_bytes": mean(one.bytes_per_step),
            "steps": _steps(one.kinds), "reasons": dict(one.reasons), "text": request.text or DEFAULT_TEXT, **_params(one), **common})
    return rows


def check(rows: Rows) -> None:
    """Raise CheckError where a row says that mode exact is not dense."""
    complaints = [row["complaint"] for row in rows if row.get("complaint")]
    if complaints:
        raise CheckError(" ".join(complaints))


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least a share of the values do not exceed."""
    return sorted(values)[max(0, -(-round(share * len(values) * 1000) // 1000) - 1)]


def _names(one: Any, request: "EvalPlan") -> dict[str, Any]:
    return {"name": one.row.name, "mode": one.row.mode, "kv_type": one.row.kv_type or request.kv_type}


def _steps(all_kinds: list[str]) -> dict[str, int]:
    return {kind: all_kinds.count(kind) for kind in ("slow", "fast", "dense", "stock")}


def _greedy(one: "TextScore") -> dict[str, Any]:
    g = one.greedy
    names = ("n", "first", "gap", "tie", "n_differ", "n_ties")
    return {f"greedy_{name.removeprefix('n_') if name != 'n' else 'n'}": getattr(g, name) if g else None for name in names}


def _params(one: Any) -> dict[str, Any]:
    return params_facts(one.params)


def _common(request: "EvalPlan", model: Any) -> dict[str, Any]:
    return facts(request.model, model)


# ---- text ------------------------------------------------------------------------------------------------------------

def _gap(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _first(value: int | None) -> str:
    return "-" if value is None else str(value)


_NAMES: Columns = {"row": ("name", str), "mode": ("mode", str), "KV": ("kv_type", str), "depth": ("depth", str)}
_COST: Columns = {"KV read": ("kv_read_share", lambda v: percent(v, 1)), "per step": ("kv_bytes", human_bytes),
                  "slow/fast": ("steps", kinds)}
_TEXT: Columns = {
    **_NAMES, "KL mean": ("kld_mean", number(5)), "median": ("kld_median", number(5)), "p99": ("kld_p99", number(4)),
    "top-1": ("top1", lambda v: percent(v, 1)), "dNLL": ("delta_nll", number(4)), **_COST}
_GREEDY: Columns = {"first": ("greedy_first", _first), "gap": ("greedy_gap", _gap), "differ": ("greedy_differ", str),
                    "ties": ("greedy_ties", str)}
_TASKS: Columns = {"task": ("task", str), **_NAMES, "passed": ("passed", str), "of": ("total", str),
                   "of dense's": ("passed_of_dense", str), "- dense": ("minus_dense", lambda v: f"{100 * v:+.1f} points"),
                   "score": ("mean_score", number(3)), **_COST}
_EXACT: Columns = {
    **_NAMES, "prompts": ("n_prompts", str), "tokens": ("n_tokens", str), "equal": ("n_equal", str), "is": ("verdict", str),
    "ties": ("n_ties", str), "spans": ("n_spans", str), "drafted": ("n_drafted", str), "kept": ("n_accepted", str),
    "per span": ("kept_per_span", number(2)), "KV read": ("kv_read_share", lambda v: percent(v, 1)), "not drafted": ("n_dense", str)}


def show(output: str, rows: Rows) -> str:
    """The rows in one of tables.FORMATS."""
    if rows[0]["task"] == "exact":
        columns = _EXACT
    elif rows[0]["task"] != "text":
        columns = _TASKS
    else:
        columns = {**_TEXT, **(_GREEDY if rows[0]["greedy_n"] else {})}
    return tables.FORMATS[output](rows, columns, context(rows))


def context(rows: Rows) -> list[str]:
    """The sentences that belong to the numbers."""
    r = rows[0]
    sentences = [f"{r['model']}, {r['threads']} threads, {_what(rows)}.",
                 f"{r['machine']}; {r['date']}; {r['source_id']}; `{r['command']}`"]
    if r["task"] == "exact":
        sentences[1:1] = ["equal: tokens before the first difference of each prompt; ties: tokens that noise could have changed; kept: "
                          "drafts that verification kept; not drafted: dense steps, where drafting does not pay or is not possible.",
                          *(row["complaint"] for row in rows if row["complaint"])]
    if r["task"] == "text" and r["greedy_n"]:
        sentences.insert(1, f"Greedy: {max(row['greedy_n'] for row in rows)} tokens of dense's own output; first: tokens before the first "
                            f"difference; gap: how much more likely dense finds its own token there, in nats; ties: differences "
                            f"with a gap below {NEAR_TIE}.")
    return sentences


def _what(rows: Rows) -> str:
    r = rows[0]
    if r["task"] == "text":
        return f"{r['n']} steps on {r['text']}, each compared with dense"
    if r["task"] == "exact":
        drawn = f"temperature {r['temp']:g}, seeds from {r['seed']}" if r["temp"] else "greedy"
        return f"{r['n_prompts']} prompts of {r['text']}, {r['n']} tokens each, {drawn}, beside dense steps"
    skipped = f"; {r['skipped']} prompts are longer than the context and were skipped" if r["skipped"] else ""
    passed = "; ".join(f"dense passes {one['dense_passed']} of {one['total']} ({one['task']} @ {one['depth']})" for one in rows
                       if one["name"] == "dense")
    return f"greedy answers to prompts from {r['text']}{skipped}; {passed}"


# ---- files -----------------------------------------------------------------------------------------------------------

def save(rows: Rows, path: str) -> None:
    """The rows as JSON; the file is there whole or not at all."""
    with written_whole(path) as part:
        part.write_text(tables.as_json(rows) + "\n", encoding="utf-8")


def plot(rows: Rows, path: str) -> None:
    """Mean KL against the share of bytes read, both logarithmic: a point per row, the oracle's rows as a line, stock as the
    floor; one panel per depth."""
    from matplotlib.figure import Figure

    depths = list(dict.fromkeys(r["depth"] for r in rows))
    figure = Figure(figsize=(1 + 5.5 * len(depths), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    colors = {name: f"C{i % 10}" for i, name in enumerate(n for n in dict.fromkeys(r["name"] for r in rows) if not is_oracle(n))}
    for axes, depth in zip(all_axes, depths):
        _panel(axes, [r for r in rows if r["depth"] == depth], colors)
        axes.set_title(f"{Path(rows[0]['model']).name} @ {depth}")
    all_axes[0].set_ylabel("mean KL from dense, nats per token")
    shown = {label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
    tables.save_figure(figure, path)


def is_oracle(name: str) -> bool:
    return name.startswith("oracle ")


def _panel(axes: Any, rows: Rows, colors: dict[str, str]) -> None:
    oracle = sorted((r["kv_read_share"], max(r["kld_mean"], LEAST_KL)) for r in rows if is_oracle(r["name"]))
    if oracle:
        axes.plot(*zip(*oracle), color="black", marker=".", linewidth=1, label="oracle")
    for i, row in enumerate(r for r in rows if not is_oracle(r["name"])):
        if row["mode"] == "stock":
            axes.axhline(max(row["kld_mean"], LEAST_KL), linestyle="--", color="gray", label="stock (noise of two dense ones)")
        elif row["kld_mean"] > 0:
            marker = "s" if row["mode"] == "dense" else "o^vDPX*<>"[i % 9]
            axes.plot([row["kv_read_share"]], [max(row["kld_mean"], LEAST_KL)], marker, color=colors[row["name"]], label=row["name"])
    axes.set(xscale="log", yscale="log", xlabel="bytes of the KV cache read, share of dense")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{100 * value:g} %" if round(100 * value, 6) in (2, 3, 5, 20, 30, 50) else "")
    axes.grid(which="major", alpha=0.3)
