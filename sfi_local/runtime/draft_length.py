"""How many tokens to draft before a pass verifies them: where the expected tokens per second peak. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_DRAFTS = 32      # tokens of one span
FIRST = 8            # length of the first span, before anything is known
FORGET = 0.9         # weight of what was known, at each new span
LEAST_MS = 1e-6      # no step is faster
PROBE_EVERY = 64     # dense steps after which a span is drafted again, though drafting did not pay


@dataclass
class SpanLength:
    """Follows acceptance and times, in milliseconds, and gives the length of the next span; 0: a dense step.

    fixed: this length at every span, if given
    poor:  of the last span, less than half was kept
    The tokens of a span that are kept are taken as drawn one by one: each is right with the same probability. A pass of n
    tokens is taken to cost ``height + slope * n``.
    """

    fixed: int | None = None
    poor: bool = False
    right: float = 0.0
    wrong: float = 0.0
    ms_draft: float = 0.0
    ms_dense: float = 0.0
    _passes: list[float] = field(default_factory=lambda: [0.0] * 5)  # sums of 1, n, n*n, ms, n*ms
    _n_dense: int = 0

    def next(self) -> int:
        """Tokens to draft now."""
        if not self.ms_dense:
            return 0
        if self.fixed is not None:
            return self.fixed
        if not self.begun or self._n_dense >= PROBE_EVERY:
            return FIRST
        return max(range(MAX_DRAFTS + 1), key=self.rate)

    @property
    def begun(self) -> bool:
        """Whether a span was verified."""
        return self._passes[0] > 0

    def rate(self, n_drafts: int) -> float:
        """Expected tokens per millisecond of a span of n_drafts."""
        if n_drafts == 0:
            return 1 / self.ms_dense
        p, (height, slope) = self.acceptance, self._line()
        tokens = (1 - p ** (n_drafts + 1)) / (1 - p)
        return tokens / max(LEAST_MS, n_drafts * self.ms_draft + height + slope * (n_drafts + 1))

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is right; what is not known yet is taken as three of four."""
        return (self.right + 3) / (self.right + self.wrong + 4)

    def dense(self, ms: float) -> None:
        """A dense step was taken."""
        self._n_dense += 1
        ms = max(LEAST_MS, ms)
        self.ms_dense = ms if not self.ms_dense else min(ms, FORGET * self.ms_dense + (1 - FORGET) * ms)

    def verified(self, n_drafted: int, n_accepted: int, ms_drafts: float, ms_pass: float, n_known: int = 0) -> None:
        """A span of n_drafted tokens was verified, n_accepted of them kept, by a pass over n_known tokens more."""
        self._n_dense, self.poor = 0, 2 * n_accepted < n_drafted
        self.right = FORGET * self.right + n_accepted
        self.wrong = FORGET * self.wrong + (n_accepted < n_drafted)
        if n_drafted:
            ms = ms_drafts / n_drafted
            self.ms_draft = ms if not self.ms_draft else FORGET * self.ms_draft + (1 - FORGET) * ms
        n = n_known + 1 + n_drafted
        self._passes = [FORGET * old + new for old, new in zip(self._passes, (1, n, n * n, ms_pass, n * ms_pass))]

    def _line(self) -> tuple[float, float]:
        """(height, slope) of a pass; where all passes were equally long, half of their time counts as height."""
        one, n, nn, ms, nms = self._passes
        spread = nn - n * n / one
        if spread < 0.5:
            return ms / one / 2, ms / n / 2
        slope = min(max(0.0, (nms - n * ms / one) / spread), ms / n)
        return ms / one - slope * n / one, slope
