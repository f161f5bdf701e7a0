"""Options that several subcommands share, and what they become."""

from __future__ import annotations

import re
from typing import Any, Callable

import click

from sfi_local.errors import UsageError
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
                     help="How fast steps choose their cells: sketch (anew at every step) [default], frozen (on slow steps), "
                          "window (only the latest), oracle (exactly, as slow as dense)."),
        click.option("--selector", type=click.Choice(list(SELECTORS)),
                     help="topk (pooled evidence of the last queries) or paper (arXiv 2603.12038)."),
        _count("--n-sink", 0, "First cells of the text, always attended to."),
        _count("--n-recent", 1, "Latest cells, always attended to."),
        _count("--n-selected", 1, "Cells chosen per layer and KV head."),
        _count("--max-span", 0, "Fast steps between two slow steps at most; 0: no slow steps."),
        _count("--min-span", 0, "Fast steps before a boundary may make a step slow."),
        click.option("--boundary/--no-boundary", default=None,
                     help="Slow step after the end of a sentence [default: on for frozen and window]."),
        click.option("--repair/--no-repair", default=None,
                     help=f"A slow step computes K and V of the fast steps before it again, with dense attention [default: "
                          f"{'on' if _DEFAULT.repair else 'off'}]."),
        _count("--n-queries", 1, "Evidence of the last N queries, 64 at most ..."),
        _count("--query-stride", 1, "... of every N-th of them; slow steps are cheaper by as much."),
        _count("--pool-after", 0, "An important cell brings N cells after it ..."),
        _count("--pool-before", 0, "... and N cells before it."),
        click.option("--sketch-bits", callback=_sketch_bits, metavar="K4,K2,K1:V4,V2",
                     help="Components of the sketch: of K with 4, 2 and 1 bits, of V with 4 and 2 "
                          "[default: 4,16,16:16,0 per 64 values of a head]."),
    )):
        command = option(command)
    return command


def _count(name: str, least: int, text: str) -> Callable:
    field = name[2:].replace("-", "_")
    default, frozen = getattr(_DEFAULT, field), getattr(SfiParams.of("frozen"), field)
    other = f"; {frozen} for frozen and window" if frozen != default else ""
    return click.option(name, type=click.IntRange(least), metavar="N", help=f"{text} [default: {default}{other}]")


def _sketch_bits(ctx: click.Context, option: click.Parameter, text: str | None) -> dict[str, int] | None:
    """The fields of SfiParams that K4,K2,K1:V4,V2 names. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,3}),(\d{1,3}),(\d{1,3}):(\d{1,3}),(\d{1,3})", text.strip())
    if not match:
        raise UsageError(f"--sketch-bits {text!r} is not understood: write e.g. 4,16,16:16,0 (components of K with 4, 2 and 1 "
                         f"bits, then of V with 4 and 2).")
    return dict(zip(("sketch_k4", "sketch_k2", "sketch_k1", "sketch_v4", "sketch_v2"), map(int, match.groups())))


def take_params(options: dict[str, Any]) -> tuple[SfiParams, bool]:
    """Remove the options of sfi_options from a dict; returns the parameters and whether the budget may be made smaller.

    A budget that was typed is kept or refused; the default one adapts to a small context. Raises ArgumentError.
    """
    names = ("support", "selector", *_BUDGET, "max_span", "min_span", "boundary", "repair", "n_queries", "query_stride", "pool_after",
             "pool_before")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    given.update(options.pop("sketch_bits") or {})
    return SfiParams.of(given.pop("support", _DEFAULT.support), **given).validate(), not any(name in given for name in _BUDGET)
