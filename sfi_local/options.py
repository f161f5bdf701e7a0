"""Options that several subcommands share, and what they become."""

from __future__ import annotations

from typing import Any, Callable

import click

from sfi_local.kv_layout import KV_TYPES
from sfi_local.params import POLICIES, SELECTORS, SfiParams

_BUDGET = ("n_sink", "n_recent", "n_selected")
_DEFAULT = SfiParams()


def model_options(command: Callable) -> Callable:
    """Options of loading a model."""
    for option in reversed((
        click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads [default: one per core]."),
        click.option("--ctx", type=click.IntRange(16), metavar="N",
                     help="Cells of the context [default: as needed, up to what the model was trained on]."),
        click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True,
                     help="Type of K and V in the cache."),
        click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr."),
    )):
        command = option(command)
    return command


def sfi_options(command: Callable) -> Callable:
    """Options of the support and the schedule; None where not given."""
    for option in reversed((
        click.option("--support", type=click.Choice(list(POLICIES)),
                     help="Policy of fast steps: frozen (cells chosen on slow steps) or window (none)."),
        click.option("--selector", type=click.Choice(list(SELECTORS)),
                     help="topk (pooled evidence of the last queries) or paper (arXiv 2603.12038)."),
        _count("--n-sink", 0, "First cells of the text, always attended to."),
        _count("--n-recent", 1, "Latest cells, always attended to."),
        _count("--n-selected", 1, "Cells chosen per layer and KV head."),
        _count("--max-span", 1, "Fast steps between two slow steps at most."),
        _count("--min-span", 0, "Fast steps before a boundary may make a step slow."),
        click.option("--boundary/--no-boundary", default=None,
                     help=f"Slow step after the end of a sentence [default: {'on' if _DEFAULT.boundary else 'off'}]."),
        click.option("--repair/--no-repair", default=None,
                     help=f"A slow step computes K and V of the fast steps before it again, with dense attention [default: "
                          f"{'on' if _DEFAULT.repair else 'off'}]."),
        _count("--n-queries", 1, "Evidence of the last N queries, 64 at most ..."),
        _count("--query-stride", 1, "... of every N-th of them; slow steps are cheaper by as much."),
        _count("--pool-after", 0, "An important cell brings N cells after it ..."),
        _count("--pool-before", 0, "... and N cells before it."),
    )):
        command = option(command)
    return command


def _count(name: str, least: int, text: str) -> Callable:
    default = getattr(_DEFAULT, name[2:].replace("-", "_"))
    return click.option(name, type=click.IntRange(least), metavar="N", help=f"{text} [default: {default}]")


def take_params(options: dict[str, Any]) -> tuple[SfiParams, bool]:
    """Remove the options of sfi_options from a dict; returns the parameters and whether the budget may be made smaller.

    A budget that was typed is kept or refused; the default one adapts to a small context. Raises ArgumentError.
    """
    names = ("support", "selector", *_BUDGET, "max_span", "min_span", "boundary", "repair", "n_queries", "query_stride", "pool_after",
             "pool_before")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    return SfiParams(**given).validate(), not any(name in given for name in _BUDGET)
