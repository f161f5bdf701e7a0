"""Dense's own greedy output, and where a row would have gone on with another token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfi_local.lab.trunk import SwitchSession
from sfi_local.runtime.slot import Schedule

NEAR_TIE = 0.2  # nats: two dense implementations of the same model disagree about tokens that are closer than this


@dataclass(frozen=True)
class Output:
    """Tokens that dense decoding chose, and the logits that each was chosen from, float32 [n, n_vocab]."""

    tokens: list[int]
    logits: list[Any]


@dataclass(frozen=True)
class Greedy:
    """A row beside dense's output. Up to the first difference it is what the row decodes by itself; after each
    difference it goes on with dense's token, so that the others can be counted.

    n:      tokens compared
    first:  tokens before the first difference; None: there is none
    gap:    how much more likely dense finds its own token there than the row's; nats
    n_differ, n_ties: differences, and those of them where the gap is below NEAR_TIE
    """

    n: int
    first: int | None
    gap: float | None
    n_differ: int
    n_ties: int

    @property
    def tie(self) -> bool | None:
        """Whether the first difference is a near-tie."""
        return None if self.gap is None else self.gap < NEAR_TIE


def decode_greedy(session: SwitchSession, vocabulary: Any, n: int) -> Output:
    """n tokens, fewer where the answer ends (that token included), from a session that has begun a mode."""
    output = Output([], [])
    for i in range(n):
        if i:
            session.step(output.tokens[-1])
        logits = session.last_logits().copy()
        token = int(logits.argmax())
        output.tokens.append(token)
        output.logits.append(logits)
        if vocabulary.is_end(token):
            break
    return output


def compare_greedy(session: SwitchSession, output: Output, schedule: Schedule | None = None) -> Greedy:
    """What a session that has begun a mode would have chosen, token by token."""
    gaps: dict[int, float] = {}
    for i, (token, logits) in enumerate(zip(output.tokens, output.logits)):
        if i:
            session.step(output.tokens[i - 1], schedule)
        choice = int(session.last_logits().argmax())
        if choice != token:
            gaps[i] = float(logits[token]) - float(logits[choice])
    first = min(gaps, default=None)
    return Greedy(len(output.tokens), first, gaps.get(first), len(gaps), sum(gap < NEAR_TIE for gap in gaps.values()))
