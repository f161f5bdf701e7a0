"""Prompts that every row answers: one prefill per prompt, then each row from the same state."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from sfi_local.cli.progress import Quiet
from sfi_local.errors import InputError
from sfi_local.lab import checks
from sfi_local.lab.eval import exact as eval_exact
from sfi_local.lab.eval.prompts import Prompt
from sfi_local.lab.eval.rows import Plan, Row, Spent, plan
from sfi_local.lab.eval.score import Score
from sfi_local.lab.eval.text import bytes_read
from sfi_local.lab.trunk import Sessions, SwitchSession
from sfi_local.params import SfiParams
from sfi_local.runtime.draft_length import NGRAM
from sfi_local.runtime.exact import generate_exact
from sfi_local.runtime.generate import generate
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.step import Tally
from sfi_local.store import layout


def greedy(number: int) -> Sampling:
    return Sampling(temp=0)


def answer_all(model: Any, prompts: Sequence[Prompt], rows: Sequence[Row], params: SfiParams, kv_type: str = "f16",
               bar: Any = None, label: str = "prompts", sampling: Callable[[int], Sampling] = greedy) -> list[Score]:
    """A Score per row; contexts of its own are made on the weights of ``model`` and freed.

    rows: the first is dense; label: of the prompts, for the bar; sampling: of a prompt, by its number from 0
    Raises InputError where every prompt is too long, CheckError where a row did other steps than it stands for.
    """
    fitting = fit(model, prompts)
    n_ctx, bar = max(len(p.tokens) + p.n for p in fitting), bar or Quiet()
    scores = [Score(row, len(prompts) - len(fitting)) for row in rows]
    layers = layout.layers(model.file)
    with Sessions(model, n_ctx, params, kv_type) as sessions:
        for i, prompt in enumerate(fitting, 1):
            spent: dict[str, Spent] = {}
            for score in scores:
                bar.say(f"{label}: {i} of {len(fitting)}, {score.row.name}")
                planned = plan(score.row, params, prompt.n, n_ctx, spent)
                session = sessions.at(score.row.kv_type, planned.params, prompt.tokens, bar.filling)
                draw = sampling(i - 1)
                tally = answer(model, session, prompt, score.row, planned, draw.chain())
                spent[score.row.name] = add(score, tally, session, prompt, planned.params, layers, kv_type)
                score.rounding.append(score.row.decodes.verifies and eval_exact.from_rounding(
                    session, planned.params, tally, scores[0].tokens[-1], draw.chain()))
            bar.advance()
    for score in scores:
        check(score)
    return scores


def fit(model: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that, with their answer, fit the context the model was made for. Raises InputError if none does."""
    limit = model.file.n_ctx_train
    fitting = [p for p in prompts if not limit or len(p.tokens) + p.n <= limit]
    if not fitting:
        shortest = min(len(p.tokens) + p.n for p in prompts)
        raise InputError(f"All {len(prompts)} prompts are longer than the {limit} tokens that the model was trained on (the "
                         f"shortest takes {shortest}): give shorter ones, or a model with a longer context.")
    return fitting


def answer(model: Any, session: SwitchSession, prompt: Prompt, row: Row, planned: Plan, sampler: Any) -> Tally:
    """One answer, by the loops that `run` and `load` generate with."""
    tally = Tally(n_prompt=len(prompt.tokens))
    session.cut_back(row.mode, planned.params)
    if row.decodes.verifies:
        steps = generate_exact(session, model.vocabulary, prompt.tokens, sampler, prompt.n, draft=row.draft)
    else:
        steps = generate(session, model.vocabulary, prompt.tokens, sampler, prompt.n, schedule=planned.schedule())
    for step in steps:
        tally.add(step)
    return tally


def add(score: Score, tally: Tally, session: SwitchSession, prompt: Prompt, params: SfiParams, layers: list,
        kv_type: str) -> Spent:
    """Put an answer into the row's score; returns what it took."""
    depth, kinds = len(prompt.tokens), list(tally.steps.elements())
    at = [depth + i for i in range(1, len(kinds) + 1)]
    n_bytes, share = bytes_read(session, layers, at, kv_type) if kinds else (0.0, 1.0)
    score.params = params
    score.scores.append(prompt.score(tally.tokens, tally.text))
    score.texts.append(tally.text)
    score.kinds += kinds
    score.reasons.update(tally.reasons)
    score.shares.append(share)
    score.bytes_per_step.append(n_bytes)
    score.depths.append(depth)
    score.tokens.append(tally.tokens)
    score.ties.append(tally.ties)
    score.n_spans += len(tally.spans)
    score.n_drafted += tally.n_drafted
    score.n_accepted += tally.n_accepted
    score.n_by_ngrams += tally.drafted(NGRAM)[1]
    score.noise = session.noise.largest if score.row.decodes.verifies else 0.0
    return Spent(max(1, len(kinds)), kinds.count("slow"), depth + len(kinds) / 2, share)


def check(score: Score) -> None:
    """Raise CheckError where a row did not do what it stands for."""
    if not score.row.decodes.fast and score.kinds:
        checks.only(score, *score.row.decodes.kinds)
    elif score.row.decodes.always_fast:
        checks.sparse(score.row.name, score.kinds)
    elif score.row.decodes.verifies:
        checks.drafted_or_dense(score.row.name, score.kinds)
