"""sfi-local run: answer a prompt, about a file if one is given; chat on a terminal."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from dataclasses import dataclass
from typing import Any

import click

from sfi_local.errors import InputError, UsageError
from sfi_local.options import model_options, sfi_options, take_params

SLOW_STYLE, FAST_STYLE, RESET = "\x1b[33m", "\x1b[32m", "\x1b[0m"


@click.command("run", short_help="Answer a prompt, about a file if one is given; chat on a terminal.")
@click.argument("model")
@click.option("-f", "--file", "file", metavar="FILE", help="Text the question is about; - reads stdin.")
@click.option("-p", "--prompt", metavar="TEXT", help="The question or instruction.")
@click.option("-n", "--n", "n", type=click.IntRange(-1), default=512, show_default=True, metavar="N",
              help="Tokens to generate at most; -1: until the answer ends or the context is full.")
@click.option("--mode", type=click.Choice(["auto", "sfi", "exact", "dense", "stock"]), default="auto", show_default=True,
              help="sfi: slow-fast; exact: slow-fast drafts, verified: the text of dense; dense: every step dense; stock: "
                   "llama.cpp's own path; auto: sfi where it pays.")
@click.option("--draft", type=click.IntRange(0, 32), metavar="N",
              help="Mode exact: tokens drafted per span [default: as many as pay].")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Seed of the sampler [default: random].")
@click.option("--temp", type=click.FloatRange(0), default=0.8, show_default=True, metavar="X",
              help="Temperature; 0 takes the most likely token.")
@click.option("--top-k", type=click.IntRange(0), default=40, show_default=True, metavar="N", help="0: all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="X")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, metavar="X")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be given several times.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="Give the text to the model as it is, without its chat template.")
@click.option("--max-prompt-tokens", type=click.IntRange(1), metavar="N",
              help="Take only the head of the file, so that the whole prompt has N tokens at most.")
@click.option("--truncate", is_flag=True, help="Take only the head of the file, as much as the context holds.")
@sfi_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer.")
@click.option("--color", is_flag=True, help="On a terminal, mark the tokens of slow steps yellow, of fast steps green.")
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
    params, fit_budget = take_params(options)
    request = Request(**options, params=params, fit_budget=fit_budget)
    request.check()
    if request.is_chat():
        from sfi_local.chat import chat
        chat(request)
    else:
        answer(request)


@dataclass
class Request:
    """What was asked for; the options of the command by their names, in their units."""

    model: str
    file: str | None
    prompt: str | None
    n: int
    mode: str
    draft: int | None
    seed: int | None
    temp: float
    top_k: int
    top_p: float
    min_p: float
    stop: tuple[str, ...]
    system: str | None
    raw: bool
    max_prompt_tokens: int | None
    truncate: bool
    threads: int | None
    ctx: int | None
    kv_type: str
    verbose: bool
    as_json: bool
    color: bool
    params: Any
    fit_budget: bool

    def check(self) -> None:
        """Refuse combinations that cannot be meant, and texts that are none."""
        from sfi_local.text_input import from_argument

        if self.n == 0:
            raise UsageError("-n 0 generates nothing: give 1 or more, or -1 for no limit.")
        if self.draft is not None and self.mode != "exact":
            raise UsageError("--draft is for mode exact: add --mode exact, or leave it out.")
        if (self.max_prompt_tokens or self.truncate) and self.file is None:
            raise UsageError("--max-prompt-tokens and --truncate take the head of a file: give one with -f.")
        if self.raw and self.system is not None:
            raise UsageError("--raw leaves out the chat template, so there is no place for --system: put it into -p.")
        if self.is_chat() and (self.as_json or self.raw):
            raise UsageError("--json and --raw need a prompt: give -p, -f, or text on stdin.")
        for name, text in (("--system", self.system or ""), *(("--stop", text) for text in self.stop)):
            from_argument(text, name)

    def is_chat(self) -> bool:
        return self.prompt is None and self.file is None and sys.stdin is not None and sys.stdin.isatty()

    def texts(self) -> tuple[str, str]:
        """(document, question); one of them may be empty, not both. Raises InputError."""
        from sfi_local import text_input

        document = text_input.from_file(self.file) if self.file is not None else ""
        if self.prompt is not None:
            question = text_input.from_argument(self.prompt, "-p")
            if self.file is None:
                _note_unread_stdin()
        else:
            question = text_input.from_stdin() if self.file is None else ""
        if not (document.strip() or question.strip()):
            raise InputError("The prompt is empty: give text with -p, a file with -f, or text on stdin.")
        return document, question

    def load(self) -> Any:
        """The Model, with progress on stderr."""
        from sfi_local.model import load

        with progress("fetching", "bytes") as fetching:
            path = resolve_noted(self.model, fetching)
        with progress("loading", "%") as loading:
            return load(path, mode=self.mode, n_ctx=self.ctx, n_threads=self.threads, type_k=self.kv_type,
                        type_v=self.kv_type, params=self.params, fit_budget=self.fit_budget, verbose=self.verbose,
                        progress=loading)

    def sampling(self) -> Any:
        from sfi_local.sampling import Sampling

        seed = {} if self.seed is None else {"seed": self.seed}
        return Sampling(temp=self.temp, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, **seed)

    @property
    def n_limit(self) -> int | None:
        return None if self.n < 0 else self.n


def answer(request: Request) -> None:
    """One prompt, one answer."""
    document, question = request.texts()
    with request.load() as model:
        tokens = prompt_tokens(model, request, document, question)
        sampling = request.sampling()
        tally = stream(model, tokens, sampling, request, echo=not request.as_json)
        if request.as_json:
            print(json.dumps(report(model, tally, request, sampling), ensure_ascii=False))
        else:
            say(statistics(model, tally))


def prompt_tokens(model: Any, request: Request, document: str, question: str) -> list[int]:
    """Token ids of the prompt, the document cut as the request allows. Raises InputError if it does not fit."""
    from sfi_local.prompt import Message, fit_tokens

    document_tokens = model.tokenize(document) if document else []
    rest = ["\n\n" + question if document and question else question] if question else []

    def build(head: list[int]) -> list[int]:
        if request.raw:
            bos = model.tokenize("", add_bos=model.vocabulary.add_bos)
            return bos + head + [t for text in rest for t in model.tokenize(text, special=True)]
        system = [] if request.system is None else [Message("system", [request.system])]
        return model.template.tokens([*system, Message("user", [head, *rest])])

    n_ctx = model.n_ctx_limit
    room = n_ctx - (request.n if request.truncate and request.n > 0 else 1)
    limit = min(room, request.max_prompt_tokens or room)
    may_cut = request.truncate or request.max_prompt_tokens is not None
    return build(fit_tokens(document_tokens, len(build([])), limit, not may_cut, n_ctx))


def stream(model: Any, tokens: list[int], sampling: Any, request: Request, echo: bool) -> Any:
    """Generate and show; returns the Tally."""
    from sfi_local.step import Tally

    tally = Tally(n_prompt=len(tokens))
    color = request.color and sys.stdout.isatty()
    with progress("prefill", "tokens") as prefill:
        for step in model.generate(tokens, n=request.n_limit, sampling=sampling, stop=request.stop, draft=request.draft,
                                   progress=prefill):
            if not tally.tokens:
                prefill.close()
                tell_notes(model)
            tally.add(step)
            if echo:
                show(step, color)
    tally.n_prefilled = model.session.n_prefilled
    if echo and not tally.text.endswith("\n"):
        sys.stdout.write("\n")
    return tally


def show(step: Any, color: bool) -> None:
    """Write a step's text to stdout at once."""
    style = {"slow": SLOW_STYLE, "fast": FAST_STYLE}.get(step.kind, "") if color else ""
    sys.stdout.write(f"{style}{step.text}{RESET}" if style and step.text else step.text)
    sys.stdout.flush()


