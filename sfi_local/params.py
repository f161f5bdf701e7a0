"""The parameters of slow-fast decoding: a mirror of ``struct sfi_params`` that needs no native library."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sfi_local.errors import ArgumentError, Remedy

POLICIES = {"frozen": 0, "window": 1, "sketch": 2, "oracle": 3}
SELECTORS = {"topk": 0, "paper": 1}
PREFILLS = {"exact": 0, "sparse": 1}
BUDGET = ("n_sink", "n_recent", "n_selected")  # the fields of a budget ...
SKETCH_BITS = ("sketch_k4", "sketch_k2", "sketch_k1", "sketch_v4", "sketch_v2", "sketch_first")  # ... and of a sketch's format
PORTABLE_POLICY = "frozen"  # needs no operations of ours, so that every device can have it
MAX_QUERIES = 64
SKETCH_DEPTH = 1024  # cells from which policy sketch is faster than dense, where nothing was measured


@dataclass(frozen=True)
class SfiParams:
    """What a support holds and when a step is slow. All counts are per KV head.

    policy:     of the fast steps: ``sketch`` (selected anew at every step, from a low-rank, few-bit copy of K and V
                that also stands for all other cells), ``frozen`` (selected is chosen on slow steps, as in arXiv 2603.12038),
                ``window`` (always only) or ``oracle`` (selected by exact attention: for measuring, no faster than dense)
    selector:   ``topk`` (pooled evidence of the last queries) or ``paper`` (arXiv 2603.12038)
    n_sink:     first cells of the text, always in the support; cells
    n_recent:   latest cells that are always in the support; frozen: of the refresh, and all that come after; cells
    n_selected: cells chosen per layer and KV head; cells
    max_span:   a step is slow at the latest after this many fast steps; 0: never (sketch and oracle only); steps
    min_span:   fast steps before a boundary may make a step slow; steps
    boundary:   slow step at the first content token after the end of a sentence
    auto_depth: below this depth SFI_STEP_AUTO is dense, on a GPU by llama.cpp's own attention; 0: slow-fast at every depth; cells
    n_queries:  evidence of the last n queries; of a slow step, its own; tokens, 1 .. 64
    pool_after, pool_before: an important cell also brings this many cells after and before it; cells
    tolerance:  sketch: cells are attended to exactly if their share of the scanned attention times the expected error of their
                logit (in nats) is larger, n_selected at most; 0: n_selected cells. This is the mean: a head whose output the
                sketch changes more, compared with how far it is from the mean of V, has a smaller one
    sketch_k4, sketch_k2, sketch_k1: components of the sketch's K with 4, 2 and 1 bits; all 0: 8, 48, 0 for heads of up to 127 values
                with sketch_first 2, and per 64 values of larger ones 4, 40, 0 with sketch_first half of K, rounded up; per 64 values
                4, 12, 24 with tolerance 0 and for soft-capped logits
    sketch_v4, sketch_v2: ... of its V; all 0 with components of K given: the tail is dropped; else 0, 16
    sketch_first: a step reads so many 4 bytes of the sketch's K of every cell, and the rest of it only of cells that seem to
                matter; 0: all of every cell
    second_look: ... which are those that have, by what is read of all, at least so many times the mean share of the attention
    prefill:    how a prompt is read on a CPU: ``exact``, or ``sparse``, for long texts: from 2048 cells on, all but the last 512 tokens pass
                over tiles of 64 cells in which none of some 60 neighbouring tokens seems to look for anything
    prefill_least: ... which are those that get less than this share of the attention of each of them
    alpha ... nms_radius: constants of the ``paper`` selector, without unit but for nms_radius; cells
    """

    policy: str = "sketch"
    selector: str = "topk"
    n_sink: int = 4
    n_recent: int = 32
    n_selected: int = 1024
    max_span: int = 0
    min_span: int = 16
    boundary: bool = False
    auto_depth: int = 0
    n_queries: int = 16
    pool_after: int = 16
    pool_before: int = 2
    tolerance: float = 3e-4
    sketch_k4: int = 0
    sketch_k2: int = 0
    sketch_k1: int = 0
    sketch_v4: int = 0
    sketch_v2: int = 0
    sketch_first: int = 0
    second_look: float = 0.5
    prefill: str = "exact"
    prefill_least: float = 0.01
    alpha: float = 0.5
    gamma: float = 0.5
    beta: float = 0.568
    p: float = 1.8
    eta: float = 0.4
    lambda_clip: float = 0.02
    a_soft: float = 0.5
    a_cross: float = 0.35
    temperature: float = 2.0
    nms_radius: int = 16

    @classmethod
    def of(cls, policy: str, **changes: Any) -> "SfiParams":
        """The defaults of a policy, some of them changed."""
        defaults = _REFRESHED if policy in _REFRESHING else {"n_selected": 256} if policy == "oracle" else {}
        return cls(**{"policy": policy, **defaults, **changes})

    @property
    def refreshes(self) -> bool:
        """Whether slow steps choose what fast steps attend to; else each fast step does."""
        return self.policy in _REFRESHING

    @property
    def budget(self) -> int:
        """Cells of a support at a refresh, all three parts together; of policy sketch the most that they can be."""
        return self.n_sink + self.n_recent + self.n_selected

    @property
    def reading(self) -> dict[str, Any]:
        """The fields that K and V depend on: none where a prompt is read exactly."""
        return {} if self.prefill == "exact" else {"prefill": self.prefill, "prefill_least": self.prefill_least}

    def replace(self, **changes) -> "SfiParams":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> "SfiParams":
        """Return self, or raise ArgumentError with a sentence about the first field out of range."""
        _one_of("policy", self.policy, POLICIES)
        _one_of("selector", self.selector, SELECTORS)
        _one_of("prefill", self.prefill, PREFILLS)
        for name, least in _LEAST.items():
            _between(name, getattr(self, name), least, _MOST.get(name, MANY))
        if self.max_span == 0 and self.refreshes:
            raise ArgumentError(f"max_span is 0, which means no slow steps, but policy {self.policy} needs them: give at least 1.")
        if self.policy == "frozen" and self.n_recent < self.n_queries:
            raise ArgumentError(
                f"n_recent is {self.n_recent}, less than the {self.n_queries} queries of the evidence: "
                f"raise n_recent or lower n_queries.")
        for name in ("lambda_clip", "prefill_least"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}, a share: give a value from 0 to 1.")
        if any(getattr(self, f"sketch_{x}") % 4 for x in ("k4", "k2", "k1")) or (
                4 * self.sketch_k4 + 2 * self.sketch_k2 + self.sketch_k1) % 32:
            raise ArgumentError(f"sketch_k4, sketch_k2 and sketch_k1 are {self.sketch_k4}, {self.sketch_k2}, {self.sketch_k1}: give "
                                f"multiples of 4 whose bits together are a multiple of 32, e.g. 4, 16, 16.")
        if self.sketch_first and 32 * self.sketch_first >= 4 * self.sketch_k4 + 2 * self.sketch_k2 + self.sketch_k1:
            raise ArgumentError(f"sketch_first is {self.sketch_first}, but the bits of K fill no more than as many 4 bytes: lower it, "
                                f"or give more components.")
        if self.sketch_v4 % 16 or self.sketch_v2 % 16:
            raise ArgumentError(f"sketch_v4 and sketch_v2 are {self.sketch_v4} and {self.sketch_v2}: give multiples of 16.")
        for name in ("alpha", "temperature"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}: give a value above 0.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not abs(value) <= MOST_FLOAT:
                raise ArgumentError(f"{field.name} is {value}: give a finite number.")
        return self

    def check_context(self, n_ctx: int) -> None:
        """Refuse a budget that is larger than a context of n_ctx cells."""
        if self.budget > n_ctx:
            raise ArgumentError(
                f"The budget of {self.budget} cells (n_sink {self.n_sink} + n_recent {self.n_recent} + n_selected "
                f"{self.n_selected}) is larger than the context of {n_ctx} cells",
                Remedy("take {} or less", "n_selected", max(1, n_ctx - self.n_sink - self.n_recent)), Remedy("raise {}", "n_ctx"))

    def fit_context(self, n_ctx: int) -> "SfiParams":
        """A copy whose budget fits a context of n_ctx cells, made smaller at n_selected first, then n_recent."""
        n_sink = min(self.n_sink, max(0, n_ctx - self.n_queries - 1))
        n_recent = max(min(self.n_recent, self.n_queries), min(self.n_recent, n_ctx - n_sink - 1))
        n_selected = max(1, min(self.n_selected, n_ctx - n_sink - n_recent))
        return self.replace(n_sink=n_sink, n_recent=n_recent, n_selected=n_selected)


_REFRESHING = ("frozen", "window")
# they need more cells to last from one refresh to the next
_REFRESHED = {"n_recent": 256, "n_selected": 2048, "max_span": 32, "boundary": True}

_LEAST = {
    "n_sink": 0, "n_recent": 1, "n_selected": 1, "max_span": 0, "min_span": 0, "auto_depth": 0,
    "sketch_k4": 0, "sketch_k2": 0, "sketch_k1": 0, "sketch_v4": 0, "sketch_v2": 0, "sketch_first": 0, "second_look": 0,
    "n_queries": 1, "pool_after": 0, "pool_before": 0, "nms_radius": 0,
}


MANY = 1 << 24  # the library takes no larger number
MOST_FLOAT = 3e38  # of 32 bits
_MOST = {"auto_depth": 2**31 - 1, "sketch_k4": 512, "sketch_k2": 512, "sketch_k1": 512, "sketch_v4": 512, "sketch_v2": 512,
         "sketch_first": 64, "pool_after": 4096, "pool_before": 4096, "nms_radius": 4096, "n_queries": MAX_QUERIES}


def _one_of(name: str, value: str, choices: dict) -> None:
    if value not in choices:
        raise ArgumentError(f"{name} is {value!r}: choose one of {', '.join(choices)}.")


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ArgumentError(f"{name} is {value}: give a number from {least} to {most}.")


def auto_depth(params: SfiParams) -> int:
    """The depth, in cells, below which mode ``auto`` is dense.

    A fast step reads the budget, a dense one reads the depth. At twice the budget the step reads half of the cache,
    enough to pay for the slow steps; a measurement on the machine at hand would be better than this rule. A sketch of 1024
    cells is read about as fast as a tenth of them.
    """
    return SKETCH_DEPTH if params.policy == "sketch" else 2 * params.budget
