"""The loop: prefill, then sample a token and give it to the model, until there is a reason to stop.

One stream of Step items serves the command line, the benchmark and the evaluation alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Sequence

from sfi_local.engine import StepInfo
from sfi_local.errors import BusyError, InputError
from sfi_local.session import Progress, Schedule, Session
from sfi_local.step import Step, TextStream

if TYPE_CHECKING:
    from sfi_local.model import Vocabulary


def generate(session: Session, vocabulary: "Vocabulary", prompt: Sequence[int], sampler: Any, n: int | None = None,
             stop: Sequence[str] = (), schedule: Schedule | None = None,
             progress: Progress | None = None) -> Iterator[Step]:
    """Yield one Step per generated token; the last has ``finish`` set.

    prompt:   token ids; what the cache already holds of them is not computed again
    sampler:  has ``sample(context) -> token id``
    n:        tokens at most; None: until the answer ends or the context is full
    schedule: may overrule the kind of each step
    Raises InputError for an empty prompt, BusyError if another generation began, and what Session raises. After any
    exception the session is usable.
    """
    if not prompt:
        raise InputError("The prompt is empty: give some text.")
    if session.engine:
        session.engine.reset_stats()
    n_reused = session.reuse(prompt)
    turn, info = session.turn, session.prefill(prompt[n_reused:], progress)
    text = TextStream(tuple(stop))
    for n_generated in range(1, (n or session.n_ctx) + 1):
        token = sampler.sample(session.context)
        finish = _finish(session, vocabulary, token, n is not None and n_generated >= n)
        piece = b"" if finish == "end" else vocabulary.piece(token)
        released = text.push(piece, last=bool(finish))
        finish = "stop" if text.stopped else finish
        yield _step(info, token, released, finish)
        if finish:
            return
        if session.turn != turn:
            raise BusyError("Another generation has begun on this model: finish one before the next, or load it twice.")
        info = session.step(token, schedule)


def _finish(session: Session, vocabulary: "Vocabulary", token: int, n_reached: bool) -> str:
    if vocabulary.is_end(token):
        return "end"
    if n_reached:
        return "length"
    return "context" if len(session.tokens) >= session.n_ctx else ""


def _step(info: StepInfo, token: int, text: str, finish: str) -> Step:
    return Step(token, text, info.kind, info.reason, info.t_ms, info.pos + 1, info.depth, info.n_cells, finish)