def report(model: Any, tally: Any, request: Request, sampling: Any) -> dict[str, Any]:
    """The object that --json prints; rates in tokens per second."""
    from sfi_local.library import source_id

    return {
        "text": tally.text,
        "tokens": tally.tokens,
        "n_prompt": tally.n_prompt,
        "n_generated": len(tally.tokens),
        "finish": tally.finish,
        "prefill_tps": tally.prefill_tps,
        "decode_tps": tally.decode_tps,
        "steps": {kind: tally.steps[kind] for kind in ("slow", "fast", "dense", "stock")},
        "reasons": dict(tally.reasons),
        "kv_read_share": kv_read_share(model),
        "mode": request.mode,
        "model": request.model,
        "source_id": source_id(),
        "budget": model.session.params.budget,
        "n_ctx": model.session.n_ctx,
        "n_threads": model.n_threads,
        "kv_type": request.kv_type,
        "temp": sampling.temp,
        "seed": sampling.seed,
        "notes": model.notes,
        **({"drafts": drafts(tally)} if request.mode == "exact" else {}),
    }


def drafts(tally: Any) -> dict[str, int]:
    """What --json says about mode exact, in tokens."""
    return {"drafted": tally.n_drafted, "accepted": tally.n_accepted, "ties": tally.n_ties}


def statistics(model: Any, tally: Any) -> str:
    """The line after the answer."""
    parts = [f"prefill {tally.n_prefilled} tokens {tally.prefill_tps:.1f}/s"]
    if tally.steps:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.steps.items()))
        parts.append(f"decode {sum(tally.steps.values())} steps {tally.decode_tps:.1f}/s: {kinds}")
    if tally.reasons and model.mode != "dense":  # there every step is, because that was asked for
        parts.append("because " + ", ".join(f"{reason} {n}" for reason, n in tally.reasons.most_common()))
    if tally.n_drafted:
        parts.append(f"drafted {tally.n_drafted}, accepted {tally.n_accepted}, ties {tally.n_ties}")
    parts.append(f"KV read {100 * kv_read_share(model):.0f} %")
    ends = {"length": "stopped at -n", "context": "stopped: the context is full", "stop": "stopped at a stop text",
            "": "interrupted"}
    return "; ".join(parts + [ends[tally.finish]] if tally.finish in ends else parts)


def kv_read_share(model: Any) -> float:
    """Bytes of K and V read over those of dense decoding; 1.0 where sfi is not attached."""
    engine = model.session.engine if model.session else None
    return engine.stats().kv_read_share if engine else 1.0


def resolve_noted(name: str, report_bytes: Any) -> Any:
    """The file of a model; a fetch is announced on stderr."""
    from sfi_local.pull import resolve

    return resolve(name, report_bytes, say)


def tell_notes(model: Any) -> None:
    """Say on stderr, once, what was decided on the user's behalf."""
    for sentence in model.unread_notes():
        say(sentence)


def progress(label: str, unit: str) -> Any:
    from sfi_local.progress import Progress

    return Progress(label, unit)


def say(sentence: str) -> None:
    """One line on stderr."""
    click.echo(f"sfi-local: {sentence}", err=True)


def _note_unread_stdin() -> None:
    """Data piped in beside -p is not read, because a program started from a script inherits its stdin."""
    try:
        fd = sys.stdin.fileno()
        waiting = stat.S_ISFIFO(os.fstat(fd).st_mode) and select.select([fd], [], [], 0)[0]
    except (OSError, ValueError, AttributeError):
        return
    if waiting:
        say("stdin is not read when -p is given; to ask about the text on stdin add -f - .")
