"""Options that several subcommands share, and what they become: the few that a person sets often, -o for samplers, --set for experts."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import click

from sfi_local.cli.moved import moved_parameters, moved_samplers
from sfi_local.cli.spelling import spelled
from sfi_local.errors import ArgumentError, UsageError
from sfi_local.fields import MAX_INT, kinds, meant, parse
from sfi_local.params import SfiParams
from sfi_local.runtime.modes import MODES
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.settings import KV_TYPE, MAX_CTX, MAX_LAYERS, MAX_THREADS, SMALL_KV_TYPE, Quality, Settings, parse_quality
from sfi_local.store.layout import KV_TYPES

OWN_OPTIONS = ("temp", "seed")  # fields of Sampling that have an option of their own
TEXTS = ("grammar", "json_schema")  # fields of Sampling whose value may come from a file
SAMPLERS = kinds(Sampling, without=OWN_OPTIONS)
MAX_TEXT = 1 << 20
PARAMETERS = kinds(SfiParams)
SET_ONLY = {"draft": int}  # of run and view, beside PARAMETERS
COUNT = click.IntRange(1, MAX_INT)


class BriefCommand(click.Command):
    """Help in which an option has one line where that is possible: a narrow first column, and no ranges, which refusals name."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([(name, _without_range(text)) for name, text in filter(None, (o.get_help_record(ctx) for o in options))],
                               col_max=24)


def _without_range(text: str) -> str:
    """Without click's ``[1<=x<=9]``, alone or behind a default."""
    return re.sub(r"; [-\d.<=>]*x[-\d.<=>]*]$", "]", re.sub(r"  \[[-\d.<=>]*x[-\d.<=>]*]$", "", text))


def answer_options(n: int | None, mode: str) -> Callable:
    """Options of a prompt and of how it is answered, with the defaults of -n and --mode."""
    return _all(
        click.option("-p", "--prompt", metavar="TEXT", help="The question or instruction."),
        click.option("-f", "--file", "file", metavar="FILE", help="Text that it is about; - reads stdin."),
        click.option("--system", metavar="TEXT", help="System prompt."),
        click.option("-n", "--n", "n", type=click.IntRange(-1, MAX_INT), default=n, metavar="N",
                     help=f"At most N tokens, -1: any [default: {n or '512; chat: -1'}]"),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
        click.option("--temp", type=click.FloatRange(0), default=Sampling.temp, metavar="X",
                     help=f"Temperature; 0: the likeliest token [default: {Sampling.temp}]"),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Seed of the sampler [default: random]"),
        click.option("-o", "--option", "samplers", multiple=True, metavar="KEY=VALUE", callback=_samplers,
                     help="A sampler, e.g. top_k=40; see `help knobs`."),
        click.option("--raw", is_flag=True, help="The text as it is, without the chat template."),
        click.option("--truncate", is_flag=True, help="Cut the file to what the context holds."),
        click.option("--max-prompt-tokens", type=COUNT, metavar="N", help="Cut the file to a prompt of N tokens."),
        click.option("--mode", type=click.Choice(list(MODES)), default=mode, metavar="MODE",
                     help=f"auto: slow-fast where it pays; sfi: always; exact: text of dense; dense; stock: llama.cpp's [{mode}]"),
        quality_option, set_options(**SET_ONLY), moved_samplers)


def model_options(command: Callable) -> Callable:
    """Options of loading a model."""
    return _all(
        click.option("--ctx", type=click.IntRange(16, MAX_CTX), metavar="N", help="Cells of the context [default: as needed]"),
        threads_option,
        click.option("--kv-type", type=click.Choice(list(KV_TYPES)), metavar="TYPE", help=f"{', '.join(KV_TYPES)} [default: {KV_TYPE}]"),
        low_memory_option,
        click.option("--lora", multiple=True, callback=_lora, metavar="FILE[:X]", help="A LoRA adapter, and its strength."),
        click.option("--yarn", callback=_yarn, metavar="TIMES[:N]", help="Stretch the trained context of N tokens by YaRN."),
        gpu_option,
        click.option("--kv-host", is_flag=True, help="K and V in the host's memory, not the GPU's."),
        force_option,
        click.option("--no-cache", is_flag=True, help="Keep nothing that is read, and read all of it."),
        click.option("--verbose", is_flag=True, help="Say more, and show llama.cpp's log on stderr."))(command)


def _all(*options: Callable) -> Callable:
    """One decorator of several, in the order in which help shows them."""
    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command
    return add


def threads_option(command: Callable) -> Callable:
    """--threads."""
    return click.option("-t", "--threads", type=click.IntRange(1, MAX_THREADS), metavar="N",
                        help="Threads [default: one per core]")(command)


def gpu_option(command: Callable) -> Callable:
    """--gpu-layers."""
    return click.option("--gpu-layers", type=click.IntRange(0, MAX_LAYERS), metavar="N",
                        help="Layers on a GPU; 0: none [default: all]")(command)


