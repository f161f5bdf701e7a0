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

    def is_tie(self, context: Any, row: int) -> bool:
        """Whether the two most likely tokens of a row could change places."""
        if not self.largest:
            return False
        import numpy as np

        second, first = np.partition(logits(context, row), -2)[-2:]
        return bool(first - second <= MARGIN * self.largest)


def logits(context: Any, row: int) -> Any:
    """A view of a row of the context's logits, float32 [n_vocab]."""
    import numpy as np

    return np.ctypeslib.as_array(context.get_logits_ith(row), shape=(context.model.n_vocab(),))
