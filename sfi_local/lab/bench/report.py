"""Rows of bench as a table, Markdown, JSON, CSV or a picture."""

from __future__ import annotations

from functools import partial

from sfi_local.lab import tables
from sfi_local.lab.tables import Columns, Rows, kinds, number, percent, times

COLUMNS: Columns = {
    "KV": ("kv_type", str), "depth": ("depth", str), "mode": ("mode", str), "tokens/s": ("decode_tps", number(1)),
    "spread": ("spread", percent), "slow/fast": ("steps", kinds), "ms slow": ("ms_slow", number(2)),
    "ms fast": ("ms_fast", number(2)), "ms step": ("ms_step", number(2)), "KV read": ("kv_read_share", percent),
    "x stock": ("ratio_to_stock", times), "x dense": ("ratio_to_dense", times), "ceiling": ("ceiling", times),
    "GB/s": ("gbps", number(1)), "KV GB/s": ("kv_gbps", number(1)),
}


def show(output: str, rows: Rows) -> str:
    """The rows in one of tables.FORMATS."""
    return tables.FORMATS[output](rows, COLUMNS, context(rows))


table, markdown, as_json, as_csv = (partial(show, output) for output in ("table", "md", "json", "csv"))


def context(rows: Rows) -> list[str]:
    """The sentences that belong to the numbers."""
    r = rows[0]
    slow = f", every {r['slow_every']}th step slow (not of policy sketch)" if r["slow_every"] else ""
    filled = ("; the cache was filled through the state API with the cells of a short piece, repeated"
              if r["fill"] == "state" else "")
    budget = " + ".join(str(n) for n in r["budget"].values())
    return [f"{r['model']}, {r['threads']} threads, medians of {r['reps']} x {r['n']} steps on {r['text']}{slow}{filled}; "
            f"budget {budget} cells.",
            f"{r['machine']}; reads {r['read_bandwidth']:.1f} GB/s; {r['date']}; {r['source_id']}; `{r['command']}`"]


def plot(rows: Rows, path: str) -> None:
    """Tokens/s against depth, one line per mode and KV type, the ceiling dotted. The file is there whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    several = len({r["kv_type"] for r in rows}) > 1
    for kv_type, mode in dict.fromkeys((r["kv_type"], r["mode"]) for r in rows):
        points = [(r["depth"], r["decode_tps"]) for r in rows if (r["kv_type"], r["mode"]) == (kv_type, mode)]
        axes.plot(*zip(*points), marker="o", label=f"{mode} {kv_type}" if several else mode)
    ceiling = [r["decode_tps"] for r in rows if r["mode"] == "stock" and r["depth"] == 0]
    if ceiling:
        axes.axhline(ceiling[0], linestyle=":", color="gray", label="ceiling")
    axes.set(xlabel="depth in tokens", ylabel="tokens/s", ylim=(0, None), title=rows[0]["model"])
    axes.legend()
    tables.save_figure(figure, path)
