"""One context that is measured in several modes: brought to a depth, decoded from, brought back."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

from sfi_local import kv_layout, state_fill
from sfi_local.engine import StepInfo
from sfi_local.params import SfiParams
from sfi_local.session import Progress, Schedule
from sfi_local.switch_session import SwitchSession

PIECE = 512  # tokens that --fill state prefills and repeats


@dataclass(frozen=True)
class Decoded:
    """One repetition: kind and milliseconds of each step, wall time around the call, the same for every mode.

    kv_read_share: bytes of K and V read over those of dense steps; kv_bytes: bytes of K and V per step
    """

    kinds: list[str]
    ms: list[float]
    reasons: dict[str, int]
    kv_read_share: float
    kv_bytes: float

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
        self._layers = kv_layout.layers(model.file)

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
        """n steps in a mode, from the depth; the cache is first brought back to where it was."""
        self.begin("sfi" if mode == "frozen" else mode, params)
        schedule = every(slow_every) if slow_every and mode in ("frozen", "sfi") else None
        if self._fill == "state" and self.engine and self.params.support == "sketch" and self.mode == "sfi":
            self._settle_sketch()
        if self.engine:
            self.engine.reset_stats()
        infos, ms = self._timed(self._next(n), schedule)
        stats = self.engine.stats() if self.engine else None
        dense_bytes = sum(kv_layout.kv_bytes(self._layers, i.depth, self.kv_type, self.kv_type) for i in infos) / n
        return Decoded([i.kind for i in infos], ms, stats.reasons if stats else {},
                       stats.kv_read_share if stats else 1.0, stats.kv_read / n if stats else dense_bytes)

    def logits(self, mode: str, n: int, schedule: Schedule | None = None) -> Any:
        """The logits after each of n steps, float32 [n, n_vocab]."""
        import numpy as np

        self.begin(mode)
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
        state_fill.fill(self._llama, self.context.ctx, depth)
        self.trunk = (self.trunk * (-(-depth // PIECE)))[:depth]
        self.tokens[:] = self.trunk


def every(n: int) -> Schedule:
    """A schedule whose every nth step is slow, the first included, and the others fast."""
    count = iter(range(1 << 62))
    return lambda *_: "fast" if next(count) % n else "slow"
