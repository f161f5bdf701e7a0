"""Mode exact: the text itself or fast steps draft, a dense pass verifies; what comes out is what dense decoding gives.

    loop   draft: what followed the last tokens where they stood before, which costs nothing (ngram.py); or a clone of the sampler,
                   random numbers included, samples a few tokens from the logits of fast steps. draft_length.py says which, and
                   how many, or that a dense step is faster
           verify: the last sure token and the drafts go through the model in one dense batch, whose K and V take the place of
                   those of fast steps
           keep: the sampler itself draws each token from the logits of the batch, as it would from those of dense
                 steps; the first that differs from its draft ends the span, and the drafts from there on are taken back

Every token is drawn by the sampler from dense logits, with the random numbers that dense decoding would use: so with the
same seed it is the same token, and with any seed it has the same distribution. A fast step that draws with those random
numbers from nearly those probabilities nearly always gets it right. This needs no probabilities, and so any sampler
that can be cloned will do.

Where the kernels round a batch as they round single tokens, K, V and logits are those of dense steps bit for bit. Where
they do not, a draw that the difference could change is a tie, with temperature 0 a token with another as near; the stream counts
them by what was seen of the difference (ties.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterator, Sequence

from sfi_local.binding.engine import StepInfo
from sfi_local.runtime.draft_length import FAST, MAX_DRAFTS, NGRAM, SpanLength
from sfi_local.runtime.generate import Ending, begin, top
from sfi_local.runtime.ngram import Ngrams
from sfi_local.runtime.slot import Progress, Slot
from sfi_local.runtime.step import Step
from sfi_local.runtime.ties import STEPS
from sfi_local.runtime.vocabulary import Vocabulary


def generate_exact(slot: Slot, vocabulary: Vocabulary, prompt: Sequence[int], sampler: Any,
                   n: int | None = None, stop: Sequence[str] = (), draft: int | None = None,
                   progress: Progress | None = None, logprobs: int | None = None) -> Iterator[Step]:
    """Yield one Step per token, of a span as soon as it is verified; see generate.generate.

    sampler: has ``sample(context, row) -> token id`` and ``clone()``
    draft:   tokens drafted per span at most; None: as many as pay, none where that is slower than dense steps
    Items: ``fast`` the draft of a fast step that was kept; ``dense`` with reason ``ngram`` a draft by the text that was kept, with
    reason ``verify`` the token that the pass itself gave, both ``slow`` if the pass ended with a refresh; others are steps without
    drafts. The last item of a span has the time of its pass, or of drafts by the text each its part, and of fast steps in vain.
    """
    return slot.turn(_generate_exact(slot, vocabulary, prompt, sampler, n, stop, draft, progress, logprobs))


def _generate_exact(slot: Slot, vocabulary: Vocabulary, prompt: Sequence[int], sampler: Any, n: int | None, stop: Sequence[str],
                    draft: int | None, progress: Progress | None, logprobs: int | None) -> Iterator[Step]:
    info = begin(slot, prompt, progress)
    ending, drafting = Ending(slot, vocabulary, n, stop), Drafting(slot, draft)
    token = sampler.sample(slot.context)
    yield (step := replace(ending.step(token, info), **top(slot.context, -1, token, logprobs)))
    while not step.finish:
        room = min(ending.n_left, slot.n_ctx - info.pos - 1) - 1  # the token itself needs a cell and is followed by one
        span = decode_span(slot, vocabulary, sampler, token, room, drafting, logprobs)
        for token, info, more in span:
            yield (step := replace(ending.step(token, info), **more))
            if step.finish:
                return


class Drafting:
    """What one generation of a slot drafts by.

    draft: tokens per span, if given; 0: none are drafted
    """

    def __init__(self, slot: Slot, draft: int | None = None):
        self.length, self.ngrams = SpanLength(draft, slot.costs), Ngrams(slot.tokens)

    def next(self, room: int, fast: bool) -> tuple[str, int]:
        """See SpanLength.next()."""
        return self.length.next(room, self.ngrams.odds(MAX_DRAFTS), fast)


def decode_span(slot: Slot, vocabulary: Vocabulary, sampler: Any, token: int, room: int,
                drafting: Drafting, logprobs: int | None = None) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """The tokens that follow `token`, which is sure and not in the cache yet, by a span of `room` drafts at most.

    Returns [(token, its step, more fields of its Step)], one at least; the last is not in the cache yet.
    """
    drafting.ngrams.follow(slot.tokens, token)
    source, n_drafts = _planned(slot, token, room, drafting)
    if source is None:
        return _dense(slot, sampler, token, drafting, logprobs)
    n_known = slot.noise.n_again(len(slot.tokens), 1 + n_drafts)
    known = slot.tokens[len(slot.tokens) - n_known:]  # their logits came by dense steps
    drafts = _by_fast_steps(slot, vocabulary, sampler.clone(), token, n_drafts) if source == FAST else _by_ngrams(
        vocabulary, drafting.ngrams.draft(n_drafts))
    refresh = _refresh_is_due(slot, drafting.length)
    info = slot.verify([*known, token, *(d.token for d in drafts)], n_known + (len(drafts) if source == FAST else 0), refresh)
    if known and not slot.noise.compare(slot.context, n_known, 1 + len(drafts)):
        return _instead(slot, sampler, known, token, len(drafts), drafting, logprobs)
    kept, more = _keep(slot, sampler, drafts, n_known, logprobs)
    slot.rollback(len(drafts) - len(kept) + 1)
    if not slot.noise.largest:
        slot.noise.remember(slot.context, len(slot.tokens), n_known + len(kept) - 1)
    slot.n_since_refresh = 0 if refresh else slot.n_since_refresh + len(kept)
    drafting.length.verified(source, len(drafts), len(kept) - 1, sum(d.info.t_ms for d in drafts if d.info), info.t_ms, n_known)
    return _items(kept, more, drafts, info, {"drafted_by": source, "n_again": n_known})


def _planned(slot: Slot, token: int, room: int, drafting: Drafting) -> tuple[str | None, int]:
    """(what drafts, how many tokens); None: a dense step, as while such steps are collected in which noise can be seen. Then a pass
    looks at them, with drafts or without."""
    if room < 0 or not slot.can_verify(token):
        return None, 0
    if drafting.length.begun and slot.noise.wants_steps:
        return (NGRAM, 0) if slot.noise.n_steps(len(slot.tokens)) == STEPS else (None, 0)
    room = slot.noise.most(len(slot.tokens), 1 + min(room, _window_room(slot))) - 1
    source, n = drafting.next(room, slot.can_draft(token))
    return source or None, n


def _dense(slot: Slot, sampler: Any, token: int, drafting: Drafting, logprobs: int | None) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """A step without drafts."""
    info = slot.step(token)
    drafting.length.dense(info.t_ms)
    slot.n_since_refresh = 0 if info.kind == "slow" else slot.n_since_refresh + 1
    slot.noise.remember(slot.context, len(slot.tokens))
    token, tie = slot.noise.draw(slot.context, -1, sampler)
    return [(token, info, {"tie": tie, **top(slot.context, -1, token, logprobs)})]


def _instead(slot: Slot, sampler: Any, known: list[int], token: int, n_drafts: int, drafting: Drafting,
             logprobs: int | None) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """Dense steps in place of a pass that is not as they are; from now on none is as long."""
    slot.rollback(len(known) + 1 + n_drafts)
    for one in known:
        slot.step(one)
    return _dense(slot, sampler, token, drafting, logprobs)


def _window_room(slot: Slot) -> int:
    """Drafts that surely stay in the window of the support, from which they can be taken back."""
    params = slot.params
    return params.max_span - slot.n_since_refresh if params.refreshes else params.n_recent


def _refresh_is_due(slot: Slot, length: SpanLength) -> bool:
    """Whether a pass shall choose a new support: evidence costs more than a dense step, so not each does.

    Half way to where the window is full, or earlier where the last drafts were mostly wrong.
    """
    params = slot.params
    return params.refreshes and slot.n_since_refresh >= (min(params.min_span, params.max_span // 2) if length.poor else params.max_span // 2)


@dataclass(frozen=True)
class _Draft:
    token: int
    info: StepInfo | None = None  # of the fast step whose logits it was sampled from


def _by_fast_steps(slot: Slot, vocabulary: Vocabulary, sampler: Any, token: int, n: int) -> list[_Draft]:
    """Up to n drafted tokens; none after the end of an answer. The last is not in the cache yet."""
    drafts: list[_Draft] = []
    while len(drafts) < n:
        info = slot.draft(token)
        token = sampler.sample(slot.context)
        drafts.append(_Draft(token, info))
        if vocabulary.is_end(token) or info.kind != "fast":
            break
    sampler.close()
    return drafts


def _by_ngrams(vocabulary: Vocabulary, tokens: list[int]) -> list[_Draft]:
    """The tokens up to the end of an answer; nothing is computed."""
    ends = [i for i, token in enumerate(tokens, 1) if vocabulary.is_end(token)]
    return [_Draft(token) for token in tokens[:ends[0] if ends else None]]


def _keep(slot: Slot, sampler: Any, drafts: list[_Draft], first: int,
          logprobs: int | None) -> tuple[list[int], list[dict[str, Any]]]:
    """Tokens drawn from the rows of the batch from `first` on, up to the first that is not its draft; more fields of each."""
    tokens, more = [], []
    for i in range(len(drafts) + 1):
        token, tie = slot.noise.draw(slot.context, first + i, sampler)
        tokens.append(token)
        more.append({"tie": tie, **top(slot.context, first + i, token, logprobs)})
        if i == len(drafts) or tokens[-1] != drafts[i].token:
            break
    return tokens, more


def _items(kept: list[int], more: list[dict[str, Any]], drafts: list[_Draft], info: StepInfo,
           span: dict[str, Any]) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """The items of a span; `kept` ends with the token that the pass gave. What a pass took is told of its last token; where drafts took
    nothing, of all its tokens in equal parts. span: more fields of the last"""
    n_accepted, pos = len(kept) - 1, info.pos - len(drafts)
    free = all(d.info is None for d in drafts)
    at = [replace(info, pos=pos + i, depth=pos + i + 1, n_cells=pos + i + 1, t_ms=info.t_ms / len(kept)) for i in range(len(kept))]
    wasted = sum(d.info.t_ms for d in drafts[n_accepted:] if d.info)
    last = at[-1] if free else replace(at[-1], t_ms=info.t_ms + wasted)
    items = [(d.token, d.info or replace(step, reason="ngram"), fields) for d, step, fields in zip(drafts, at[:n_accepted], more)]
    return [*items, (kept[-1], last, {**more[-1], "n_drafted": len(drafts), "n_accepted": n_accepted, **span})]
