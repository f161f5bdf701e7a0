"""One context that is measured in several modes: brought to a depth, decoded from, brought back."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any, Iterable

from sfi_local.binding import state_fill
from sfi_local.binding.engine import StepInfo
from sfi_local.lab.trunk import SwitchSession
from sfi_local.params import SfiParams
from sfi_local.runtime.draft_length import NGRAM
from sfi_local.runtime.exact import Drafting, decode_span
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.slot import Progress, Schedule
from sfi_local.store import layout

PIECE = 512  # tokens that --fill state prefills and repeats


@dataclass(frozen=True)
class Decoded:
    """One repetition: kind and milliseconds of each step, wall time around the call, the same for every mode.

    kv_read_share: bytes of K and V read over those of dense steps; kv_bytes: bytes of K and V per step
    other_work: share of the CPUs' time that other programs took meanwhile; None: not known
    mode exact: n_drafted, n_accepted in tokens; by_ngrams: of those the ones by the text itself; verify_cost: a pass over 8 tokens in
    dense steps; tokens: what was decoded; ties: which of them are one, see ties.py
    """

    kinds: list[str]
    ms: list[float]
    reasons: dict[str, int]
    kv_read_share: float
    kv_bytes: float
    n_drafted: int = 0
    n_accepted: int = 0
    by_ngrams: tuple[int, int] = (0, 0)
    verify_cost: float | None = None
    tokens: tuple[int, ...] = ()
    ties: tuple[bool, ...] = ()
    other_work: float | None = None

    @property
    def tps(self) -> float:
        return 1000 * len(self.ms) / sum(self.ms)


class BenchSession(SwitchSession):
    """A session whose cache is brought to a depth and decoded from, again and again.

    tokens: the text; after a prefill a step at a depth is given the token that stands there, after a state fill those
    that follow the piece. fill: ``prefill`` or ``state``
    """

    def __init__(self, model: Any, n_ctx: int, params: SfiParams, kv_type: str, tokens: list[int], fill: str):
        super().__init__(model, n_ctx, params, kv_type)
        self._text, self._fill = tokens, fill
        self._layers, self._vocabulary = layout.layers(model.file), model.vocabulary

    @property
    def n_tail(self) -> int:
        """None after a state fill: computing it would take minutes where the depth is large, so sfi begins with a slow step."""
        return super().n_tail if self._fill == "prefill" else 0

    def go_to(self, depth: int, progress: Progress | None = None) -> None:
        """Bring the cache to a depth not smaller than the last."""
        if self._fill == "state" and depth > PIECE:
            self._fill_state(depth)
        else:
            self.set_trunk(self._text[:depth], progress)

    def decode(self, mode: str, n: int, slow_every: int | None = None, params: SfiParams | None = None) -> Decoded:
        """n steps in a mode, from the depth; the cache is first brought back to where it was.

        slow_every: for the policies whose slow steps choose the support; policy sketch needs none once it has a sketch.

        Steps are given the tokens of the text; mode exact, whose drafts a text would refute, goes its own greedy way.
        """
        self.begin("sfi" if mode == "frozen" else mode, params)
        if self.mode.verifies:
            return self._decode_exact(n)
        schedule = every(slow_every) if slow_every and self.mode.always_fast and self.params.refreshes else None
        if self._fill == "state" and self.engine and self.params.policy == "sketch" and self.mode.always_fast:
            self._settle_sketch()
        if self.engine:
            self.engine.reset_stats()
        infos, ms = self._timed(self._next(n), schedule)
        stats = self.engine.stats() if self.engine else None
        dense_bytes = sum(layout.kv_bytes(self._layers, i.depth, self.kv_type, self.kv_type) for i in infos) / n
        return Decoded([i.kind for i in infos], ms, stats.reasons if stats else {},
                       stats.kv_read_share if stats else 1.0, stats.kv_read / n if stats else dense_bytes)

    def greedy(self, n: int) -> list[int]:
        """The n tokens that dense steps give from the depth."""
        self.begin("dense")
        sampler, tokens = Sampling(temp=0).chain(), self._next(1)
        while len(tokens) <= n:
            self.step(tokens[-1])
            tokens.append(sampler.sample(self.context))
        return tokens[1:]

    def _decode_exact(self, n: int) -> Decoded:
        self.engine.reset_stats()
        sampler, drafting, steps, ms = Sampling(temp=0).chain(), Drafting(self), [], []
        token = self._next(1)[0]
        while len(steps) < n:
            start = time.perf_counter()
            span = decode_span(self, self._vocabulary, sampler, token, n - len(steps) - 1, drafting)
            wall = 1000 * (time.perf_counter() - start)
            told = sum(info.t_ms for _, info, _ in span)
            steps, ms, token = steps + span, [*ms, *(info.t_ms * wall / told for _, info, _ in span)], span[-1][0]
        stats, counts = self.engine.stats(), [more for _, _, more in steps]
        drafted, by_ngrams = _drafts(counts), _drafts(c for c in counts if c.get("drafted_by") == NGRAM)
        return Decoded([info.kind for _, info, _ in steps], ms, stats.reasons, stats.kv_read_share, stats.kv_read / n,
                       *drafted, by_ngrams, self.costs.verify_cost,
                       tuple(token for token, _, _ in steps), tuple(c.get("tie", False) for c in counts))

    def logits(self, mode: str, n: int, schedule: Schedule | None = None, params: SfiParams | None = None) -> Any:
        """The logits after each of n steps, float32 [n, n_vocab]."""
        import numpy as np

        self.begin(mode, params)
        rows = []
        for token in self._next(n):
            self.step(token, schedule)
            rows.append(self.last_logits().copy())
        return np.array(rows)

    def _next(self, n: int) -> list[int]:
        at = min(len(self.trunk), PIECE) if self._fill == "state" else len(self.trunk)
        return self._text[at:at + n]

    def _timed(self, tokens: list[int], schedule: Schedule | None) -> tuple[list[StepInfo], list[float]]:
        infos, ms = [], []
        gc.disable()
        try:
            for token in tokens:
                start = time.perf_counter()
                infos.append(self.step(token, schedule))
                ms.append(1000 * (time.perf_counter() - start))
        finally:
            gc.enable()
        return infos, ms

    def _settle_sketch(self) -> None:
        """What a prefill would have left: a basis and codes. A slow step makes them here, which is not part of the measurement."""
        self.step(self._next(1)[0], lambda *_: "slow")

    def _fill_state(self, depth: int) -> None:
        self.set_trunk(self._text[:PIECE])
        state_fill.fill(self.context.ctx, depth)
        self.trunk = (self.trunk * (-(-depth // PIECE)))[:depth]
        self.tokens[:] = self.trunk


def _drafts(counts: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """(tokens drafted, kept) of steps."""
    spans = [(c.get("n_drafted", 0), c.get("n_accepted", 0)) for c in counts]
    return sum(n for n, _ in spans), sum(n for _, n in spans)


def every(n: int) -> Schedule:
    """A schedule whose every nth step is slow, the first included, and the others fast."""
    count = iter(range(1 << 62))
    return lambda *_: "fast" if next(count) % n else "slow"
