"""Mode exact beside dense: whether the tokens are the same, prompt by prompt, and where not, whether rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from sfi_local.binding.context import logits
from sfi_local.errors import InputError
from sfi_local.lab.checks import CheckError, first_difference
from sfi_local.lab.checks import compare as compare_logits
from sfi_local.lab.eval.rows import Row, plan
from sfi_local.lab.eval.score import Score
from sfi_local.lab.trunk import SwitchSession
from sfi_local.params import SfiParams, auto_depth
from sfi_local.runtime.step import Tally

N_NEAR = 16    # rows of logits before a difference that are compared with dense's
MAX_KL = 0.02  # nats: what two correct kernels of different rounding may differ by, in the mean of these rows


@dataclass(frozen=True)
class Difference:
    """The first token of a prompt that is not that of dense steps; both are counted from 1.

    tie:      but for noise the draw could have been dense's, see ties.py
    rounding: the same passes without drafts draw this token too, see from_rounding()
    """

    prompt: int
    token: int
    tie: bool
    rounding: bool


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
        """Those that rounding does not explain."""
        return [d for d in self.differences if not (d.tie or d.rounding)]

    @property
    def verdict(self) -> str:
        """Of the row, in a word or two."""
        return "NOT DENSE" if self.errors else "dense but for rounding" if self.differences else "dense"

    @property
    def complaint(self) -> str:
        """The sentence about a row that is not dense; "" where it is, but for rounding."""
        if not self.errors:
            return ""
        first = self.errors[0]
        return (f"{self.name} is not what dense decoding gives: in {len(self.errors)} of {self.n_prompts} prompts it took another token "
                f"that is no tie and not from rounding, first as token {first.token} of prompt {first.prompt}. Please report this.")


def compare(exact: Score, dense: Score) -> Comparison:
    """The tokens of a row beside those of dense on the same prompts."""
    n_equal, differences = 0, []
    for number, (mine, theirs, ties, rounding) in enumerate(zip(exact.tokens, dense.tokens, exact.ties, exact.rounding), 1):
        apart = first_difference(mine, theirs)
        n_equal += len(theirs) if apart is None else apart
        if apart is not None:
            differences.append(Difference(number, apart + 1, apart < len(ties) and ties[apart], rounding))
    return Comparison(exact.row.name, len(dense.tokens), sum(map(len, dense.tokens)), n_equal, tuple(differences))


def refuse(scores: Sequence[Score]) -> None:
    """Raise CheckError where a row of mode exact is not dense. scores: the first is dense's"""
    for score in scores:
        found = compare(score, scores[0])
        if score.row.decodes.verifies and found.errors:
            raise CheckError(f"No numbers are shown: {found.complaint}")


# ---- what rounding explains ------------------------------------------------------------------------------------------

def from_rounding(session: "SwitchSession", params: SfiParams, tally: "Tally", dense: Sequence[int], sampler: Any) -> bool:
    """Whether the first difference of an answer comes from rounding alone.

    The passes and dense steps of the answer are done again from the trunk without a single fast step, and the sampler draws
    from their logits: so whatever drafting could have left behind is gone. They must give the answer's own tokens, the
    different one too, from logits that are near to those of dense steps.
    sampler: as it was before the answer. Contexts end in another state.
    """
    apart = first_difference(tally.tokens, dense)
    if apart is None or apart >= len(tally.tokens):
        return False
    tokens, near = _replay(session, params, tally, apart, sampler)
    if tokens != tally.tokens[:apart + 1]:
        return False
    try:
        compare_logits("exact", near, "dense", _dense_logits(session, params, dense[:apart], len(near)), MAX_KL)
        return True
    except CheckError:
        return False


def _replay(session: "SwitchSession", params: SfiParams, tally: "Tally", last: int, sampler: Any) -> tuple[list[int], Any]:
    """(tokens up to number `last`, the logits of the latest of them, float32 [n, n_vocab]) by the steps and passes of an answer."""
    import numpy as np

    session.begin("dense", params)
    spans = {span.end - span.n_accepted: span for span in tally.spans}
    drawn, rows = [sampler.sample(session.context)], [session.last_logits().copy()]
    while len(drawn) <= last:
        first = len(drawn)
        span = spans.get(first)
        for row in _pass(session, tally.tokens[first - 1:span.end], span.n_again) if span else _step(session, tally.tokens[first - 1]):
            drawn.append(sampler.sample(session.context, row))
            rows = [*rows, logits(session.context, row).copy()][-N_NEAR:]
            if len(drawn) > last:
                break
    return drawn, np.array(rows)


def _step(session: "SwitchSession", token: int) -> range:
    """A dense step; the row of its logits."""
    session.step(token)
    return range(-1, 0)


def _pass(session: "SwitchSession", tokens: Sequence[int], n_known: int) -> range:
    """A dense pass over tokens, and over those before them that it computes again; the rows of the logits of the tokens."""
    known = session.tokens[len(session.tokens) - n_known:]
    session.engine.verify([*known, *tokens], n_known, False)
    session.tokens += tokens
    return range(n_known, n_known + len(tokens))


def _dense_logits(session: "SwitchSession", params: SfiParams, tokens: Sequence[int], n: int) -> Any:
    """The last n rows of logits, that of the prompt's end among them, of dense steps over tokens."""
    import numpy as np

    session.begin("dense", params)
    rows = [session.last_logits().copy()]
    for token in tokens:
        session.step(token)
        rows = [*rows, session.last_logits().copy()][-n:]
    return np.array(rows)


# ---- refusals --------------------------------------------------------------------------------------------------------

def check_depth(rows: Sequence[Row], params: SfiParams, depth: int, n: int) -> None:
    """Refuse rows that would draft nothing in n tokens from a depth. params: of the run. Raises InputError, ArgumentError."""
    for row in rows:
        mine = plan(row, params, n, depth + n, {}).params
        least = mine.auto_depth or auto_depth(mine)
        if row.decodes.verifies and depth + n < least + 2:
            raise InputError(f"{row.name}: mode exact drafts from a depth of {least} tokens, below which its steps are dense: raise "
                             f"--depth.")


def check_drafted(scores: Sequence[Score]) -> None:
    """Raise CheckError where a row of mode exact drafted nothing, so that its equality says nothing."""
    for score in scores:
        if score.row.decodes.verifies and not score.n_drafted:
            raise CheckError(f"No numbers are shown: {score.row.name} drafted nothing, its steps were "
                             f"{', '.join(sorted(set(score.kinds))) or 'none'}.")
