"""Options that there were in earlier versions: a script that gives one is told the new spelling."""

from __future__ import annotations

import re
from typing import Any, Callable

import click

from sfi_local.cli.spelling import KNOWN, spelled
from sfi_local.errors import UsageError
from sfi_local.params import SKETCH_BITS

PARAMETERS = ("policy", "selector", "n_sink", "n_recent", "n_selected", "max_span", "min_span", "n_queries", "n_slow_queries", "pool_after",
              "pool_before", "tolerance", "max_tail_mass", "second_look")
SWITCHES = ("boundary", "repair")
SAMPLERS = ("top_k", "top_p", "min_p", "draft")


def moved_parameters(command: Callable) -> Callable:
    """Hidden options that raise UsageError, on the commands that have --set."""
    for name in PARAMETERS:
        command = _hidden(name, f"--{name.replace('_', '-')}")(command)
    for name in SWITCHES:
        command = _hidden(name, f"--{name}/--no-{name}")(command)
    return click.option("--sketch-bits", hidden=True, expose_value=False, callback=_sketch_bits)(command)


def moved_samplers(command: Callable) -> Callable:
    """The same on the commands that have -o."""
    for name in SAMPLERS:
        command = _hidden(name, f"--{name.replace('_', '-')}")(command)
    return command


def _hidden(name: str, option: str) -> Callable:
    def refuse(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is None:
            return
        old = option.split("/")[-1 if value is False else 0]
        if name not in KNOWN:
            raise UsageError(f"{old} is gone with what it set: leave it out.")
        raise UsageError(f"{old} is spelled otherwise now: use {spelled(name, {True: 'on', False: 'off'}.get(value, value))}.")

    return click.option(option, f"old_{name}", hidden=True, expose_value=False, callback=refuse, default=None)


def _sketch_bits(ctx: click.Context, option: click.Parameter, text: str | None) -> None:
    """K4,K2,K1:V4,V2[:N]"""
    if text is None:
        return
    numbers = re.findall(r"\d+", text)
    fields = ",".join(f"{name}={number}" for name, number in zip(SKETCH_BITS, numbers if len(numbers) in (5, 6) else ["..."] * 6))
    raise UsageError(f"--sketch-bits is spelled otherwise now: use --set {fields}.")
