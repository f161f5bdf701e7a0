"""sfi-local calibrate: how far a model is from dense at several tolerances, remembered for --fidelity."""

from __future__ import annotations

from typing import Any

import click

from sfi_local.cli.options import sketch_options
from sfi_local.lab.eval import command as evaluation
from sfi_local.lab.eval import report as eval_report
from sfi_local.lab.eval.request import EvalPlan
from sfi_local.lab.facts import fetch
from sfi_local.lab.tables import FORMATS, number, percent
from sfi_local.params import SfiParams
from sfi_local.store.layout import KV_TYPES
from sfi_local.tuning.tolerance import TOLERANCES, Setting, choose, fidelity_file, remember


@click.command("calibrate", short_help="Measure once how close to dense a model stays, for --fidelity.")
@click.argument("model")
@click.option("--text", metavar="FILE", help="The text that is decoded; - reads stdin [default: Python's own help topics].")
@click.option("--depth", type=click.IntRange(1), default=2000, show_default=True, metavar="N",
              help="Tokens in the KV cache before the first step.")
@click.option("-n", "--n", "n", type=click.IntRange(1), default=128, show_default=True, metavar="N",
              help="Tokens of the text that are decoded with each tolerance.")
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of K and V.")
@sketch_options
@click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads [default: one per core].")
@click.option("-o", "--output", "output", type=click.Choice(list(FORMATS)), default="table", show_default=True)
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def command(model: str, depth: int, sketch_bits: dict[str, int] | None, second_look: float | None, output: str, **options: Any) -> None:
    """Measure MODEL's divergence from dense at several tolerances, and keep the result in the cache for --fidelity.

    \b
    sfi-local calibrate smollm2-135m
    sfi-local calibrate smollm2-135m --text book.txt --depth 6000 -n 512
    sfi-local run smollm2-135m -f report.txt -p "Who wrote it?" --fidelity 0.004

    Measured as by `sfi-local eval`. The row stock is the noise floor, the divergence of two dense implementations. The
    row that is marked is what `--fidelity floor` takes from then on, and modes auto and sfi where neither --fidelity nor
    --tolerance is given. A calibration holds for this file, KV type, sketch and version; a new one replaces it.
    """
    sketch = {**(sketch_bits or {}), **({} if second_look is None else {"second_look": second_look})}
    params = SfiParams(**sketch).validate()
    request = EvalPlan(model, depths=(depth,), modes=("dense", "stock"), own_rows=tuple(_rows()), params=params,
                                 **options)
    click.echo(_show(output, calibrate(request)))


def calibrate(request: Any) -> list[dict[str, Any]]:
    """Measure and remember; the rows of eval, stock first, with ``tolerance`` (None: stock) and ``chosen``.

    request: EvalPlan with one depth and the rows of _rows(). Raises what eval.measure and fidelity.remember raise.
    """
    tolerances = _rows()
    stock, *found = [{**row, "tolerance": tolerances.get(_typed(row))} for row in evaluation.measure(request)
                     if row["mode"] != "dense"]
    settings = [Setting(row["tolerance"], row["kld_mean"], row["kv_read_share"]) for row in found]
    remember(fetch(request.model), request.kv_type, request.params, stock["kld_mean"], settings, depth=stock["depth"],
             n=stock["n"], text=stock["text"], date=stock["date"])
    chosen, _ = choose(settings, stock["kld_mean"])
    return [{**row, "chosen": row["tolerance"] == chosen.tolerance} for row in (stock, *found)]


def _rows() -> dict[str, float]:
    """The rows as eval takes them -> their tolerance."""
    return {f"{tolerance:g}:tolerance={tolerance!r}": tolerance for tolerance in TOLERANCES}


def _typed(row: dict[str, Any]) -> str:
    return f"{row['name']}:tolerance={row['params']['tolerance']!r}"


def _show(output: str, rows: list[dict[str, Any]]) -> str:
    columns = {"tolerance": ("name", str), "KL mean": ("kld_mean", number(5)), "p99": ("kld_p99", number(4)),
               "top-1": ("top1", lambda v: percent(v, 1)), "KV read": ("kv_read_share", lambda v: percent(v, 1)),
               "at the floor": ("chosen", lambda v: "chosen" if v else "")}
    return FORMATS[output](rows, columns, [*_conclusion(rows), *eval_report.context(rows)])


def _conclusion(rows: list[dict[str, Any]]) -> list[str]:
    """What the floor chose, and where it is kept."""
    floor, row = rows[0]["kld_mean"], next(row for row in rows if row["chosen"])
    reached = "" if row["kld_mean"] <= floor else ", the smallest, though it does not reach the floor"
    return [f"Modes auto and sfi take tolerance {row['name']} for this model from now on{reached}. Kept in {fidelity_file()}."]
