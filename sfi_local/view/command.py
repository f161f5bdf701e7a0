"""sfi-local view: where each generated token looked, as a page to open in a browser."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import click

from sfi_local.binding.library import source_id
from sfi_local.cli.options import BriefCommand, answer_options, model_options, take_settings
from sfi_local.cli.progress import Progress
from sfi_local.cli.report import kv_read_share, statistics
from sfi_local.cli.request import PromptRequest
from sfi_local.cli.terminal import say, tell_notes
from sfi_local.cli.thinking import take_thinking, template_options
from sfi_local.errors import InputError, UsageError
from sfi_local.runtime.step import Tally, TextStream
from sfi_local.view.data import Collector, page_data
from sfi_local.view.page import page
from sfi_local.view.png import draw
from sfi_local.whole_file import check_matplotlib, check_writable, written_whole


@click.command("view", cls=BriefCommand, short_help="Show where each generated token looked, as an HTML page.")
@click.argument("model")
@answer_options(n=100, mode="sfi")
@model_options
@template_options
@click.option("--html", metavar="FILE", default="view.html", show_default=True, help="Where the page is written.")
@click.option("--png", metavar="FILE", help="Also write a picture of it: the mean over all layers and heads.")
def command(**options: Any) -> None:
    """Generate with MODEL as `sfi-local run` does, and write a page that shows what the fast steps read of the text.

    \b
    sfi-local view smollm2-135m -f report.txt -p "What does the report conclude?"
    sfi-local view smollm2-135m -f report.txt -p "Who wrote it?" -n 50 --html who.html --png who.png
    sfi-local view smollm2-135m -f report.txt -p "Who wrote it?" --set n_selected=256 --temp 0

    The page is one file that loads nothing: it can be sent to others, and holds the text. For each token of the answer it
    shows the places that were read, the slow steps and why they were slow, how much of the attention the chosen
    places held and how much of the choice stayed, for each layer and KV head or for their mean.

    The paths of what was written go to stdout.
    """
    request = ViewRequest(settings=take_settings(options), thinking=take_thinking(options), **options)
    request.check()
    view(request)


@dataclass
class ViewRequest(PromptRequest):
    """A PromptRequest whose generation is drawn. html, png: paths; png may be None"""

    html: str
    png: str | None

    def check(self) -> None:
        """Everything that would make the work useless is refused before it."""
        super().check()

        if not self.has_prompt():
            raise InputError("There is nothing to view: give a text with -f, a question with -p, or text on stdin.")
        check_writable(self.html)
        if self.png is None:
            return
        if not self.png.lower().endswith(".png"):
            raise UsageError(f"--png {self.png}: give a name that ends in .png.")
        if self.png == self.html:
            raise UsageError(f"--html and --png are both {self.png}: give two names.")
        check_writable(self.png)
        check_matplotlib("--png")


def view(request: ViewRequest) -> None:
    """Generate, collecting what the hook says after each step; then write the files."""
    document, question = request.texts()
    with request.load() as model:
        tokens = request.prompt_tokens(model, document, question)
        sampling = request.sampling()
        collector, tally = collect(model, tokens, sampling, request)
        if not tally.steps["fast"]:
            collector.forget_choices()
        pieces = texts_of(model.vocabulary, [*tokens, *tally.tokens])
        data = page_data(collector, pieces, about(model, request, sampling, question))
        say(statistics(model, tally))
    if not tally.steps["fast"]:
        say("No step was fast, so the page has little to show: take --mode sfi and more tokens.")
    write(request, data, collector)


def collect(model: Any, tokens: list[int], sampling: Any, request: ViewRequest) -> tuple[Any, Any]:
    """(Collector, Tally) of one generation, by the same stream of steps as `run`."""
    tally = Tally(n_prompt=len(tokens))
    with Progress("reading", "tokens", "preparing") as prefill:
        steps = model.generate(tokens, n=request.n_limit, sampling=sampling, stop=request.stop, draft=request.draft,
                               progress=prefill, think_budget=request.thinking.budget)
        first = next(steps)
    tell_notes(model)
    collector, n = Collector.of(model.session, len(tokens)), request.n_limit or model.session.n_ctx - len(tokens)
    with Progress("answering", "tokens") as answer:
        for step in itertools.chain([first], steps):
            collector.add(step)
            tally.add(step)
            answer(len(tally.tokens), n)
    tally.n_prefilled = model.session.n_prefilled
    return collector, tally


def texts_of(vocabulary: Any, tokens: list[int]) -> list[str]:
    """The text that each token completes: "" while a character is incomplete, the name of a special token."""
    text, out = TextStream(), []
    for i, token in enumerate(tokens):
        piece = vocabulary.piece(token)
        out.append(text.push(piece, last=i == len(tokens) - 1) if piece else vocabulary.name(token))
    return out


def about(model: Any, request: ViewRequest, sampling: Any, question: str) -> dict[str, Any]:
    """What the heading and the last line of the page say."""
    import datetime

    import sfi_local

    params = model.session.params
    return {
        "model": model.name,
        "question": question,
        "mode": request.mode,
        "policy": params.policy,
        "selector": params.selector,
        "kv_read_share": kv_read_share(model),
        "made": f"sfi-local {sfi_local.__version__}, {source_id()}, {datetime.date.today().isoformat()}; mode {request.mode}, "
                f"policy {params.policy}, selector {params.selector}, budget {params.n_sink} + {params.n_recent} + "
                f"{params.n_selected} cells per layer and KV head; temperature {sampling.temp:g}, seed {sampling.seed}.",
    }


def write(request: ViewRequest, data: dict[str, Any], collector: Any) -> None:
    """The files, each whole or not at all; their paths on stdout."""
    with written_whole(request.html) as part:
        part.write_text(page(data), encoding="utf-8")
    click.echo(request.html)
    if request.png:
        with written_whole(request.png) as part:
            draw(data, collector, part)
        click.echo(request.png)