def _yarn(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[float, int] | float | None:
    """What load() takes. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?)(?::(\d{1,8}))?", text.strip())
    if not match:
        raise UsageError(f"--yarn {text!r} is not understood: write e.g. --yarn 4 or --yarn 4:32768.")
    return (float(match[1]), int(match[2])) if match[2] else float(match[1])


def _lora(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """(file, strength) of each. What stands behind the last colon is a strength only if it is a number: paths may have colons."""
    def one(text: str) -> tuple[str, float]:
        path, colon, strength = text.rpartition(":")
        try:
            return (path, float(strength)) if colon and path else (text, 1.0)
        except ValueError:
            return text, 1.0
    return tuple(map(one, texts))


def low_memory_option(command: Callable) -> Callable:
    """--low-memory."""
    return click.option("--low-memory", is_flag=True, help=f"For 2 to 4 GB: K, V as {SMALL_KV_TYPE}, smaller batches.")(command)


def force_option(command: Callable) -> Callable:
    """--force."""
    return click.option("--force", is_flag=True, help="Go on where the memory is too small.")(command)


def quality_option(command: Callable) -> Callable:
    """--quality, and --fidelity as what experts call it; see take_settings."""
    hidden = click.option("--fidelity", metavar="NATS", callback=_quality, hidden=True)
    return click.option("--quality", metavar="NAME", callback=_quality,
                        help="How close to dense: same (mode exact), close [default], fast (5 times as far), or nats.")(hidden(command))


def set_options(**own: type) -> Callable:
    """--set, and what had an option of its own once. own: fields beside those of SfiParams"""
    def typed(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
        return _parsed(texts, {**PARAMETERS, **own}, "--set")

    return _all(click.option("--set", "set_fields", multiple=True, metavar="KEY=VALUE", callback=typed,
                             help="A parameter, e.g. n_selected=512; see `help knobs`."),
                moved_parameters)


def _samplers(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest: list[str] = []
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name in OWN_OPTIONS:
            raise UsageError(f"-o {text}: {name} has an option of its own: use --{name}.")
        if name in TEXTS:
            given[name] = _text(name, value)
        else:
            rest.append(text)
    given.update(_parsed(tuple(rest), SAMPLERS, "-o"))
    with usage():
        Sampling(**given).validate()
    return given


def _text(name: str, value: str) -> str:
    """A value that may hold commas, or @FILE. Raises UsageError."""
    if not value.startswith("@"):
        return value
    try:
        with open(value[1:], encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"-o {name}: {value[1:]} cannot be read ({error}): give a text file.") from None
    if len(text) > MAX_TEXT:
        raise UsageError(f"-o {name}: {value[1:]} has more than {MAX_TEXT} characters, too many for a {name}.")
    return text


def _parsed(texts: tuple[str, ...], allowed: dict[str, type], source: str) -> dict[str, Any]:
    return {name: value for text in texts for name, value in parse(text, allowed, source).items()}


def _quality(ctx: click.Context, option: click.Parameter, text: str | None) -> Quality | None:
    """One of QUALITIES, ``floor`` or nats. Raises UsageError."""
    with usage():
        return None if text is None else parse_quality(text.strip())


@contextmanager
def usage() -> Iterator[None]:
    """What the library refuses of what was typed is a wrong use of the command."""
    try:
        yield
    except ArgumentError as error:
        raise UsageError(error.told(spelled)) from None


def take_settings(options: dict[str, Any]) -> Settings:
    """Remove the options of answer_options and model_options that say how to load and decode. Raises UsageError.

    ``draft`` is left among the options.
    """
    given = options.pop("set_fields")
    options["draft"] = given.pop("draft", None)
    kv_type = options.pop("kv_type")
    return _checked(Settings(mode=options.pop("mode"), n_ctx=options.pop("ctx"), n_threads=options.pop("threads"), type_k=kv_type,
                             type_v=kv_type, gpu_layers=options.pop("gpu_layers"), kv_host=options.pop("kv_host"), params=given,
                             quality=_take_quality(options), yarn=options.pop("yarn"), lora=options.pop("lora"), force=options.pop("force"),
                             cache=not options.pop("no_cache"), low_memory=options.pop("low_memory")))


def take_params(options: dict[str, Any]) -> Settings:
    """Remove the options of set_options and, where they are there, of quality_option; the mode is sfi. Raises UsageError."""
    return _checked(Settings(mode="sfi", params=options.pop("set_fields"), quality=_take_quality(options)))


def _take_quality(options: dict[str, Any]) -> Quality | None:
    quality, fidelity = options.pop("quality", None), options.pop("fidelity", None)
    if None not in (quality, fidelity):
        raise UsageError("--fidelity is another name of --quality: leave out one of them.")
    return fidelity if quality is None else quality


def _checked(settings: Settings) -> Settings:
    with usage():
        return settings.check()


def name_list(allowed: tuple[str, ...], what: str) -> Callable:
    """A callback that parses a list of names, in the order of ``allowed``; () where none is given. Raises UsageError."""
    def parse(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...]:
        if text is None:
            return ()
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
        match = re.fullmatch(r"\s*(\d+)(k?)\s*", item, re.I)
        if not match:
            raise UsageError(f"{item.strip()!r} is not a depth: write e.g. --depth 0,2000,8000 or --depth 32k (32768).")
        depth = int(match[1]) * (1024 if match[2] else 1)
        if depth > MAX_CTX:
            raise UsageError(f"A depth of {item.strip()} is more than a context can have: give at most {MAX_CTX}.")
        found.add(depth)
    return tuple(sorted(found))
