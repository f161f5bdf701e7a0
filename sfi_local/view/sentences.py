"""Which sentences of a text fast steps read most. Pure."""

from __future__ import annotations

import re
from typing import Any, Sequence

import numpy as np

_END = re.compile(r"[.!?][\"'”’)\]]*$")              # an end if a blank follows
_SURE_END = re.compile(r"(?:\n\s*\n|[。！？][」』）]*|[.!?][\"'”’)\]]*\s)\s*$")
_NEW_THING = re.compile(r"\s*(?:\n|[-*•#|>]|\d+[.)]|$)")  # after a newline: an empty line, a list, a heading, a table
LEAST = 4      # tokens; less is a number, a name, a mark of the template
ORDINARY = 12  # tokens; a shorter sentence is not put first for one word of it
LONGEST = 80   # tokens; what has no end by then is cut, as a table or code
N_BEST = 5


def sentences(pieces: Sequence[str], n: int) -> list[tuple[int, int]]:
    """Ranges of positions among the first n tokens: sentences, whatever lines they are broken into; items of a list."""
    out, start, n = [], 0, min(n, len(pieces))
    for i in range(n):
        special = _is_special(pieces[i])
        is_role = i - start <= 1 and pieces[i].endswith("\n") and start > 0 and _is_special(pieces[start - 1])
        if special or is_role or i + 1 - start >= LONGEST or i + 1 == n or _ends(pieces[i], pieces[i + 1]):
            stop = i if special else i + 1
            if stop - start >= LEAST and "".join(pieces[start:stop]).strip():
                out.append((start, stop))
            start = i + 1
    return out


def _is_special(piece: str) -> bool:
    """Whether a piece looks like the name of a special token."""
    return len(piece) > 2 and piece.startswith("<") and piece.endswith(">")


def _ends(piece: str, following: str) -> bool:
    if _END.search(piece) and (following[:1].isspace() or _is_special(following)):
        return True
    return bool(_SURE_END.search(piece) or piece.endswith("\n") and _NEW_THING.match(following))


def shares(collector: Any, n: int) -> np.ndarray:
    """float64 [n]: the share of heads that chose each position, the mean over the fast steps; zeros where there are none."""
    total, n_steps = np.zeros(n), 0
    for choice, sets in enumerate(collector.choices):
        weight = sum(chosen == choice and step.kind == "fast" for chosen, step in zip(collector.chosen, collector.steps))
        n_steps += weight
        for positions in sets if weight else ():
            total[positions[positions < n]] += weight
    return total / max(1, n_steps * len(collector.heads))


def read_most(share: np.ndarray, ranges: Sequence[tuple[int, int]], n_best: int = N_BEST) -> list[tuple[int, float]]:
    """[(number of a sentence, mean share of its tokens)], the most read first; none that was not read."""
    weights = [share[a:b].sum() / max(ORDINARY, b - a) for a, b in ranges]
    best = sorted(range(len(ranges)), key=lambda i: -weights[i])[:n_best]
    return [(i, round(float(share[slice(*ranges[i])].mean()), 4)) for i in best if weights[i] > 0]
