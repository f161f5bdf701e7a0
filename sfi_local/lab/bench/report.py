"""Rows of bench as a table, Markdown, JSON, CSV or a picture."""

from __future__ import annotations

from functools import partial
from textwrap import wrap

from sfi_local.lab import tables
from sfi_local.lab.other_work import BUSY
from sfi_local.lab.tables import Columns, Rows, kinds, number, percent, times

COLUMNS: Columns = {
    "KV": ("kv_type", str), "depth": ("depth", str), "mode": ("mode", str), "tokens/s": ("decode_tps", number(1)),
    "spread": ("spread", lambda value: percent(value) or "-"), "": ("busy", lambda busy: "!" if busy else ""),
    "slow/fast": ("steps", kinds), "ms slow": ("ms_slow", number(2)), "ms fast": ("ms_fast", number(2)),
    "ms step": ("ms_step", number(2)), "KV read": ("kv_read_share", percent), "x stock": ("ratio_to_stock", times),
    "x dense": ("ratio_to_dense", times), "ceiling": ("ceiling", times), "GB/s": ("gbps", number(1)), "KV GB/s": ("kv_gbps", number(1)),
}
# where --wait was given
WAIT: Columns = {
    "prompt/s": ("prefill_tps", number(1)), "first s": ("ttft_cold_s", number(2)), "memory s": ("ttft_memory_s", number(2)),
    "disk s": ("ttft_disk_s", number(2)), "answer s": ("answer_s", number(1)),
}
# left out of a window one after another until it is wide enough
LEAST_TELLING = ("KV GB/s", "GB/s", "ms slow", "ms fast", "ms step", "x dense", "KV read", "slow/fast", "ceiling", "spread")


def show(output: str, rows: Rows, width: int | None = None) -> str:
    """The rows in one of tables.FORMATS. width: columns of the window that a table is for; None: it has any width"""
    marked = [{**row, "busy": is_busy(row)} for row in rows]
    if output == "table" and width:
        columns = tables.narrowed(marked, columns_of(rows), LEAST_TELLING, width)
        return tables.table(marked, columns, [line for sentence in context(rows) for line in wrap(sentence, width)])
    return tables.FORMATS[output](rows if output in ("json", "csv") else marked, columns_of(rows), context(rows))


def columns_of(rows: Rows) -> Columns:
    return {**COLUMNS, **WAIT} if any(row.get("answer_s") for row in rows) else COLUMNS


table, markdown, as_json, as_csv = (partial(show, output) for output in ("table", "md", "json", "csv"))


def is_busy(row: dict) -> bool:
    """Whether other programs took so much of the CPUs that its time says little."""
    return (row.get("other_work") or 0.0) > BUSY


def above_ceiling(row: dict) -> bool:
    """Whether a row of a mode that computes every token by itself is faster than attention for nothing could make it."""
    return row["mode"] != "exact" and bool(row["ceiling"]) and bool(row["ratio_to_stock"]) and row["ratio_to_stock"] > row["ceiling"] * (
        1 + (row["spread"] or 0.0))


def context(rows: Rows) -> list[str]:
    """The sentences that belong to the numbers."""
    r = rows[0]
    slow = f", every {r['slow_every']}th step slow (not of policy sketch)" if r["slow_every"] else ""
    filled = ("; the cache was filled through the state API with the cells of a short piece, repeated"
              if r["fill"] == "state" else "")
    budget = " + ".join(str(n) for n in r["budget"].values())
    return [*_doubts(rows), f"{r['model']}, {r['threads']} threads, medians of {r['reps']} x {r['n']} steps on {r['text']}{slow}{filled}; "
            f"budget {budget} cells.",
            f"{r['machine']}; reads {r['read_bandwidth']:.1f} GB/s; {r['date']}; {r['source_id']}; `{r['command']}`"]


def _doubts(rows: Rows) -> list[str]:
    """What speaks against the numbers."""
    busy, above = [r for r in rows if is_busy(r)], [r for r in rows if above_ceiling(r)]
    found = [f"! Other programs took up to {100 * max(r['other_work'] for r in busy):.0f} % of the CPUs' time: measure again on a quiet "
             f"machine."] if busy else []
    names = " and ".join(dict.fromkeys(f"{r['mode']} at {r['depth']}" for r in above))
    return found + ([f"{names} came out above the ceiling, which nothing can be: measure again."] if above else [])


def plot(rows: Rows, path: str) -> None:
    """Tokens/s against depth, one line per mode and KV type, from the slowest to the fastest repetition, the ceiling dotted.

    Rows of a busy machine, and those above the ceiling, are crosses beside the lines. The file is there whole or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes, r = figure.add_subplot(), rows[0]
    several, doubtful = len({r["kv_type"] for r in rows}) > 1, [r for r in rows if is_busy(r) or above_ceiling(r)]
    for i, (kv_type, mode) in enumerate(dict.fromkeys((r["kv_type"], r["mode"]) for r in rows)):
        sure = [r for r in rows if (r["kv_type"], r["mode"]) == (kv_type, mode) and r not in doubtful]
        errors = [[abs(end(r["tps_reps"]) - r["decode_tps"]) for r in sure] for end in (min, max)]
        axes.errorbar([r["depth"] for r in sure], [r["decode_tps"] for r in sure], errors, marker="o", capsize=3, color=f"C{i}",
                      label=f"{mode} {kv_type}" if several else mode)
        unsure = [r for r in doubtful if (r["kv_type"], r["mode"]) == (kv_type, mode)]
        axes.plot([r["depth"] for r in unsure], [r["decode_tps"] for r in unsure], "x", color=f"C{i}")
    ceiling = [r["decode_tps"] for r in rows if r["mode"] == "stock" and r["depth"] == 0]
    if ceiling:
        axes.axhline(ceiling[0], linestyle=":", color="gray", label="ceiling")
    if doubtful:
        axes.plot([], [], "x", color="gray", label="measured beside other programs" if any(map(is_busy, rows)) else "above the ceiling")
    axes.set(xlabel="depth in tokens", ylabel="tokens/s", ylim=(0, None), title=r["model"])
    figure.suptitle(facts_line(r), fontsize="x-small", color="gray")
    axes.legend()
    tables.save_figure(figure, path)


def facts_line(row: dict) -> str:
    """Machine, threads and day of a measurement."""
    return f"{row['machine']}, {row['threads']} threads; {row['reps']} x {row['n']} steps; {row['date'][:10]}; {row['source_id']}"
