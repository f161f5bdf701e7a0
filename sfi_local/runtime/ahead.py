"""Mode sfi where a text repeats itself: what followed the last tokens before is tried by fast steps in one pass over the weights.

    guess  what followed the last tokens where they stood before (ngram.py); draft_length.py says how many of them pay
    step   the last sure token and the guesses take their fast steps together, each with cells of its own choice
    keep   the sampler draws each token as it would after single steps; the first that is not its guess ends the span, and the
           guesses from there on are taken back

So the answer is that of single fast steps; it only comes sooner. As a pass ends where the window moves, each step also attends to the
cells that it would alone.
"""

from __future__ import annotations

from typing import Any, Sequence

from sfi_local.binding.engine import StepInfo
from sfi_local.runtime.draft_length import NGRAM, SpanLength
from sfi_local.runtime.ngram import Ngrams
from sfi_local.runtime.slot import Slot
from sfi_local.runtime.vocabulary import Vocabulary

MAX_GUESSES = 15  # with the sure token as many as a pass takes, native/llama/llama-support.h


class Ahead:
    """What one generation of a slot guesses by."""

    def __init__(self, slot: Slot, vocabulary: Vocabulary):
        self._slot, self._vocabulary = slot, vocabulary
        self._length = SpanLength(costs=slot.fast_costs)
        self._ngrams = Ngrams()  # which takes the prompt behind its first token: that is waited for

    def span(self, sampler: Any, token: int, room: int) -> list[tuple[int, StepInfo, int]]:
        """The tokens that follow `token`, which is sure and not in the cache yet: [(token, its step, the row of its logits)], one at least.

        room: tokens that may follow at most
        """
        slot, guesses = self._slot, self._guesses(token, room - 1)
        if not guesses:
            info = slot.step(token)
            if info.kind == "fast":
                self._length.dense(info.t_ms)
            return [(sampler.sample(slot.context), info, -1)]
        infos = slot.try_fast([token, *guesses])
        items = [(sampler.sample(slot.context, 0), infos[0], 0)]
        while len(items) < len(infos) and items[-1][0] == guesses[len(items) - 1]:
            items.append((sampler.sample(slot.context, len(items)), infos[len(items)], len(items)))
        slot.take_back_guesses(len(infos) - len(items))
        self._length.verified(NGRAM, len(infos) - 1, len(items) - 1, 0.0, sum(info.t_ms for info in infos))
        return items

    def _guesses(self, token: int, room: int) -> list[int]:
        self._ngrams.follow(self._slot.tokens, token)
        _, n = self._length.next(min(room, MAX_GUESSES), self._ngrams.odds(MAX_GUESSES), fast=False)
        if not n or not self._slot.can_draft(token):
            return []
        return self._up_to_the_end(self._ngrams.draft(n))

    def _up_to_the_end(self, tokens: Sequence[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if self._vocabulary.is_end(token)]
        return list(tokens[:ends[0] if ends else None])
