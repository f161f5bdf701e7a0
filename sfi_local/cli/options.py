"""Options that several subcommands share, and what they become."""

from __future__ import annotations

import re
from typing import Any, Callable, NamedTuple

import click

from sfi_local.errors import ArgumentError, UsageError
from sfi_local.fields import meant
from sfi_local.params import BUDGET, POLICIES, PORTABLE_POLICY, SELECTORS, SKETCH_BITS, SfiParams
from sfi_local.store.layout import KV_TYPES
from sfi_local.tuning.tolerance import DEFAULT, parse

_DEFAULT = SfiParams()


def answer_options(n: int | None, mode: str) -> Callable:
    """Options of a prompt and of how it is answered, with the defaults of -n and --mode."""
    def add(command: Callable) -> Callable:
        for option in reversed((
            click.option("-f", "--file", "file", metavar="FILE", help="Text the question is about; - reads stdin."),
            click.option("-p", "--prompt", metavar="TEXT", help="The question or instruction."),
            click.option("-n", "--n", "n", type=click.IntRange(-1), default=n, show_default=True if n else "512; in a chat no limit",
                         metavar="N", help="Tokens to generate at most; -1: until the answer ends or the context is full."),
            click.option("--mode", type=click.Choice(["auto", "sfi", "exact", "dense", "stock"]), default=mode, show_default=True,
                         help="sfi: slow-fast; exact: slow-fast drafts, verified: the text of dense; dense: every step dense; stock: "
                              "llama.cpp's own path; auto: sfi where it pays."),
            click.option("--draft", type=click.IntRange(0, 32), metavar="N",
                         help="Mode exact: tokens drafted per span [default: as many as pay]."),
            click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Seed of the sampler [default: random]."),
            click.option("--temp", type=click.FloatRange(0), default=0.8, show_default=True, metavar="X",
                         help="Temperature; 0 takes the most likely token."),
            click.option("--top-k", type=click.IntRange(0), default=40, show_default=True, metavar="N", help="0: all tokens."),
            click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="X"),
            click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, metavar="X"),
            click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be given several times."),
            click.option("--system", metavar="TEXT", help="System prompt."),
            click.option("--raw", is_flag=True, help="Give the text to the model as it is, without its chat template."),
            click.option("--max-prompt-tokens", type=click.IntRange(1), metavar="N",
                         help="Take only the head of the file, so that the whole prompt has N tokens at most."),
            click.option("--truncate", is_flag=True, help="Take only the head of the file, as much as the context holds."),
        )):
            command = option(command)
        return command
    return add


def model_options(command: Callable) -> Callable:
    """Options of loading a model."""
    for option in reversed((
        click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads [default: one per core]."),
        click.option("--ctx", type=click.IntRange(16), metavar="N",
                     help="Cells of the context [default: as needed, up to what the model was trained on]."),
        click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True,
                     help="Type of K and V in the cache."),
        click.option("--yarn", callback=_yarn, metavar="TIMES[:TRAINED]",
                     help="Stretch the trained context by YaRN, as e.g. Qwen2.5 and Qwen3 need beyond 32768 tokens: 4 makes it four "
                          "times as long, 4:32768 if the file says more than the model was trained on. Short texts suffer a little."),
        gpu_option,
        force_option,
        click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr."),
    )):
        command = option(command)
    return command


