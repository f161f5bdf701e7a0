"""What `sfi-local view` shows: collected step by step through the support-stability hook, and packed to be small.

The selected positions of every layer and KV head are a bit stream of differences: each moment says, head by head, which
positions joined or left since the moment before. A list of differences is coded as runs (so many positions to skip, so
many in a row), and runs as exponential Golomb codes, which suit both the long runs that pooling makes and scattered
single cells. view_page.html reads the same stream; :func:`unpack_sets` is its specification.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Iterator, Sequence

import numpy as np

from sfi_local.errors import NoSupportError
from sfi_local.step import Step

NUMBERS = ("n_selected", "evidence", "mass", "mass_prev", "jaccard")  # of engine.Stability, in the order they are packed
MAX_SETS_BYTES = 1_500_000  # of the packed sets; positions are binned until they fit
_WORD = 62  # bits of the longest code

Sets = list[np.ndarray]  # one sorted int array of positions (or bins) per head


@dataclass(frozen=True)
class Moment:
    """The supports after a step that changed them.

    sets:    per head, the selected positions, ascending
    numbers: float32 [n_heads, len(NUMBERS)], what the hook said
    """

    sets: Sets
    numbers: np.ndarray

    def equals(self, other: "Moment | None") -> bool:
        return (other is not None and np.array_equal(self.numbers, other.numbers, equal_nan=True)
                and all(map(np.array_equal, self.sets, other.sets)))


@dataclass
class Collector:
    """Takes each Step of a generation, and from its engine the supports that are in force after it.

    engine:  None where decoding is llama.cpp's own
    heads:   (layer, KV head) of every layer that can be sparse, in the order of all per-head arrays
    moments: without repetitions; in_force: per step the number of its moment, -1 where there is none
    recent_from: per step, the first position of the recent window
    """

    engine: Any
    n_prompt: int
    n_sink: int
    n_recent: int
    heads: list[tuple[int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    in_force: list[int] = field(default_factory=list)
    recent_from: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, session: Any, n_prompt: int) -> "Collector":
        """The collector of a generation that has begun in a Session, with a prompt of n_prompt tokens."""
        return cls(session.engine, n_prompt, session.params.n_sink, session.params.n_recent)

    def __post_init__(self) -> None:
        layers = self.engine.layers() if self.engine else []
        self.heads = [(il, head) for il, layer in enumerate(layers) if layer.sparse for head in range(layer.n_head_kv)]

    def add(self, step: Step) -> None:
        """Call it before the generator goes on: the engine must still be where the step left it."""
        moment = None if step.kind in ("dense", "stock") else self._read()  # these neither follow a choice nor make one
        if moment and not moment.equals(self.moments[-1] if self.moments else None):
            self.moments.append(moment)
        self.steps.append(step)
        self.in_force.append(len(self.moments) - 1 if moment else -1)
        self.recent_from.append(self._recent_from(step, moment))

    def forget_choices(self) -> None:
        """For a generation without a fast step: what the prefill chose was never used."""
        self.moments, self.in_force = [], [-1] * len(self.steps)

    def _read(self) -> Moment | None:
        try:
            sets = [_positions(self.engine.selected(il, head)[1]) for il, head in self.heads]
            numbers = [[getattr(self.engine.stability(il, head), name) for name in NUMBERS] for il, head in self.heads]
        except NoSupportError:
            return None
        return Moment(sets, np.array(numbers, dtype=np.float32)) if sets else None

    def _recent_from(self, step: Step, moment: Moment | None) -> int:
        """A fast step attended to the first cells, the selected ones, and as many of the latest as are missing to n_cells."""
        n_recent = self.n_recent
        if step.kind == "fast" and moment:
            n_recent = step.n_cells - min(self.n_sink, step.depth) - max(map(len, moment.sets))
        return max(min(self.n_sink, step.depth), step.depth - n_recent)


def _positions(positions: Sequence[int]) -> np.ndarray:
    found = np.array(positions, dtype=np.int32)
    return np.unique(found[found >= 0])


def page_data(collector: Collector, pieces: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page and the picture show, as JSON can hold it.

    pieces: the text of each token, prompt and answer; about: facts for the heading
    bin:    positions are stored in groups of so many; 1: each on its own
    """
    steps, width, packed = collector.steps, *_pack_within(collector.moments, len(pieces), MAX_SETS_BYTES)
    return {
        **about,
        "pieces": pieces,
        "n_prompt": collector.n_prompt,
        "n_sink": collector.n_sink,
        "heads": collector.heads,
        "kind": [s.kind for s in steps], "reason": [s.reason for s in steps], "ms": [round(s.t_ms, 3) for s in steps],
        "depth": [s.depth for s in steps], "n_cells": [s.n_cells for s in steps],
        "recent_from": collector.recent_from, "in_force": collector.in_force,
        "n_moments": len(collector.moments),
        "bin": width,
        "sets": base64.b64encode(packed).decode("ascii"),
        "numbers": base64.b64encode(b"".join(m.numbers.astype("<f4").tobytes() for m in collector.moments)).decode("ascii"),
    }


def sets_of(data: dict[str, Any]) -> list[Sets]:
    """The sets of page_data again, per moment and head; in groups of data["bin"] positions."""
    return unpack_sets(base64.b64decode(data["sets"]), data["n_moments"], len(data["heads"]),
                       n_bins(len(data["pieces"]), data["bin"]))


def numbers_of(data: dict[str, Any]) -> np.ndarray:
    """The hook's numbers again: float32 [n_moments, n_heads, len(NUMBERS)]."""
    flat = np.frombuffer(base64.b64decode(data["numbers"]), dtype="<f4")
    return flat.reshape(data["n_moments"], len(data["heads"]), len(NUMBERS))


# ---- packing ---------------------------------------------------------------------------------------------------------

def n_bins(n_positions: int, width: int) -> int:
    return -(-n_positions // width)


def _pack_within(moments: list[Moment], n_positions: int, n_bytes: int) -> tuple[int, bytes]:
    """(width, packed sets): the narrowest power of two as width of a bin for which they are no larger than n_bytes."""
    width = 1
    while True:
        packed = pack_sets([[np.unique(s // width) for s in m.sets] for m in moments], n_bins(n_positions, width))
        if len(packed) <= n_bytes or width >= n_positions:
            return width, packed
        width *= 2


def pack_sets(moments: list[Sets], size: int) -> bytes:
    """The sets of each moment and head, members in [0, size), as the bit stream described above."""
    if not moments:
        return b""
    before: Sets = [np.empty(0, dtype=np.int32)] * len(moments[0])
    bits = []
    for sets in moments:
        codes = [_codes(np.setxor1d(a, b, assume_unique=True), size) for a, b in zip(before, sets)]
        bits.append(_bits(np.concatenate([v for v, _ in codes]), np.concatenate([k for _, k in codes])))
        before = sets
    return np.packbits(np.concatenate(bits)).tobytes()


def unpack_sets(packed: bytes, n_moments: int, n_heads: int, size: int) -> list[Sets]:
    """The inverse of pack_sets."""
    read = _Reader(packed)
    member = np.zeros((n_heads, size), dtype=bool)
    out = []
    for _ in range(n_moments):
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
