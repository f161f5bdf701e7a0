"""Options about thoughts and about the chat template, what they become, and what is said of a thought without an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Callable

import click

from sfi_local.errors import UsageError
from sfi_local.fields import MAX_INT

HIDE = "hide"


@dataclass(frozen=True)
class Thinking:
    """The options below. arguments: of --template-arg, by name"""

    arguments: dict[str, Any] = field(default_factory=dict)
    think: bool | None = None
    budget: int | None = None
    hidden: bool = False
    keep: bool = True

    def check(self, raw: bool) -> None:
        """Refuse what needs a chat template where there is none."""
        if raw and (self.arguments or self.think is not None):
            raise UsageError("--raw leaves out the chat template, which --template-arg and --think are for: leave out one of them.")

    def apply(self, model: Any) -> None:
        """Make the model's chat template heed them. Raises InputError."""
        model.set_template(arguments=self.arguments, think=self.think, keep_thoughts=self.keep)


def template_options(command: Callable) -> Callable:
    """What a prompt is made with; take_thinking takes them."""
    for option in reversed((
        click.option("--think/--no-think", "think", default=None, help="Thoughts, if the template can switch them."),
        click.option("--think-budget", type=click.IntRange(0, MAX_INT), metavar="N", help="End a thought after N tokens."),
        click.option("--template-arg", "template_args", multiple=True, metavar="K=VALUE", callback=_arguments,
                     help="A variable of the template, JSON or text."),
    )):
        command = option(command)
    return command


def thought_options(command: Callable) -> Callable:
    """What becomes of thoughts; take_thinking takes them."""
    for option in reversed((
        click.option("--thoughts", type=click.Choice(["show", HIDE]), default="show", metavar="HOW",
                     help="show [default] on stderr, or hide."),
        click.option("--drop-thoughts", is_flag=True, help="Chat: earlier thoughts leave the prompt."),
    )):
        command = option(command)
    return command


def take_thinking(options: dict[str, Any]) -> Thinking:
    """Remove the options from a dict, those of thought_options if they are there; returns what they say."""
    return Thinking(options.pop("template_args"), options.pop("think"), options.pop("think_budget"),
                    options.pop("thoughts", "") == HIDE, not options.pop("drop_thoughts", False))


def _arguments(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """{name: value}; what is no JSON is text. Raises UsageError."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip().isidentifier():
            raise UsageError(f"--template-arg {text!r} is not understood: write e.g. --template-arg enable_thinking=false.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def no_answer(tally: Any) -> str:
    """What is to be said of a run that ended inside a thought; "" for any other."""
    if not tally.in_thought or tally.finish not in ("length", "context", "end"):
        return ""
    if tally.finish == "end":
        return "The model ended inside its thought, without an answer: ask again, or take --no-think (in a chat /think off)."
    return "It ended inside the thought, before an answer: give a larger -n, --think-budget N, or --no-think (in a chat /think off)."
