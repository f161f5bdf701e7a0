"""How far the logits of a verified batch lie from those of a dense step: seen now and then, and what it makes a tie."""

from __future__ import annotations

from typing import Any

MARGIN = 4.0  # times the largest difference seen: tokens closer than that, in logits, are a tie


class Noise:
    """largest: the largest difference of a logit so far; 0.0 where batch and step are equal bit for bit."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._step: tuple[int, Any] | None = None  # depth after the last dense step, and its logits

    def remember(self, context: Any, depth: int) -> None:
        """A dense step was taken, whose token is the last of `depth`."""
        self._step = (depth, logits(context, -1).copy())

    def has_step_at(self, depth: int) -> bool:
        """Whether the token that is the last of `depth` came by a dense step that was not compared yet."""
        return self._step is not None and self._step[0] == depth

    def compare(self, context: Any, row: int) -> None:
        """Row `row` of the batch is that of the remembered step."""
        self.largest = max(self.largest, float(abs(logits(context, row) - self._step[1]).max()))
        self._step = None

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

        values, half = logits(context, row), np.float32(MARGIN / 2 * self.largest)
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


def logits(context: Any, row: int) -> Any:
    """A view of a row of the context's logits, float32 [n_vocab]."""
    import numpy as np

    return np.ctypeslib.as_array(context.get_logits_ith(row), shape=(context.model.n_vocab(),))
