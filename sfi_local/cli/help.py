"""sfi-local help: what can be set, made from the dataclasses that hold it; the environment; and what statistics mean."""

from __future__ import annotations

import textwrap
from typing import Any, Callable, Iterator

import click

from sfi_local.cli.options import SAMPLERS
from sfi_local.environment import VARIABLES
from sfi_local.errors import UsageError
from sfi_local.fields import described, kinds, meant
from sfi_local.params import POLICIES, SfiParams
from sfi_local.runtime.sampling import Sampling

WIDTH = 78

STATISTICS = """\
The line on stderr after an answer says how many tokens were read and written, at how many per second (steps only), how many steps \
were slow, dense or fast, the bytes of K and V that were read beside those of dense decoding, and how close to dense that is.

slow     dense attention over all cells
fast     attention over the support only, see --set policy
dense    in mode auto below the depth where fast steps pay, and in mode dense
stock    llama.cpp's own decoding

With --verbose also why steps were slow or dense, what mode auto decided and why, and in mode exact how many tokens were drafted, how \
many of them were kept, and ties: tokens that rounding might have decided otherwise. --json has all of it, as fields.

"(6400 from disk)": so many tokens of the prompt were read another day and kept, see `sfi-local cache --help`."""


@click.command("help", short_help="Explain what can be set: knobs, environment, statistics.")
@click.argument("topic", required=False)
@click.pass_context
def command(ctx: click.Context, topic: str | None) -> None:
    """Explain a TOPIC, or a command.

    \b
    sfi-local help knobs          what -o and --set take, with the defaults
    sfi-local help environment    variables that are read
    sfi-local help statistics     the line that follows an answer
    sfi-local help run            the same as sfi-local run --help
    """
    group: Any = ctx.find_root().command
    if topic is None:
        click.echo(command.get_help(ctx))
    elif topic in TOPICS:
        click.echo(TOPICS[topic]())
    elif (wanted := group.get_command(ctx, topic)) is not None:
        click.echo(wanted.get_help(click.Context(wanted, info_name=topic, parent=ctx.find_root())))
    else:
        known = [*TOPICS, *group.list_commands(ctx)]
        raise UsageError(f"There is no topic {topic!r}:{meant(topic, known) or ' there are ' + ', '.join(known) + '.'}")


def knobs() -> str:
    """Every sampler and every parameter: default, unit, and what its dataclass says of it."""
    return "\n".join([
        "-o KEY=VALUE: samplers, on run and view; --temp and --seed are options of their own.", "",
        *_table(Sampling, SAMPLERS, _default_of_sampler),
        *_entry("grammar, json_schema", "none", "GBNF text, or a JSON schema, that the answer obeys; @FILE reads it from a file", ""), "",
        "--set FIELD=VALUE[,FIELD=VALUE]: parameters of slow-fast decoding, on run, view, bench, eval, inspect and calibrate.",
        "Defaults are those of policy sketch; others that differ are named.", "",
        *_table(SfiParams, kinds(SfiParams), _default_of_parameter),
        *_entry("draft", "as many as pay", "mode exact, run and view: tokens drafted per span at most, by the text itself or by fast steps", "tokens"),
        *_entry("auto_depth=0 in mode auto", "measured", "the depth is measured once per model, or is that of SFI_LOCAL_AUTO_DEPTH", "cells")])


def _table(cls: type, names: Any, default: Callable[[str], str]) -> Iterator[str]:
    """Fields that a docstring describes together stand together."""
    texts, shown = described(cls), list(names)
    while shown:
        about = texts.get(shown[0])
        together = [name for name in shown if texts.get(name) is about] if about else shown[:1]
        yield from _entry(", ".join(together), ", ".join(dict.fromkeys(default(name) for name in together)) if len(together) == 1 else
                          ", ".join(default(name) for name in together), about.text if about else "", about.unit if about else "")
        shown = [name for name in shown if name not in together]


def _entry(names: str, default: str, text: str, unit: str) -> list[str]:
    head = f"  {names}  [{default}]" + (f"  {unit}" if unit else "")
    return [*textwrap.wrap(head, WIDTH, subsequent_indent="  "),
            *textwrap.wrap(text.replace("``", ""), WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _default_of_sampler(name: str) -> str:
    return _shown(getattr(Sampling, name))


def _default_of_parameter(name: str) -> str:
    """That of policy sketch, and those of others where they differ."""
    default = getattr(SfiParams(), name)
    others: dict[str, Any] = {}
    for policy in POLICIES:
        value = getattr(SfiParams.of(policy), name)
        if value != default and name != "policy":
            others.setdefault(_shown(value), []).append(policy)
    return "; ".join([_shown(default), *(f"{' and '.join(policies)}: {value}" for value, policies in others.items())])


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def environment() -> str:
    """Every variable that is read."""
    lines = ["Variables that are read from the environment:", ""]
    for name, text in VARIABLES.items():
        lines += [f"  {name}", *textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")]
    return "\n".join(lines)


def statistics() -> str:
    """What the line after an answer says."""
    return "\n".join(textwrap.fill(line, WIDTH) for line in STATISTICS.splitlines())


TOPICS: dict[str, Callable[[], str]] = {"knobs": knobs, "environment": environment, "statistics": statistics}

