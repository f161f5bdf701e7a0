"""sfi-local run: answer a prompt, about a file if one is given; chat on a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import click

from sfi_local.cli.options import BriefCommand, answer_options, model_options, take_settings
from sfi_local.cli.progress import Progress
from sfi_local.cli.report import report, short_statistics, statistics
from sfi_local.cli.request import PromptRequest
from sfi_local.cli.stream import Screen, stream
from sfi_local.cli.terminal import marks_wanted, say, tell_marks
from sfi_local.cli.thinking import no_answer, take_thinking, template_options, thought_options
from sfi_local.errors import UsageError
from sfi_local.runtime.step import Tally

WHEN = ("auto", "always", "never")
N_ANSWER = 512  # tokens of an answer at most, where -n is not given; in a chat as many as there is room for


class RunCommand(BriefCommand):
    """``--color`` may stand alone: a word after it that is not one of WHEN is not its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [*args, ""]
        return super().parse_args(ctx, ["--color=auto" if word == "--color" and after not in WHEN else word
                                        for word, after in zip(words, words[1:])])


@click.command("run", cls=RunCommand, short_help="Answer a prompt, about a file if one is given; chat on a terminal.")
@click.argument("model")
@answer_options(n=None, mode="auto")
@model_options
@template_options
@thought_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object in the place of the answer.")
@click.option("--quiet", is_flag=True, help="No line of statistics after an answer.")
@click.option("--no-history", is_flag=True, help="Chat: keep nothing of what is typed.")
@click.option("--color", type=click.Choice(WHEN), default="never", metavar="WHEN",
              help="Mark tokens by their steps: auto, always, never.")
def command(**options: Any) -> None:
    """Answer with MODEL: a name of `models`, hf:USER/REPO:QUANT, or a path.

    \b
    sfi-local run smollm2-135m
    sfi-local run smollm2-135m -p "Name three rivers."
    sfi-local run smollm2-135m -f report.txt -p "What does the report conclude?"
    cat report.txt | sfi-local run smollm2-135m -f - -p "Summarise this." --json

    Without -p it is a chat on a terminal, about the file if any; elsewhere stdin is the prompt. The answer alone goes to stdout
    (stderr: `help statistics`).
    """
    request = RunRequest(settings=take_settings(options), thinking=take_thinking(options), **options)
    if request.n is None:
        request.n = -1 if request.is_chat() else N_ANSWER
    request.check()
    if request.is_chat():
        from sfi_local.cli.chat import chat

        chat(request)
    else:
        answer(request)


@dataclass
class RunRequest(PromptRequest):
    """A PromptRequest whose answer is shown or printed as JSON, or a chat. color: one of WHEN"""

    as_json: bool
    quiet: bool
    no_history: bool
    color: str

    def check(self) -> None:
        super().check()
        if self.is_chat() and (self.as_json or self.raw):
            raise UsageError("--json and --raw need a prompt: give -p, -f, or text on stdin.")

    def is_chat(self) -> bool:
        """A terminal to type at and no question; about a file only where the answers are seen."""
        if self.has_prompt() and (self.file in (None, "-") or self.as_json or self.raw or not sys.stdout.isatty()):
            return False
        return self.prompt is None and sys.stdin is not None and sys.stdin.isatty()

    def marks(self) -> bool:
        """Whether tokens are marked; the legend goes to stderr."""
        marked = marks_wanted(self.color) and not self.as_json
        if marked:
            tell_marks(self.mode)
        return marked


def answer(request: RunRequest) -> None:
    """One prompt, one answer."""
    document, question = request.texts()
    with request.load() as model:
        tokens, sampling = request.prompt_tokens(model, document, question), request.sampling()
        tally, marked = Tally(n_prompt=len(tokens)), request.marks()
        stream(model, tokens, request, sampling, tally, Progress("reading", "tokens", "preparing"),
               None if request.as_json else Screen(marked, request.thinking.hidden))
        if request.as_json:
            print(json.dumps(report(model, tally, request, sampling), ensure_ascii=False))
            return
        if why := no_answer(tally):
            say(why)
        if request.verbose:
            say(statistics(model, tally))
        elif not request.quiet:
            say(short_statistics(model, tally))
