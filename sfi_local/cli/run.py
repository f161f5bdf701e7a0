"""sfi-local run: answer a prompt, about a file if one is given; chat on a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import click

from sfi_local.cli.chat import chat
from sfi_local.cli.options import answer_options, fidelity_option, model_options, sfi_options, take_params
from sfi_local.cli.report import report, statistics
from sfi_local.cli.request import PromptRequest
from sfi_local.cli.terminal import marks_wanted, progress, say, show, tell_marks, tell_notes
from sfi_local.errors import UsageError
from sfi_local.runtime.step import Tally

WHEN = ("auto", "always", "never")


class RunCommand(click.Command):
    """``--color`` may stand alone: a word after it that is not one of WHEN is not its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [*args, ""]
        return super().parse_args(ctx, ["--color=auto" if word == "--color" and after not in WHEN else word
                                        for word, after in zip(words, words[1:])])


@click.command("run", cls=RunCommand, short_help="Answer a prompt, about a file if one is given; chat on a terminal.")
@click.argument("model")
@answer_options(n=512, mode="auto")
@sfi_options
@fidelity_option
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer.")
@click.option("--color", type=click.Choice(WHEN), default="never", show_default=True,
              help="Mark each token by the kind of its step, slow ones in bold; auto, or --color alone: on a terminal, "
                   "unless NO_COLOR is set.")
def command(**options: Any) -> None:
    """Generate with MODEL: a name that `sfi-local models` lists (fetched on first use), hf:USER/REPO:QUANT, or a path.

    \b
    sfi-local run smollm2-135m -p "Name three rivers."
    sfi-local run smollm2-135m -f report.txt -p "What does the report conclude?"
    cat report.txt | sfi-local run smollm2-135m -f - -p "Summarise this."
    sfi-local run ./model.gguf --mode sfi --n-selected 1024 --temp 0 -f report.txt -p "Who wrote it?" --json
    sfi-local run smollm2-135m

    With -f and -p the model gets one user message in its own chat template: the file's text first, then the question.
    Without -f and -p it reads the prompt from stdin if that is not a terminal, and chats if it is.

    The answer alone goes to stdout; progress goes to stderr and, after the answer, a line of statistics: speed of
    prefill and decode (steps only), how many steps were slow or dense and why, how many fast, and the share of KV
    bytes read compared with dense decoding. In mode exact also how many tokens were drafted and how many of them kept,
    and ties: tokens that rounding might have decided otherwise.
    """
    params, fit = take_params(options)
    request = RunRequest(**options, params=params, fit_budget=fit.budget, portable_params=fit.portable)
    request.check()
    if request.is_chat():
        chat(request)
    else:
        answer(request)


@dataclass
class RunRequest(PromptRequest):
    """A PromptRequest whose answer is shown or printed as JSON. color: one of WHEN"""

    as_json: bool
    color: str

    def check(self) -> None:
        super().check()
        if self.is_chat() and (self.as_json or self.raw):
            raise UsageError("--json and --raw need a prompt: give -p, -f, or text on stdin.")

    def is_chat(self) -> bool:
        return not self.has_prompt()

    def marks(self) -> bool:
        """Whether tokens are marked; the legend goes to stderr."""
        marked = marks_wanted(self.color) and not self.as_json
        if marked:
            tell_marks(self.mode)
        return marked


def answer(request: PromptRequest) -> None:
    """One prompt, one answer."""
    document, question = request.texts()
    with request.load() as model:
        tokens = request.prompt_tokens(model, document, question)
        sampling = request.sampling()
        tally = stream(model, tokens, sampling, request, echo=not request.as_json)
        if request.as_json:
            print(json.dumps(report(model, tally, request, sampling), ensure_ascii=False))
        else:
            say(statistics(model, tally))


def stream(model: Any, tokens: list[int], sampling: Any, request: PromptRequest, echo: bool) -> Any:
    """Generate and show; returns the Tally."""
    tally = Tally(n_prompt=len(tokens))
    marked = request.marks()
    with progress("prefill", "tokens") as prefill:
        for step in model.generate(tokens, n=request.n_limit, sampling=sampling, stop=request.stop, draft=request.draft,
                                   progress=prefill):
            if not tally.tokens:
                prefill.close()
                tell_notes(model)
            tally.add(step)
            if echo:
                show(step, marked)
    tally.n_prefilled = model.session.n_prefilled
    if echo and not tally.text.endswith("\n"):
        sys.stdout.write("\n")
    return tally
