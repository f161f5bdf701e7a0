"""The loop: prefill, then sample a token and give it to the model, until there is a reason to stop.

One stream of Step items serves the command line, the benchmark and the evaluation alike.
"""

from __future__ import annotations

from typing import Any, Iterator, Sequence

from sfi_local.binding.engine import StepInfo
from sfi_local.errors import BusyError, InputError
from sfi_local.runtime.slot import Progress, Schedule, Session
from sfi_local.runtime.step import Step, TextStream
from sfi_local.runtime.vocabulary import Vocabulary


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
    turn, info = begin(session, prompt, progress)
    ending = Ending(session, vocabulary, n, stop)
    while True:
        token = sampler.sample(session.context)
        yield (step := ending.step(token, info))
        if step.finish:
            return
        check_turn(session, turn)
        info = session.step(token, schedule)


def begin(session: Session, prompt: Sequence[int], progress: Progress | None) -> tuple[int, StepInfo]:
    """Prefill what the cache does not hold; returns the number of this generation, and the prefill as a step."""
    if not prompt:
        raise InputError("The prompt is empty: give some text.")
    if session.engine:
        session.engine.reset_stats()
    n_reused = session.reuse(prompt)
    return session.turn, session.prefill(prompt[n_reused:], progress)


def check_turn(session: Session, turn: int) -> None:
    """Raise BusyError if another generation has begun, for it has taken the cache."""
    if session.turn != turn:
        raise BusyError("Another generation has begun on this model: finish one before the next, or load it twice.")


class Ending:
    """Turns tokens into Steps, and knows when it is over.

    n_left: tokens that may still come
    """

    def __init__(self, session: Session, vocabulary: "Vocabulary", n: int | None, stop: Sequence[str]):
        self._vocabulary, self._n_ctx, self._text = vocabulary, session.n_ctx, TextStream(tuple(stop))
        self.n_left = n or session.n_ctx + 1

    def step(self, token: int, info: StepInfo) -> Step:
        """The Step of a token and the step whose logits it was sampled from."""
        self.n_left -= 1
        finish = self._finish(token, info.pos + 1)
        piece = b"" if finish == "end" else self._vocabulary.piece(token)
        released = self._text.push(piece, last=bool(finish))
        finish = "stop" if self._text.stopped else finish
        return Step(token, released, info.kind, info.reason, info.t_ms, info.pos + 1, info.depth, info.n_cells, finish)

    def _finish(self, token: int, pos: int) -> str:
        if self._vocabulary.is_end(token):
            return "end"
        if self.n_left == 0:
            return "length"
        return "context" if pos >= self._n_ctx else ""
