"""The comparisons that stand between a measurement, of bench or eval, and its numbers."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, Sequence

from sfi_local.errors import SfiError
from sfi_local.lab.bench.session import Decoded

TIE = 25  # times the KL allowed: tokens whose log-probabilities are closer than that, in nats, may change places; seen: 75 x the KL

MAX_KL_AGAIN = 1e-4  # of one step; threads may add in another order


class CheckError(SfiError):
    """A mode did not compute what it stands for, so its numbers mean nothing."""


def compare(name: str, logits: Any, other_name: str, other: Any, max_kl: float) -> float:
    """The mean KL divergence, in nats, of the steps of one mode from those of another; logits [n, n_vocab].

    Raises CheckError above max_kl, or where the most likely tokens differ and are no tie.
    """
    import numpy as np

    if not (np.isfinite(logits).all() and np.isfinite(other).all()):
        raise CheckError(f"No numbers are shown: the logits of {name} or {other_name} are not finite.")
    p, q = _log_softmax(logits), _log_softmax(other)
    kl = float((np.exp(q) * (q - p)).sum(axis=-1).mean())
    best = p.argmax(axis=-1)[:, None]
    gap = float((q.max(axis=-1) - np.take_along_axis(q, best, axis=-1)[:, 0]).max())
    if kl > max_kl or gap > TIE * max_kl:
        raise CheckError(f"No numbers are shown: {name} does not equal {other_name} (KL {kl:.4f}, allowed {max_kl}; the most "
                         f"likely tokens are {gap:.3f} nats apart, allowed {TIE * max_kl:g}). Please report this.")
    return kl


def only(decoded: "Decoded", kind: str) -> None:
    """Every step was of one kind."""
    if set(decoded.kinds) != {kind}:
        raise CheckError(f"No numbers are shown: the steps of mode {kind} were {', '.join(sorted(set(decoded.kinds)))}.")


def first_difference(tokens: Sequence[int], dense: Sequence[int]) -> int | None:
    """How many tokens of mode exact are those of dense steps, before the first that is not; None: all are."""
    return next((i for i, (a, b) in enumerate(zip_longest(tokens, dense)) if a != b), None)


def same_tokens(decoded: "Decoded", dense: list[int]) -> None:
    """Mode exact gave the tokens of dense steps, up to a tie if there is one."""
    apart = first_difference(decoded.tokens, dense)
    if apart is not None and not decoded.ties[apart]:
        raise CheckError(f"No times are shown: token {apart + 1} of mode exact is not that of dense steps, and no tie. Please "
                         f"report this.")


def slow_and_fast(decoded: "Decoded", budget: int, depth: int, slow_every: int | None) -> None:
    """There were slow and fast steps, as often as asked, and they read less than dense ones."""
    kinds = decoded.kinds
    if slow_every:
        expected = ["fast" if i % slow_every else "slow" for i in range(len(kinds))]
        if kinds != expected:
            raise CheckError(f"No numbers are shown: every {slow_every}th step was to be slow, and "
                             f"{kinds.count('slow')} of {len(kinds)} were.")
    else:
        sparse("mode sfi", kinds)
    if "fast" in kinds and depth > budget and not decoded.kv_read_share < 1:
        raise CheckError(f"No numbers are shown: fast steps read {100 * decoded.kv_read_share:.0f} % of K and V at depth "
                         f"{depth}, with a budget of {budget} cells.")


def sparse(name: str, kinds: list[str]) -> None:
    """The steps of a row or mode were slow and fast ones, and there were fast ones unless a single step was taken."""
    if set(kinds) - {"slow", "fast"} or len(kinds) > 1 and "fast" not in kinds:
        raise CheckError(f"No numbers are shown: the steps of {name} were {', '.join(sorted(set(kinds)))}.")


def drafted_or_dense(name: str, kinds: list[str]) -> None:
    """The steps of a row of mode exact were kept drafts, verifying passes (dense, or slow with a refresh) and dense steps."""
    if set(kinds) - {"slow", "fast", "dense"}:
        raise CheckError(f"No numbers are shown: the steps of {name} were {', '.join(sorted(set(kinds)))}.")


def same_again(name: str, kl: float) -> None:
    """A mode that is measured twice from one state gives the same logits; kl: the largest divergence of a step, in nats."""
    if not kl <= MAX_KL_AGAIN:
        raise CheckError(f"No numbers are shown: {name} does not equal itself when it is decoded again (KL {kl:.2g} in one "
                         f"step, allowed {MAX_KL_AGAIN}). Please report this.")


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
