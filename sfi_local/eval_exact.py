"""Mode exact beside dense: whether the tokens are the same, prompt by prompt, and where not, whether rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from sfi_local.bench_check import CheckError, first_difference
from sfi_local.errors import InputError
from sfi_local.eval_rows import Row, plan
from sfi_local.eval_tasks import Score
from sfi_local.params import SfiParams, auto_depth


@dataclass(frozen=True)
class Difference:
    """The first token of a prompt that is not that of dense steps; both are counted from 1.

    tie: but for noise the draw could have been dense's, see noise.py
    """

    prompt: int
    token: int
    tie: bool


@dataclass(frozen=True)
class Comparison:
    """A row of mode exact beside dense, over all prompts.

    n_tokens: that dense steps gave
    n_equal:  of those, the ones that mode exact gave as well, before the first difference of their prompt: two texts
              that have parted are not compared any further
    """

    name: str
    n_prompts: int
    n_tokens: int
    n_equal: int
    differences: tuple[Difference, ...]

    @property
    def errors(self) -> list[Difference]:
        """Those that no tie explains."""
        return [d for d in self.differences if not d.tie]

    @property
    def verdict(self) -> str:
        """Of the row, in a word or two."""
        return "NOT DENSE" if self.errors else "dense but for ties" if self.differences else "dense"

    @property
    def complaint(self) -> str:
        """The sentence about a row that is not dense; "" where it is, but for ties."""
        if not self.errors:
            return ""
        first = self.errors[0]
        return (f"{self.name} is not what dense decoding gives: in {len(self.errors)} of {self.n_prompts} prompts it took another token "
                f"that is no tie, first as token {first.token} of prompt {first.prompt}. Please report this.")


def compare(exact: Score, dense: Score) -> Comparison:
    """The tokens of a row beside those of dense on the same prompts."""
    n_equal, differences = 0, []
    for number, (mine, theirs, ties) in enumerate(zip(exact.tokens, dense.tokens, exact.ties), 1):
        apart = first_difference(mine, theirs)
        n_equal += len(theirs) if apart is None else apart
        if apart is not None:
            differences.append(Difference(number, apart + 1, apart < len(ties) and ties[apart]))
    return Comparison(exact.row.name, len(dense.tokens), sum(map(len, dense.tokens)), n_equal, tuple(differences))


def refuse(scores: Sequence[Score]) -> None:
    """Raise CheckError where a row of mode exact is not dense. scores: the first is dense's"""
    for score in scores:
        found = compare(score, scores[0])
        if score.row.mode == "exact" and found.errors:
            raise CheckError(f"No numbers are shown: {found.complaint}")


def check_depth(rows: Sequence[Row], params: SfiParams, depth: int, n: int) -> None:
    """Refuse rows that would draft nothing in n tokens from a depth. params: of the run. Raises InputError, ArgumentError."""
    for row in rows:
        mine = plan(row, params, n, depth + n, {}).params
        least = mine.auto_depth or auto_depth(mine)
        if row.mode == "exact" and depth + n < least + 2:
            raise InputError(f"{row.name}: mode exact drafts from a depth of {least} tokens, below which its steps are dense: raise "
                             f"--depth.")


def check_drafted(scores: Sequence[Score]) -> None:
    """Raise CheckError where a row of mode exact drafted nothing, so that its equality says nothing."""
    for score in scores:
        if score.row.mode == "exact" and not score.n_drafted:
            raise CheckError(f"No numbers are shown: {score.row.name} drafted nothing, its steps were "
                             f"{', '.join(sorted(set(score.kinds))) or 'none'}.")
