"""Rows of a measurement as a table, Markdown, JSON, CSV or a picture."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from pathlib import Path
from typing import Any, Callable

from sfi_local.errors import SfiError, UsageError

Rows = list[dict[str, Any]]
PICTURES = (".png", ".svg", ".pdf")


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


def _times(value: Any) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %"


def _kinds(steps: dict[str, int]) -> str:
    return f"{steps['slow']}/{steps['fast']}" if steps["slow"] or steps["fast"] else ""


# title: (field, how it is shown)
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "KV": ("kv_type", str), "depth": ("depth", str), "mode": ("mode", str), "tokens/s": ("decode_tps", _number(1)),
    "spread": ("spread", _percent), "slow/fast": ("steps", _kinds), "ms slow": ("ms_slow", _number(2)),
    "ms fast": ("ms_fast", _number(2)), "ms step": ("ms_step", _number(2)), "KV read": ("kv_read_share", _percent),
    "x stock": ("ratio_to_stock", _times), "x dense": ("ratio_to_dense", _times), "ceiling": ("ceiling", _times),
    "GB/s": ("gbps", _number(1)), "KV GB/s": ("kv_gbps", _number(1)),
}
_TEXT_COLUMNS = ("KV", "mode")


def table(rows: Rows) -> str:
    """Aligned columns and what they were measured with."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [title in _TEXT_COLUMNS for title in COLUMNS]
    lines = ["  ".join(f"{c:<{w}}" if l else f"{c:>{w}}" for c, w, l in zip(line, widths, left)).rstrip() for line in cells]
    return "\n".join([*lines, "", *_context(rows)])


def markdown(rows: Rows) -> str:
    """A Markdown table, what it was measured with in the sentence above it."""
    head, *body = [f"| {' | '.join(line)} |" for line in _cells(rows)]
    rule = f"|{'|'.join('---' if title in _TEXT_COLUMNS else '---:' for title in COLUMNS)}|"
    return "\n".join([*_context(rows), "", head, rule, *body])


def as_json(rows: Rows) -> str:
    return json.dumps(rows, indent=1)


def as_csv(rows: Rows) -> str:
    """One line per row; fields of steps, reasons and budget become columns, e.g. ``steps_slow``."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


FORMATS = {"table": table, "md": markdown, "json": as_json, "csv": as_csv}


def _cells(rows: Rows) -> list[list[str]]:
    return [list(COLUMNS), *([show(row[field]) for field, show in COLUMNS.values()] for row in rows)]


def _context(rows: Rows) -> list[str]:
    """The sentences that belong to the numbers."""
    r = rows[0]
    slow = f", every {r['slow_every']}th step slow" if r["slow_every"] else ""
    filled = ("; the cache was filled through the state API with the cells of a short piece, repeated"
              if r["fill"] == "state" else "")
    budget = " + ".join(str(n) for n in r["budget"].values())
    return [f"{r['model']}, {r['threads']} threads, medians of {r['reps']} x {r['n']} steps on {r['text']}{slow}{filled}; "
            f"budget {budget} cells.",
            f"{r['machine']}; reads {r['read_bandwidth']:.1f} GB/s; {r['date']}; {r['source_id']}; `{r['command']}`"]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= {f"{name}_{key}": inner for key, inner in value.items()}
        else:
            out[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return out


# ---- the picture -----------------------------------------------------------------------------------------------------

def check_plot(path: str) -> None:
    """Before anything is measured: matplotlib is there, and the file can be written."""
    suffix, folder = Path(path).suffix.lower(), Path(path).resolve().parent
    if suffix not in PICTURES:
        near = difflib.get_close_matches(suffix, PICTURES, n=1)
        raise UsageError(f"--plot {path}: give a name that ends in {near[0] if near else ', '.join(PICTURES)}.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SfiError(f"{path} cannot be written: give a path in a directory that is there and that you may write to.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SfiError("--plot needs matplotlib: run `pip install 'sfi-local[plot]'` or `pip install matplotlib`, or leave --plot out.") from None


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
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format=Path(path).suffix[1:].lower(), dpi=150)
        os.replace(part, path)
    except OSError as error:
        raise SfiError(f"{path} cannot be written ({error.strerror}): give a path that you may write to.") from None
    finally:
        part.unlink(missing_ok=True)
