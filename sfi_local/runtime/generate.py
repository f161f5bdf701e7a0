"""The loop: prefill, then sample a token and give it to the model, until there is a reason to stop.

One stream of Step items serves the command line, the benchmark and the evaluation alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator, Sequence

from sfi_local.binding.context import logits
from sfi_local.binding.engine import StepInfo
from sfi_local.errors import InputError
from sfi_local.runtime.ahead import Ahead
from sfi_local.runtime.slot import Progress, Schedule, Slot
from sfi_local.runtime.step import Step, TextStream
from sfi_local.runtime.vocabulary import Vocabulary


def generate(slot: Slot, vocabulary: Vocabulary, prompt: Sequence[int], sampler: Any, n: int | None = None,
             stop: Sequence[str] = (), schedule: Schedule | None = None, progress: Progress | None = None,
             logprobs: int | None = None, guess: bool = False) -> Iterator[Step]:
    """Yield one Step per generated token; the last has ``finish`` set. One turn of the slot.

    prompt:   token ids; what the cache already holds of them is not computed again
    sampler:  has ``sample(context, row) -> token id``
    n:        tokens at most; None: until the answer ends or the context is full
    schedule: may overrule the kind of each step
    logprobs: see Step.top; None: none
    guess:    where the text repeats itself, take several fast steps in one pass, see ahead.py; not with a schedule
    Raises InputError for an empty prompt, BusyError if another generation runs, AbortedError when it is cancelled, and what Slot
    raises. After any exception the slot is usable.
    """
    return slot.turn(_generate(slot, vocabulary, prompt, sampler, n, stop, schedule, progress, logprobs, guess))


def _generate(slot: Slot, vocabulary: Vocabulary, prompt: Sequence[int], sampler: Any, n: int | None, stop: Sequence[str],
              schedule: Schedule | None, progress: Progress | None, logprobs: int | None, guess: bool) -> Iterator[Step]:
    info = begin(slot, prompt, progress)
    ending = Ending(slot, vocabulary, n, stop)
    ahead = Ahead(slot, vocabulary) if guess and not schedule and slot.can_try else None
    token = sampler.sample(slot.context)
    span = [(token, info, -1)]
    while True:
        more = [top(slot.context, row, token, logprobs) for token, _, row in span]  # before the next pass
        for (token, info, _), fields in zip(span, more):
            yield (step := replace(ending.step(token, info), **fields))
            if step.finish:
                return
        if ahead:
            span = ahead.span(sampler, token, min(ending.n_left, slot.n_ctx - len(slot.tokens)))
        else:
            info = slot.step(token, schedule)
            span = [(sampler.sample(slot.context), info, -1)]


def begin(slot: Slot, prompt: Sequence[int], progress: Progress | None) -> StepInfo:
    """Prefill what the cache does not hold; returns that as a step."""
    if not prompt:
        raise InputError("The prompt is empty: give some text.")
    n = slot.reuse(prompt)
    if slot.engine:
        slot.engine.reset_stats()
    return slot.prefill(prompt[n:], progress)


def top(context: Any, row: int, token: int, n: int | None) -> dict[str, Any]:
    """The fields logprob and top of a Step whose token came from a row of logits; none for n None."""
    if n is None:
        return {}
    import numpy as np

    values = logits(context, row).astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = np.argsort(-values, kind="stable")[:n]
    return {"logprob": float(values[token]), "top": tuple((int(i), float(values[i])) for i in best)}


class Ending:
    """Turns tokens into Steps, and knows when it is over.

    n_left: tokens that may still come
    """

    def __init__(self, slot: Slot, vocabulary: Vocabulary, n: int | None, stop: Sequence[str]):
        self._vocabulary, self._n_ctx, self._text = vocabulary, slot.n_limit, TextStream(tuple(stop))
        self._stop_tokens = vocabulary.control_tokens(stop)
        self.n_left = n or slot.n_limit + 1

    def step(self, token: int, info: StepInfo) -> Step:
        """The Step of a token and the step whose logits it was sampled from."""
        self.n_left -= 1
        finish = self._finish(token, info.pos + 1)
        piece = b"" if finish in ("end", "stop") else self._vocabulary.piece(token)
        released = self._text.push(piece, last=bool(finish))
        finish = "stop" if self._text.stopped else finish
        return Step(token, released, info.kind, info.reason, info.t_ms, info.pos + 1, info.depth, info.n_cells, finish)

    def _finish(self, token: int, pos: int) -> str:
        if self._vocabulary.is_end(token):
            return "end"
        if token in self._stop_tokens:
            return "stop"
        if self.n_left == 0:
            return "length"
        return "context" if pos >= self._n_ctx else ""
