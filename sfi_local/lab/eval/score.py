"""The answers of a row to all prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sfi_local.lab.eval.rows import Row
from sfi_local.params import SfiParams


@dataclass
class Score:
    """The answers of a row; the lists have an entry per prompt.

    scores: 1.0 where the answer is right; of a copy the share before the first wrong token
    n_skipped: prompts that are longer than the context
    kv_read_share: as in TextScore
    tokens, ties: of each answer, see Step
    rounding: mode exact: whether each answer differs from dense's, and by rounding alone, see exact.from_rounding
    n_spans, n_drafted, n_accepted: mode exact: spans, tokens drafted in them, and those that were kept; n_by_ngrams: of these the ones
    that the text itself drafted, the others came by fast steps
    noise: mode exact: the largest difference of a logit that was seen between a batch and a dense step
    """

    row: Row
    n_skipped: int
    params: SfiParams = field(default_factory=SfiParams)
    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)
    bytes_per_step: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    ties: list[list[bool]] = field(default_factory=list)
    rounding: list[bool] = field(default_factory=list)
    n_spans: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_by_ngrams: int = 0
    noise: float = 0.0

    @property
    def passed(self) -> list[bool]:
        return [score == 1 for score in self.scores]

    @property
    def depth(self) -> int:
        """The mean length of the prompts."""
        return round(sum(self.depths) / len(self.depths))

    @property
    def kv_read_share(self) -> float:
        return sum(self.shares) / len(self.shares)
