"""Where an answer looks: after some of its steps, how much of each part of the prompt its heads had selected."""

from __future__ import annotations

import time
from typing import Any, Sequence

import numpy as np

from sfi_local.errors import SfiError
from sfi_local.runtime.slot import Slot
from sfi_local.runtime.step import Step

N_PARTS = 160     # of a prompt
N_HEADS = 24      # that are looked at, spread over the layers
SHARE = 0.03      # of the time, that looking may take
STRONGEST = 255


class Look:
    """Called with a slot and each of its steps: {"parts": [0 .. STRONGEST of each part]} of a fast step, or None.

    n_prompt: tokens of the prompt, which are parted into at most N_PARTS, see edges()
    Looking is skipped as often as keeps it below SHARE of the time.

        look = sfi_local.Look(model.read(text))
        for step in model.generate(text):
            seen = look(model.slot, step)
    """

    def __init__(self, n_prompt: int):
        self._edges = edges(n_prompt)
        self._heads: list[tuple[int, int]] | None = None
        self._next = 0.0

    def __call__(self, slot: Slot, step: Step) -> dict[str, Any] | None:
        began = time.monotonic()
        if step.kind != "fast" or slot.engine is None or began < self._next:
            return None
        try:
            total = self._count(slot.engine)
        except SfiError:  # no support now
            return None
        self._next = time.monotonic() + (time.monotonic() - began) / SHARE
        return {"parts": strengths(total, self._edges)}

    def _count(self, engine: Any) -> np.ndarray:
        """Of each position, how many of the heads had selected it."""
        if self._heads is None:
            found = [(il, head) for il, layer in enumerate(engine.layers()) if layer.sparse for head in range(layer.n_head_kv)]
            self._heads = found[::max(1, len(found) // N_HEADS)]
        total = np.zeros(self._edges[-1], dtype=np.int64)
        for il, head in self._heads:
            positions = np.asarray(engine.selected(il, head)[1], dtype=np.int64)
            total += np.bincount(positions[(positions >= 0) & (positions < len(total))], minlength=len(total))
        return total


def edges(n_prompt: int) -> list[int]:
    """Where the parts of a prompt begin, and its end: of as many tokens each as makes at most N_PARTS."""
    size = max(1, -(-n_prompt // N_PARTS))
    return [*range(0, n_prompt, size), n_prompt]


def strengths(total: np.ndarray, at: Sequence[int]) -> list[int]:
    """The mean of each part, the strongest of them being STRONGEST; zeros where nothing was selected."""
    means = np.add.reduceat(total, at[:-1]) / np.diff(at)
    most = means.max()
    return [int(value) for value in np.round(means * (STRONGEST / most if most else 0))]


def texts(spell: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each part of a prompt; together they are all of it. spell: token -> (bytes, whether it has no text)"""
    pieces = [spell(token)[0] for token in tokens]
    at = edges(len(pieces))
    return [b"".join(pieces[a:b]).decode("utf-8", errors="replace") for a, b in zip(at, at[1:])]