def _yarn(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, int] | float | None:
    """What load() takes. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?)(?::(\d{1,8}))?", text.strip())
    if not match:
        raise UsageError(f"--yarn {text!r} is not understood: write e.g. --yarn 4 or --yarn 4:32768.")
    return (float(match[1]), int(match[2])) if match[2] else float(match[1])


def gpu_option(command: Callable) -> Callable:
    """--gpu-layers."""
    return click.option("--gpu-layers", type=click.IntRange(0, 9999), metavar="N",
                        help="Layers that a GPU holds and computes, the output being one more; 0: none "
                             "[default: all, where the build has a GPU backend].")(command)


def force_option(command: Callable) -> Callable:
    """--force."""
    return click.option("--force", is_flag=True, help="Go on where the memory is too small.")(command)


def sfi_options(command: Callable) -> Callable:
    """Options of the support and the schedule; None where not given."""
    for option in reversed((
        click.option("--policy", type=click.Choice(list(POLICIES)),
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
        _count("--n-queries", 1, "Evidence of the last N queries at the end of the prompt, 64 at most."),
        _count("--pool-after", 0, "An important cell brings N cells after it ..."),
        _count("--pool-before", 0, "... and N cells before it."),
        click.option("--tolerance", type=click.FloatRange(0), metavar="X",
                     help=f"Policy sketch: cells are attended to exactly if their share of the attention times the error of their "
                          f"logit is larger, --n-selected at most; 0: always so many [default: {_DEFAULT.tolerance:g}]."),
        sketch_options,
    )):
        command = option(command)
    return command


def sketch_options(command: Callable) -> Callable:
    """--sketch-bits: the fields of SfiParams that differ, and --second-look; each None where not given."""
    command = click.option("--second-look", type=click.FloatRange(0), metavar="X",
                           help="Policy sketch, --sketch-bits with N: the rest of a cell's sketch is read if that gives it X times "
                                f"the mean share of the attention [default: {_DEFAULT.second_look:g}].")(command)
    return click.option("--sketch-bits", callback=_sketch_bits, metavar="K4,K2,K1:V4,V2[:N]",
                        help="Components of the sketch: of K with 4, 2 and 1 bits, of V with 4 and 2 "
                             "[default: 8,48,0:0,16:2, for heads of 128 values 8,80,0:0,32:3]. "
                             "With N, N times 4 bytes of K are read of every cell, the rest only of cells that seem to matter.")(command)


def fidelity_option(command: Callable) -> Callable:
    """--fidelity, beside sfi_options; see take_params."""
    return click.option("--fidelity", callback=_fidelity, metavar="X",
                        help="Take the largest tolerance with which the model stays within X nats of dense, or within the noise "
                             "of two dense implementations (floor), as `sfi-local calibrate` measured "
                             "[default: floor, where the model is calibrated].")(command)


def _count(name: str, least: int, text: str) -> Callable:
    field = name[2:].replace("-", "_")
    default, frozen = getattr(_DEFAULT, field), getattr(SfiParams.of("frozen"), field)
    other = f"; {frozen} for frozen and window" if frozen != default else ""
    return click.option(name, type=click.IntRange(least), metavar="N", help=f"{text} [default: {default}{other}]")


def _sketch_bits(ctx: click.Context, option: click.Parameter, text: str | None) -> dict[str, int] | None:
    """The fields of SfiParams that K4,K2,K1:V4,V2 names. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,3}),(\d{1,3}),(\d{1,3}):(\d{1,3}),(\d{1,3})(?::(\d{1,2}))?", text.strip())
    if not match:
        raise UsageError(f"--sketch-bits {text!r} is not understood: write e.g. 4,12,24:0,16 or 8,48,0:0,16:2 (components of K with "
                         f"4, 2 and 1 bits, of V with 4 and 2, and how many times 4 bytes of K are read of every cell).")
    return dict(zip(SKETCH_BITS, (int(n or 0) for n in match.groups())))


def _fidelity(ctx: click.Context, option: click.Parameter, text: str | None) -> float | str | None:
    """Nats or ``floor``. Raises UsageError."""
    if text is None:
        return None

    try:
        return parse(text.strip())
    except ArgumentError as error:
        raise UsageError(str(error)) from None


class Fit(NamedTuple):
    """What may be adapted because it was not typed: the budget to a small context, the policy to a device that lacks it.

    portable: the same choices under the policy that every device has; None: the policy was typed
    """

    budget: bool
    portable: SfiParams | None


def take_params(options: dict[str, Any]) -> tuple[SfiParams, Fit]:
    """Remove the options of sfi_options from a dict; returns the parameters and what of them may be adapted.

    What was typed is kept or refused. Of fidelity_option,
    where the command has it, stays ``fidelity``: what tolerance.params_for takes. Raises ArgumentError, UsageError.
    """
    names = ("policy", "selector", *BUDGET, "max_span", "min_span", "boundary", "n_queries", "pool_after",
             "pool_before", "tolerance", "second_look")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    given.update(options.pop("sketch_bits") or {})
    portable = None if "policy" in given else SfiParams.of(PORTABLE_POLICY, **given)
    fit = Fit(not any(name in given for name in BUDGET), portable)
    params = SfiParams.of(given.pop("policy", _DEFAULT.policy), **given).validate()
    if "fidelity" in options:
        options["fidelity"] = _settled_by(options["fidelity"], params, "tolerance" in given)
    return params, fit


def _settled_by(fidelity: float | str | None, params: SfiParams, has_tolerance: bool) -> float | str | None:
    """The fidelity that decides the tolerance; None: it stays. Raises UsageError where two things decide it."""
    if fidelity is None:
        return None if has_tolerance or params.policy != "sketch" else DEFAULT
    if has_tolerance:
        raise UsageError("--fidelity chooses the tolerance: leave out --tolerance, or --fidelity.")
    if params.policy != "sketch":
        raise UsageError(f"--fidelity chooses the tolerance of policy sketch: leave out --policy {params.policy}, or "
                         f"--fidelity.")
    return fidelity


def name_list(allowed: tuple[str, ...], what: str) -> Callable:
    """A callback that parses a list of names, in the order of ``allowed``. Raises UsageError."""
    def parse(ctx: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
        given = [name.strip() for name in text.split(",") if name.strip()]
        for name in given:
            if name not in allowed:
                raise UsageError(f"There is no {what} {name!r}:{meant(name, allowed)} There are {', '.join(allowed)}.")
        if not given:
            raise UsageError(f"{option.opts[0]} is empty: give one or more of {', '.join(allowed)}.")
        return tuple(name for name in allowed if name in given)
    return parse


def depth_list(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """A callback that parses depths, in ascending order; 32k is 32768. Raises UsageError."""
    found = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(k?)\s*", item, re.I)
        if not match:
            raise UsageError(f"{item.strip()!r} is not a depth: write e.g. --depth 0,2000,8000 or --depth 32k (32768).")
        found.add(int(match[1]) * (1024 if match[2] else 1))
    return tuple(sorted(found))
