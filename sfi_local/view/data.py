"""What `sfi-local view` shows: collected step by step through the support-stability hook, and packed to be small.

The selected positions of every layer and KV head are a bit stream of differences: each choice says, head by head, which
positions joined or left since the choice before. A list of differences is coded as runs (so many positions to skip, so
many in a row), and runs as exponential Golomb codes, which suit both the long runs that pooling makes and scattered
single cells. view_page.html reads the same stream; :func:`unpack_sets` is its specification.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, fields
from typing import Any, Iterator, Sequence

import numpy as np

from sfi_local.binding.engine import Stability
from sfi_local.errors import NoSupportError
from sfi_local.runtime.step import Step
from sfi_local.view.sentences import read_most, sentences, shares

_HOOK = tuple(f.name for f in fields(Stability))
# What is known of one layer and KV head after a step, in this order: the hook's stability, which the policies that choose
# anew at every step do not have; the jaccard of the choice with the one before, for policy frozen the hook's own; and of a
# fast step of policy sketch the attention mass outside of the support and the error of a sketched logit, both the mean of
# the query heads. NaN where there is none.
NUMBERS = (*_HOOK, "overlap", "tail_mass", "logit_error")
MAX_SETS_BYTES = 1_500_000  # of the packed sets; positions are binned until they fit
_WORD = 62  # bits of the longest code

Sets = list[np.ndarray]  # one sorted int array of positions (or bins) per head


@dataclass
class Collector:
    """Takes each Step of a generation, and from its engine what holds after it; repetitions are kept once.

    engine:      None where decoding is llama.cpp's own
    heads:       (layer, KV head) of every layer that can be sparse, in the order of all per-head arrays
    choices:     the Sets that were in force one after the other; chosen: per step the number of its choice, -1: none
    measures:    float32 [n_heads, len(NUMBERS)]; measured: per step the number of its measure, -1: none
    recent_from: per step, the first position of the recent window
    policy:      of the parameters
    """

    engine: Any
    n_prompt: int
    n_sink: int
    n_recent: int
    policy: str = "frozen"
    heads: list[tuple[int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    choices: list[Sets] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    measures: list[np.ndarray] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)
    recent_from: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, session: Any, n_prompt: int) -> "Collector":
        """The collector of a generation that has begun in a Slot, with a prompt of n_prompt tokens."""
        params = session.params
        return cls(session.engine, n_prompt, params.n_sink, params.n_recent, params.policy)

    def __post_init__(self) -> None:
        self._layers = self.engine.layers() if self.engine else []
        self.heads = [(il, head) for il, layer in enumerate(self._layers) if layer.sparse for head in range(layer.n_head_kv)]
        self._anew = self.policy in ("sketch", "oracle")  # these choose at every fast step, and only there
        self._overlap = np.full(len(self.heads), np.nan)

    def add(self, step: Step) -> None:
        """Call it before the generator goes on: the engine must still be where the step left it."""
        sets = self._sets(step)
        if sets:
            self._take_choice(sets)
            self._take_measure(np.column_stack([self._stabilities(sets), self._overlap, self._tails()]).astype(np.float32))
        self.steps.append(step)
        self.chosen.append(len(self.choices) - 1 if sets else -1)
        self.measured.append(len(self.measures) - 1 if sets else -1)
        self.recent_from.append(self._recent_from(step, sets))

    def forget_choices(self) -> None:
        """For a generation without a fast step: what the prefill chose was never used."""
        self.choices, self.measures = [], []
        self.chosen = self.measured = [-1] * len(self.steps)

    def _take_choice(self, sets: Sets) -> None:
        if not self.choices:
            self.choices.append(sets)
        elif not all(map(np.array_equal, sets, self.choices[-1])):
            self._overlap = np.array(list(map(_jaccard, sets, self.choices[-1])))
            self.choices.append(sets)

    def _take_measure(self, numbers: np.ndarray) -> None:
        if not (self.measures and np.array_equal(numbers, self.measures[-1], equal_nan=True)):
            self.measures.append(numbers)

    def _sets(self, step: Step) -> Sets:
        """The selected positions; [] where there are none, or where the step neither followed a choice nor made one."""
        if step.kind in ("dense", "stock") or self._anew and (step.kind != "fast" or step.n_cells >= step.depth):
            return []
        try:
            return [_positions(self.engine.selected(il, head)[1]) for il, head in self.heads]
        except NoSupportError:
            return []

    def _stabilities(self, sets: Sets) -> list[list[float]]:
        if self._anew:
            return [[len(s)] + [np.nan] * (len(_HOOK) - 1) for s in sets]
        return [[getattr(self.engine.stability(il, head), name) for name in _HOOK] for il, head in self.heads]

    def _tails(self) -> list[tuple[float, float]]:
        """(tail_mass, logit_error) of each KV head: the mean over its query heads."""
        if self.policy != "sketch":
            return [(np.nan, np.nan)] * len(self.heads)
        out = []
        for il, head in self.heads:
            group = self._layers[il].n_head // self._layers[il].n_head_kv
            tails = [self.engine.tail(il, h) for h in range(head * group, (head + 1) * group)]
            out.append((np.mean([t.mass for t in tails]), np.mean([t.logit_error for t in tails])))
        return out

    def _recent_from(self, step: Step, sets: Sets) -> int:
        """A fast step attended to the first cells, to as many selected ones as its heads have in the mean, and to as many of
        the latest as are missing to n_cells."""
        n_sink, n_recent = min(self.n_sink, step.depth), self.n_recent
        if step.kind == "fast":
            n_recent = step.n_cells - n_sink - _mean_size(sets)
        return max(n_sink, step.depth - n_recent)


def _positions(positions: Sequence[int]) -> np.ndarray:
    found = np.array(positions, dtype=np.int32)
    return np.unique(found[found >= 0])


def _mean_size(sets: Sets) -> int:
    """Members per head, rounded as the library rounds Step.n_cells."""
    return (sum(map(len, sets)) + len(sets) // 2) // len(sets) if sets else 0


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def page_data(collector: Collector, pieces: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page and the picture show, as JSON can hold it.

    pieces: the text of each token, prompt and answer; about: facts for the heading
    bin:    positions are stored in groups of so many; 1: each on its own
    sentences: of the prompt, as ranges of positions; read_most: (number of one, share of heads that chose a token of it)
    """
    ranges = sentences(pieces, collector.n_prompt)
    steps, width, packed = collector.steps, *_pack_within(collector.choices, len(pieces), MAX_SETS_BYTES)
    measures = b"".join(numbers.astype("<f4").tobytes() for numbers in collector.measures)
    return {
        **about,
        "pieces": pieces,
        "n_prompt": collector.n_prompt,
        "sentences": ranges, "read_most": read_most(shares(collector, collector.n_prompt), ranges),
        "n_sink": collector.n_sink,
        "heads": collector.heads,
        "kind": [s.kind for s in steps], "reason": [s.reason for s in steps], "ms": [round(s.t_ms, 3) for s in steps],
        "depth": [s.depth for s in steps], "n_cells": [s.n_cells for s in steps],
        "recent_from": collector.recent_from,
        "chosen": collector.chosen, "n_choices": len(collector.choices), "bin": width, "sets": _base64(packed),
        "measured": collector.measured, "n_measures": len(collector.measures), "names": NUMBERS, "numbers": _base64(measures),
    }


