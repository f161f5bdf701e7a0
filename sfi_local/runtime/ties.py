"""How far the logits of verified batches lie from those of dense steps: seen now and then, and what it makes a tie.

One token that a batch computes again lies near its dense step. But the K and V of a batch are stored rounded otherwise too, and the
logits of the tokens after it come from those: over some tokens the difference grows. So where there is any, it is looked at once
over STEPS dense steps in a row. A step here and there lies still further off, so that a tie may go uncounted.
"""

from __future__ import annotations

from typing import Any

from sfi_local.binding.context import logits

STEPS = 16    # dense steps in a row that a batch computes again to see the difference of the logits
FEW = 1       # of them that a batch computes again where nothing of the difference is known yet
SHORT = 7     # tokens that kernels compute as they compute one, if they do so for any batch at all
MARGIN = 8.0  # times the largest difference seen: tokens closer than that, in logits, are a tie
GROWTH = 20.0 # how much the difference was seen to grow over STEPS steps: taken where it was not looked at yet


class Noise:
    """largest: the largest difference of a logit so far; 0.0 where batch and step are equal bit for bit
    settled: it was taken over STEPS dense steps in a row
    looked: tokens of the longest batch that was compared
    limit: tokens of the longest batch that may be taken, where longer ones differ and shorter ones do not; 0: any
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.settled = False
        self.looked = self.limit = 0
        self._steps: list[tuple[int, Any]] = []  # depth after each of the last dense steps, in a row, and its logits

    @property
    def wants_steps(self) -> bool:
        """Whether STEPS dense steps in a row are still to be compared."""
        return self.largest > 0 and not self.settled

    def remember(self, context: Any, depth: int, row: int = -1) -> None:
        """A dense step was taken, whose token is the last of `depth`; or a batch that is as dense steps, with the token's row."""
        if self._steps and self._steps[-1][0] != depth - 1:
            self.forget()
        self._steps = [*self._steps, (depth, logits(context, row).copy())][-STEPS:]

    def forget(self) -> None:
        """The cache was edited: what the dense steps gave holds no more."""
        self._steps = []

    def n_steps(self, depth: int) -> int:
        """How many of the last of `depth` tokens came by dense steps in a row that were not compared yet."""
        return len(self._steps) if self._steps and self._steps[-1][0] == depth else 0

    def most(self, depth: int, n: int) -> int:
        """Tokens of a batch of n that may be taken now: one longer than any before is compared, so it needs a step to compare."""
        if self.largest:
            return n
        return min(n, self.limit or n, n if self.n_steps(depth) else self.looked)

    def n_again(self, depth: int, n: int) -> int:
        """How many of those a batch shall compute again, before its own n tokens: each costs time, so few, where a batch is longer
        than any before; all while there are differences that were not looked at yet."""
        n_steps = self.n_steps(depth)
        few = min(n_steps, FEW, self.limit - n) if self.limit else min(n_steps, FEW)
        return n_steps if self.wants_steps else few if n > self.looked else 0

    def compare(self, context: Any, n_again: int, n: int) -> bool:
        """The batch began with the tokens of the last n_again of the remembered steps, before its own n tokens.

        False: it differs, and it is so long that shorter ones may not: it shall be taken back
        """
        steps, n = self._steps[len(self._steps) - n_again:], n + n_again
        difference = max(float(abs(logits(context, row) - step).max()) for row, (_, step) in enumerate(steps))
        self.forget()
        if difference and n > SHORT and not self.largest:
            self.limit = SHORT
            return False
        self.settled = self.settled or n_again == STEPS
        self.looked, self.largest = max(self.looked, n), max(self.largest, difference)
        self.limit = 0 if self.largest else self.limit  # short ones differ as well
        return True

    def draw(self, context: Any, row: int, sampler: Any) -> tuple[int, bool]:
        """(the token that the sampler draws from a row, whether it is a tie: the same random numbers could have drawn another).

        sampler: see exact.generate_exact; the logits are changed for a moment
        """
        before = sampler.clone() if self.largest else None
        token = sampler.sample(context, row)
        if before is None:
            return token, False
        try:
            return token, self._could_differ(context, row, before, token)
        finally:
            before.close()

    def _could_differ(self, context: Any, row: int, before: Any, token: int) -> bool:
        """Whether the draw changes in one of the two extreme cases: the token and all that are more likely lose half of the margin
        and the others gain it; all that are more likely gain it, and the token and the others lose it."""
        import numpy as np

        values, half = logits(context, row), np.float32(MARGIN / 2 * self.largest * (GROWTH if self.wants_steps else 1))
        original = values.copy()
        try:
            for gains in (original <= original[token], original >= original[token]):
                gains[token] = False
                values[:] = np.where(gains, original + half, original - half)
                if _drawn(before, context, row) != token:
                    return True
            return False
        finally:
            values[:] = original


def _drawn(before: Any, context: Any, row: int) -> int:
    """What a copy of the sampler draws."""
    sampler = before.clone()
    try:
        return sampler.sample(context, row)
    finally:
        sampler.close()
