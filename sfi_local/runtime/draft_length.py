"""What to draft and how much of it: where the expected tokens per second peak. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

NGRAM, FAST = "ngram", "fast"  # what drafts: the text itself, see ngram.py; fast steps
SIZES = (1, 2, 3, 5, 7, 11, 15, 23, 31)  # drafts of one span: with the sure token before them as few sizes of a pass as will do
MAX_DRAFTS = 32      # tokens of one span
FIRST = 3            # drafts by fast steps of the first span, before anything is known
FORGET = 0.9         # weight of what was known, at each new span
LEAST_MS = 1e-6      # no step is faster
HURDLE = 1.1         # times as fast as dense steps at least, for all of this is estimated
PROBE_EVERY = 64     # dense steps after which what passes cost is forgotten, since it kept from drafting
PROBE_SHARE = 0.005  # of the time of dense steps that may be lost by spans which only try whether fast steps pay by now
SLOPE = 0.4          # dense steps that a token more of a pass is taken to cost before any pass


@dataclass
class Costs:
    """What steps cost on this machine at this depth.

    dense, fast: milliseconds, 0.0 before the first
    passes: tokens of a pass, from short to long -> milliseconds
    """

    dense: float = 0.0
    fast: float = 0.0
    passes: dict[int, float] = field(default_factory=dict)

    def dense_took(self, ms: float) -> None:
        self.dense = _least(self.dense, ms)

    def fast_took(self, ms: float) -> None:
        self.fast = _least(self.fast, ms)

    def pass_took(self, n: int, ms: float) -> None:
        new = n not in self.passes
        self.passes[n] = _least(self.passes.get(n, 0.0), ms)
        if new:
            self.passes = dict(sorted(self.passes.items()))

    def of_pass(self, n: int) -> float:
        """Dense steps that a pass over n tokens takes: between those that were seen in proportion."""
        low, below = 1, self.dense
        for high, above in self.passes.items():  # from short to long
            if high > n:
                return (below + (above - below) * (n - low) / (high - low)) / self.dense
            low, below = high, above
        slope = max(0.0, below - self.dense) / (low - 1) if low > 1 else SLOPE * self.dense
        return (below + slope * (n - low)) / self.dense

    @property
    def verify_cost(self) -> float | None:
        """Dense steps that a pass over 8 tokens takes; None before any pass."""
        return self.of_pass(8) if self.passes and self.dense else None

    def forget_passes(self) -> None:
        self.passes = {}


def _least(known: float, ms: float) -> float:
    """Follows a time down at once and up slowly: what disturbs makes it longer."""
    ms = max(LEAST_MS, ms)
    return ms if not known else min(ms, FORGET * known + (1 - FORGET) * ms)


@dataclass
class SpanLength:
    """Follows acceptance and times, and says what drafts the next span and how many tokens.

    fixed: this length at every span, if given
    begun: a span was verified
    poor:  of the last span, less than half was kept
    The tokens that fast steps drafted are taken as kept one by one, each with the same probability.
    """

    fixed: int | None = None
    costs: Costs = field(default_factory=Costs)
    begun: bool = False
    poor: bool = False
    right: float = 0.0
    wrong: float = 0.0
    _n_dense: int = 0
    _lost: float = 1.0   # dense steps that probing has cost and that are not earned yet

    def next(self, room: int, odds: Sequence[float] = (), fast: bool = True) -> tuple[str, int]:
        """(what drafts, how many tokens); ("", 0): a dense step.

        room: drafts that there is room for; odds: of drafts by the text, the probability that each is right if those before it are;
        fast: a fast step is possible
        """
        if not self.costs.dense or room < 1:
            return "", 0
        if self.fixed is not None:
            fixed = [(FAST, min(fast * self.fixed, room)), (NGRAM, min(self.fixed, len(odds), room))]
            return max((span for span in fixed if span[1]), key=lambda span: self.gain(span[0], span[1], odds), default=("", 0))
        if self._n_dense >= PROBE_EVERY:
            self._n_dense = 0
            self.costs.forget_passes()
        if fast and self._probes:
            return FAST, min(FIRST, room)
        best = max(self._gains(NGRAM, odds[:room]), self._gains(FAST, [self.acceptance] * min(room, fast * SIZES[-1])))
        return (best[1], best[2]) if best[0] > HURDLE else ("", 0)

    def gain(self, source: str, n: int, odds: Sequence[float] = ()) -> float:
        """Expected tokens of a span, in the time of a dense step."""
        return self._gains(source, odds[:n] if source == NGRAM else [self.acceptance] * n, (n,))[0]

    def _gains(self, source: str, odds: Sequence[float], sizes: Sequence[int] = SIZES) -> tuple[float, str, int]:
        """The best gain of these many drafts, of which each is right by its odds if those before it are, the source and how many."""
        best, tokens, right = (0.0, "", 0), 1.0, 1.0
        step = (self.costs.fast or self.costs.dense / 2) / self.costs.dense if source == FAST else 0.0
        for n, p in enumerate(odds, 1):
            right *= p
            tokens += right
            if n in sizes:
                best = max(best, (tokens / (n * step + self.costs.of_pass(n + 1)), source, n))
        return best

    @property
    def acceptance(self) -> float:
        """Probability that a token drafted by a fast step is right; what is not known yet is taken as four of five."""
        return (self.right + 4) / (self.right + self.wrong + 5)

    @property
    def _probes(self) -> bool:
        """Whether a short span of fast steps shall show if they pay: the first, and then where little enough was lost by that."""
        return not self.costs.fast or self._lost < 0 and self._gains(FAST, [1.0] * SIZES[-1])[0] > HURDLE

    def dense(self, ms: float) -> None:
        """A dense step was taken."""
        self._n_dense += 1
        self._lost -= PROBE_SHARE
        self.costs.dense_took(ms)

    def verified(self, source: str, n_drafted: int, n_accepted: int, ms_drafts: float, ms_pass: float, n_known: int = 0) -> None:
        """A span of n_drafted tokens was verified, n_accepted of them kept, by a pass over n_known tokens more."""
        self._n_dense, self.begun, self.poor = 0, True, 2 * n_accepted < n_drafted
        if source == FAST:
            self.right = FORGET * self.right + n_accepted
            self.wrong = FORGET * self.wrong + (n_accepted < n_drafted)
            self.costs.fast_took(ms_drafts / n_drafted)
            self._lost = max(self._lost, (ms_drafts + ms_pass) / self.costs.dense - n_accepted - 1)
        self.costs.pass_took(n_known + 1 + n_drafted, ms_pass)
