"""One context that is measured in several modes: brought to a depth, decoded from, brought back."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

from sfi_local import kv_layout, state_fill
from sfi_local.engine import StepInfo
from sfi_local.errors import ModelError
from sfi_local.params import SfiParams
from sfi_local.session import Progress, Schedule, Session

PIECE = 512  # tokens that --fill state prefills and repeats


@dataclass(frozen=True)
class Decoded:
    """One repetition: kind and milliseconds of each step, wall time around the call, the same for every mode.

    kv_read_share: bytes of K and V read over those of dense steps; kv_bytes: bytes of K and V per step
    mode exact: n_drafted, n_accepted in tokens; tokens: what was decoded; ties: which of them are one, see noise.py
    """

    kinds: list[str]
    ms: list[float]
    reasons: dict[str, int]
    kv_read_share: float
    kv_bytes: float
    n_drafted: int = 0
    n_accepted: int = 0
    tokens: tuple[int, ...] = ()
    ties: tuple[bool, ...] = ()

    @property
    def tps(self) -> float:
        return 1000 * len(self.ms) / sum(self.ms)


class BenchSession(Session):
    """A session whose mode can be changed; what is in the cache stays.

    tokens: the text; after a prefill a step at a depth is given the token that stands there, after a state fill those
    that follow the piece. fill: ``prefill`` or ``state``
    """

    def __init__(self, model: Any, n_ctx: int, params: SfiParams, kv_type: str, tokens: list[int], fill: str):
        super().__init__(model._weights, n_ctx, "stock", params, model.n_threads, kv_type, kv_type)
        self._text, self._fill, self._depth = tokens, fill, 0
        self._kv_type, self._layers, self._vocabulary = kv_type, kv_layout.layers(model.file), model.vocabulary

    def __enter__(self) -> "BenchSession":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def go_to(self, depth: int, progress: Progress | None = None) -> None:
        """Bring the cache to a depth not smaller than the last."""
        self.use("stock")
        self._rewind(self._depth)
        if self._fill == "state" and depth > PIECE:
            self._fill_state(depth)
        elif depth > self._depth:
            self.prefill(self._text[self._depth:depth], progress)
        self._depth = depth

    def use(self, mode: str) -> None:
        """Attach or detach sfi. Raises ModelError where the model cannot be sparse, in every mode but stock."""
        if self.engine:
            self.engine.close()
        self.mode, self.engine = mode, None
        self.engine = self._attach()
        if self.engine is None and mode != "stock":
            raise ModelError(self.why_stock)

    def decode(self, mode: str, n: int, slow_every: int | None = None) -> Decoded:
        """n steps in a mode, from the depth; the cache is first brought back to where it was.

        Steps are given the tokens of the text; mode exact, whose drafts a text would refute, goes its own greedy way.
        """
        self._start(mode)
        if mode == "exact":
            return self._decode_exact(n)
        schedule = every(slow_every) if slow_every and mode == "sfi" else None
        if self.engine:
            self.engine.reset_stats()
        infos, ms = self._timed(self._next(n), schedule)
        stats = self.engine.stats() if self.engine else None
        dense_bytes = sum(kv_layout.kv_bytes(self._layers, i.depth, self._kv_type, self._kv_type) for i in infos) / n
        return Decoded([i.kind for i in infos], ms, stats.reasons if stats else {},
                       stats.kv_read_share if stats else 1.0, stats.kv_read / n if stats else dense_bytes)

    def greedy(self, n: int) -> list[int]:
        """The n tokens that dense steps give from the depth."""
        from sfi_local.sampling import Sampling

        self._start("dense")
        sampler, tokens = Sampling(temp=0).chain(), self._next(1)
        while len(tokens) <= n:
            self.step(tokens[-1])
            tokens.append(sampler.sample(self.context))
        return tokens[1:]

    def _decode_exact(self, n: int) -> Decoded:
        from sfi_local.exact import decode_span
        from sfi_local.sampling import Sampling
        from sfi_local.span import SpanLength

        self.engine.reset_stats()
        sampler, length, steps, ms = Sampling(temp=0).chain(), SpanLength(), [], []
        token = self._next(1)[0]
        while len(steps) < n:
            start = time.perf_counter()
            span = decode_span(self, self._vocabulary, sampler, token, n - len(steps) - 1, length)
            wall = 1000 * (time.perf_counter() - start)
            drafts = [info.t_ms for _, info, _ in span[:-1]]
            steps, ms, token = steps + span, [*ms, *drafts, wall - sum(drafts)], span[-1][0]
        stats, counts = self.engine.stats(), [more for _, _, more in steps]
        return Decoded([info.kind for _, info, _ in steps], ms, stats.reasons, stats.kv_read_share, stats.kv_read / n,
                       sum(c.get("n_drafted", 0) for c in counts), sum(c.get("n_accepted", 0) for c in counts),
                       tuple(token for token, _, _ in steps), tuple(c.get("tie", False) for c in counts))

    def logits(self, mode: str, n: int, schedule: Schedule | None = None) -> Any:
        """The logits after each of n steps, float32 [n, n_vocab]."""
        import numpy as np

        self._start(mode)
        rows = []
        for token in self._next(n):
            self.step(token, schedule)
            pointer = self.context.get_logits_ith(-1)
            rows.append(np.ctypeslib.as_array(pointer, shape=(self.context.model.n_vocab(),)).copy())
        return np.array(rows)

    def _start(self, mode: str) -> None:
        """The state that every repetition of every mode begins with.

        The last tokens of a real prefill are computed again, as that is what gives sfi its first support. After a
        state fill that would take minutes where the depth is large, so sfi begins with a slow step.
        """
        self.use(mode)
        tail = min(64, self._depth) if self._fill == "prefill" else 0
        self._rewind(self._depth - tail)
        if tail:
            self.prefill(self._text[self._depth - tail:self._depth])

    def _rewind(self, depth: int) -> None:
        del self.tokens[depth:]
        self._settle()

    def _next(self, n: int) -> list[int]:
        at = min(self._depth, PIECE) if self._fill == "state" else self._depth
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

    def _fill_state(self, depth: int) -> None:
        self._rewind(PIECE)
        if len(self.tokens) < PIECE:
            self.prefill(self._text[len(self.tokens):PIECE])
        state_fill.fill(self._llama, self.context.ctx, depth)
        self.tokens[:] = (self.tokens * (-(-depth // PIECE)))[:depth]


def every(n: int) -> Schedule:
    """A schedule whose every nth step is slow, the first included, and the others fast."""
    count = iter(range(1 << 62))
    return lambda *_: "fast" if next(count) % n else "slow"
