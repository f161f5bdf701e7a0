"""sfi-local calibrate: how far a model is from dense at several tolerances, and from which depth auto pays; remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sfi_local.binding.library import source_id
from sfi_local.cli.options import COUNT, set_options, take_params, threads_option
from sfi_local.errors import UsageError
from sfi_local.lab.eval import command as evaluation
from sfi_local.lab.eval import report as eval_report
from sfi_local.lab.eval.request import EvalPlan
from sfi_local.lab.facts import fetch
from sfi_local.lab.tables import FORMATS, number, percent
from sfi_local.loading import load_as
from sfi_local.params import SfiParams
from sfi_local.runtime.settings import Settings
from sfi_local.store.layout import KV_TYPES
from sfi_local.tuning import auto_depth, tolerance
from sfi_local.tuning.auto_depth import auto_depth_of
from sfi_local.tuning.quality import FASTER
from sfi_local.tuning.tolerance import TOLERANCES, Setting, choose, fidelity_file, remember


@click.command("calibrate", short_help="Measure once what modes auto and sfi take for a model.")
@click.argument("model", required=False)
@click.option("--show", is_flag=True, help="Show what was measured, of MODEL or of all, and measure nothing.")
@click.option("--forget", "forgets", is_flag=True, help="Forget what was measured, of MODEL or of all, and measure nothing.")
@click.option("--text", metavar="FILE", help="The text that is decoded; - reads stdin [default: Python's own help topics].")
@click.option("--depth", type=COUNT, default=2000, show_default=True, metavar="N",
              help="Tokens in the KV cache before the first step.")
@click.option("-n", "--n", "n", type=COUNT, default=128, show_default=True, metavar="N",
              help="Tokens of the text that are decoded with each tolerance.")
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of K and V.")
@set_options()
@threads_option
@click.option("-o", "--output", "output", type=click.Choice(list(FORMATS)), default="table", show_default=True)
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def command(model: str | None, show: bool, forgets: bool, output: str, **options: Any) -> None:
    """Measure MODEL once: how close to dense it is at several tolerances, and the depth from which mode auto is slow-fast.

    \b
    sfi-local calibrate smollm2-135m
    sfi-local calibrate smollm2-135m --text book.txt --depth 6000 -n 512
    sfi-local calibrate --show
    sfi-local calibrate smollm2-135m --forget

    From then on quality close takes the row that is marked, the largest tolerance within the noise of two dense implementations
    (row stock); fast the one within five times that; and --quality 0.004 the one within so many nats. Before, close is the
    tolerance that `sfi-local help knobs` names. Measured as by `sfi-local eval`; it holds for this file, KV type, sketch and build
    of the library; a new measurement replaces it.
    """
    if show and forgets:
        raise UsageError("--show and --forget: give one of them.")
    if show or forgets:
        path = None if model is None else fetch(model)
        click.echo(shown(path) if show else forgotten(path))
        return
    if model is None:
        raise UsageError("There is no MODEL: name the one to measure, or give --show.")
    asked, depth = take_params(options), options.pop("depth")
    request = EvalPlan(model, depths=(depth,), modes=("dense", "stock"), own_rows=tuple(_rows()), params=asked.asked_params, asked=asked,
                       **options)
    rows = calibrate(request)
    click.echo(_show(output, rows, find_depth(request, asked)))


def find_depth(request: EvalPlan, asked: Settings) -> tuple[int, str]:
    """(depth from which mode auto is slow-fast with what was calibrated, how it was found); measured anew, and remembered."""
    settings = replace(asked, mode="auto", n_threads=request.threads, type_k=request.kv_type, type_v=request.kv_type, cache=False)
    with load_as(fetch(request.model), settings, request.verbose) as model:
        params = model.tune_auto(0).fit_context(model.n_ctx_limit)  # as a long prompt would
        return auto_depth_of(model, params, request.kv_type, request.kv_type, anew=True)


def shown(path: Path | None) -> str:
    """What is remembered, a line each."""
    now, lines = source_id(), []
    for entry in (*tolerance.known(), *(e for e in auto_depth.known() if e["timings"])):
        key = entry["key"]
        if path is None or key["model"] == str(path.resolve()):
            old = "" if key["source_id"] == now else "; of another build of the library: not used"
            what = _auto(entry) if "auto_depth" in entry else _tolerances(entry)
            lines.append(f"{Path(key['model']).name}, {key['type_k']}: {what}, {str(entry.get('date', ''))[:10]}{old}")
    return "\n".join(lines) or "Nothing was measured yet: `sfi-local calibrate MODEL` does it."


def _auto(entry: dict[str, Any]) -> str:
    return f"mode auto is slow-fast from a depth of {entry['auto_depth']}, with {entry['key']['threads']} threads and a budget of " \
           f"{entry['key']['budget']}"


def _tolerances(entry: dict[str, Any]) -> str:
    settings = [Setting(**s) for s in entry["settings"]]
    close, fast = (choose(settings, bound * entry["floor"])[0] for bound in (1, FASTER))
    return f"quality close is tolerance {close.tolerance:g}, fast {fast.tolerance:g}; the noise is {entry['floor']:.2g} nats"


def forgotten(path: Path | None) -> str:
    """Forget, and say what changes."""
    n = tolerance.forget(path) + auto_depth.forget(path)
    of = "all models" if path is None else path.name
    if not n:
        return f"Nothing was measured of {of}: there is nothing to forget."
    return (f"Forgotten: {n} measurement{'' if n == 1 else 's'} of {of}. From now on quality close is tolerance {SfiParams.tolerance:g}, and "
            f"mode auto measures its depth again at the next long prompt.")


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


def _show(output: str, rows: list[dict[str, Any]], found: tuple[int, str]) -> str:
    columns = {"tolerance": ("name", str), "KL mean": ("kld_mean", number(5)), "p99": ("kld_p99", number(4)),
               "top-1": ("top1", lambda v: percent(v, 1)), "KV read": ("kv_read_share", lambda v: percent(v, 1)),
               "at the floor": ("chosen", lambda v: "chosen" if v else "")}
    return FORMATS[output](rows, columns, [*_conclusion(rows, found), *eval_report.context(rows)])


def _conclusion(rows: list[dict[str, Any]], found: tuple[int, str]) -> list[str]:
    """What changes from now on, and where it is kept."""
    floor, row = rows[0]["kld_mean"], next(row for row in rows if row["chosen"])
    reached = "" if row["kld_mean"] <= floor else " (the smallest, though it does not reach the floor)"
    return [f"From now on modes auto and sfi take tolerance {row['name']}{reached} for this model, where they took "
            f"{SfiParams.tolerance:g} uncalibrated, and auto is slow-fast from a depth of {found[0]} ({found[1]}).",
            f"Kept in {fidelity_file().parent}; `sfi-local calibrate --show` shows it, --forget forgets it."]