def sets_of(data: dict[str, Any]) -> list[Sets]:
    """The choices of page_data again, per head; in groups of data["bin"] positions."""
    return unpack_sets(base64.b64decode(data["sets"]), data["n_choices"], len(data["heads"]),
                       n_bins(len(data["pieces"]), data["bin"]))


def numbers_of(data: dict[str, Any]) -> np.ndarray:
    """The hook's numbers again: float32 [n_measures, n_heads, len(NUMBERS)]."""
    flat = np.frombuffer(base64.b64decode(data["numbers"]), dtype="<f4")
    return flat.reshape(data["n_measures"], len(data["heads"]), len(NUMBERS))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ---- packing ---------------------------------------------------------------------------------------------------------

def n_bins(n_positions: int, width: int) -> int:
    return -(-n_positions // width)


def _pack_within(choices: list[Sets], n_positions: int, n_bytes: int) -> tuple[int, bytes]:
    """(width, packed sets): the narrowest power of two as width of a bin for which they are no larger than n_bytes."""
    width = 1
    while True:
        packed = pack_sets([[np.unique(s // width) for s in sets] for sets in choices], n_bins(n_positions, width))
        if len(packed) <= n_bytes or width >= n_positions:
            return width, packed
        width *= 2


def pack_sets(choices: list[Sets], size: int) -> bytes:
    """The sets of each choice and head, members in [0, size), as the bit stream described above."""
    if not choices:
        return b""
    before: Sets = [np.empty(0, dtype=np.int32)] * len(choices[0])
    bits = []
    for sets in choices:
        codes = [_codes(np.setxor1d(a, b, assume_unique=True), size) for a, b in zip(before, sets)]
        bits.append(_bits(np.concatenate([v for v, _ in codes]), np.concatenate([k for _, k in codes])))
        before = sets
    return np.packbits(np.concatenate(bits)).tobytes()


def unpack_sets(packed: bytes, n_choices: int, n_heads: int, size: int) -> list[Sets]:
    """The inverse of pack_sets."""
    read = _Reader(packed)
    member = np.zeros((n_heads, size), dtype=bool)
    out = []
    for _ in range(n_choices):
        for head in range(n_heads):
            for start, stop in _runs_in(read, size):
                member[head, start:stop] ^= True
        out.append([np.flatnonzero(row).astype(np.int32) for row in member])
    return out


def _runs_in(read: "_Reader", size: int) -> Iterator[tuple[int, int]]:
    """The runs of one list of differences, as ranges."""
    n_runs, at = read.code(0), 0
    k = _order(n_runs, size)
    for _ in range(n_runs):
        start = at + read.code(k)
        at = start + 1 + read.code(0)
        yield start, at


def _order(n_runs: int, size: int) -> int:
    """Order of the codes of gaps: known to both sides, near log2 of the mean gap."""
    return max(0, (size // max(1, n_runs)).bit_length() - 2)


def _codes(members: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, orders) that code one list of differences: the number of runs, then gap and length - 1 of each."""
    cuts = np.flatnonzero(np.diff(members) != 1) + 1
    starts = members[np.concatenate([[0], cuts])] if len(members) else members
    stops = members[np.concatenate([cuts, [len(members)]]) - 1] + 1 if len(members) else members
    gaps = starts - np.concatenate([[0], stops[:-1]]) if len(members) else members
    values, orders = np.zeros(1 + 2 * len(starts), np.int64), np.zeros(1 + 2 * len(starts), np.int64)
    values[0], values[1::2], values[2::2] = len(starts), gaps, stops - starts - 1
    orders[1::2] = _order(len(starts), size)
    return values, orders


def _bits(values: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Exponential Golomb codes, as an array of bits: value + 2^k in binary, after as many zeros as it has bits above k + 1."""
    x = values + (1 << orders)
    n_binary = np.frexp(x.astype(np.float64))[1].astype(np.int64)
    n_bits = 2 * n_binary - 1 - orders
    ends = np.cumsum(n_bits)
    shift = np.repeat(ends, n_bits) - 1 - np.arange(ends[-1])  # of each bit, from the end of its code
    return ((np.repeat(x, n_bits) >> np.minimum(shift, _WORD)) & 1).astype(np.uint8)


class _Reader:
    """Reads codes from a bit stream."""

    def __init__(self, packed: bytes):
        self._bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8)).tolist()
        self._at = 0

    def code(self, k: int) -> int:
        n = k + 1
        while not self._bits[self._at]:
            self._at, n = self._at + 1, n + 1
        x = 0
        for bit in self._bits[self._at:self._at + n]:
            x = 2 * x + bit
        self._at += n
        return x - (1 << k)
