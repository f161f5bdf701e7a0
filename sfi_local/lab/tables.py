"""Rows of a measurement as aligned columns, Markdown, JSON or CSV, and as a picture."""

from __future__ import annotations

import csv
import difflib
import io
import json
from pathlib import Path
from typing import Any, Callable, Sequence

from sfi_local.errors import UsageError
from sfi_local.whole_file import check_matplotlib, check_writable, written_whole

Rows = list[dict[str, Any]]
# title: (field, how it is shown)
Columns = dict[str, tuple[str, Callable[[Any], str]]]
PICTURES = (".png", ".svg", ".pdf")


def number(digits: int) -> Callable[[Any], str]:
    """Fixed digits after the point; "" for None."""
    return lambda value: "" if value is None else f"{value:.{digits}f}"


def times(value: Any) -> str:
    return "" if value is None else f"{value:.2f}x"


def percent(value: Any, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def kinds(steps: dict[str, int]) -> str:
    """``slow/fast``; "" where there were neither."""
    return f"{steps['slow']}/{steps['fast']}" if steps["slow"] or steps["fast"] else ""


def table(rows: Rows, columns: Columns, context: list[str]) -> str:
    """Aligned columns, then the sentences that belong to the numbers; columns shown by ``str`` of a text are left-aligned."""
    cells = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = _text_columns(rows, columns)
    lines = ["  ".join(f"{c:<{w}}" if l else f"{c:>{w}}" for c, w, l in zip(line, widths, left)).rstrip() for line in cells]
    return "\n".join([*lines, "", *context])


def narrowed(rows: Rows, columns: Columns, least_telling: Sequence[str], width: int) -> Columns:
    """Columns of a table of at most so many characters: the least telling ones go, one after another, and those that are all empty."""
    kept = {title: column for title, column in columns.items() if any(column[1](row[column[0]]) for row in rows)}
    for title in least_telling:
        if max(map(len, table(rows, kept, []).splitlines())) <= width:
            break
        kept.pop(title, None)
    return kept


def markdown(rows: Rows, columns: Columns, context: list[str]) -> str:
    """A Markdown table, what it was measured with in the sentences above it."""
    head, *body = [f"| {' | '.join(line)} |" for line in _cells(rows, columns)]
    rule = f"|{'|'.join('---' if left else '---:' for left in _text_columns(rows, columns))}|"
    return "\n".join([*context, "", head, rule, *body])


def as_json(rows: Rows, *_: Any) -> str:
    return json.dumps(rows, indent=1)


def as_csv(rows: Rows, *_: Any) -> str:
    """One line per row; fields of steps, reasons and budget become columns, e.g. ``steps_slow``."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


FORMATS = {"table": table, "md": markdown, "json": as_json, "csv": as_csv}


def _cells(rows: Rows, columns: Columns) -> list[list[str]]:
    return [list(columns), *([show(row[field]) for field, show in columns.values()] for row in rows)]


def _text_columns(rows: Rows, columns: Columns) -> list[bool]:
    return [isinstance(rows[0][field], str) for field, _ in columns.values()]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= {f"{name}_{key}": inner for key, inner in value.items()}
        else:
            out[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return out


# ---- files -----------------------------------------------------------------------------------------------------------

def check_plot(path: str) -> None:
    """Before anything is measured: matplotlib is there, and the file can be written."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        near = difflib.get_close_matches(suffix, PICTURES, n=1)
        raise UsageError(f"--plot {path}: give a name that ends in {near[0] if near else ', '.join(PICTURES)}.")
    check_writable(path)
    check_matplotlib("--plot")


def save_figure(figure: Any, path: str) -> None:
    """A figure of matplotlib, in the format its name ends in."""
    with written_whole(path) as part:
        figure.savefig(part, format=Path(path).suffix[1:].lower(), dpi=150)
