"""Mode exact: fast steps draft, a dense pass verifies; what comes out is what dense decoding gives.

    loop   draft: a clone of the sampler, random numbers included, samples a few tokens from the logits of fast steps
           verify: the last sure token and the drafts go through the model again in one dense batch, whose K and V
                   take the place of those of the fast steps
           keep: the sampler itself draws each token from the logits of the batch, as it would from those of dense
                 steps; the first that differs from its draft ends the span, and the drafts from there on are taken back

Every token is drawn by the sampler from dense logits, with the random numbers that dense decoding would use: so with the
same seed it is the same token, and with any seed it has the same distribution. A draft that draws with those random
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
from sfi_local.runtime.draft_length import FIRST, SpanLength
from sfi_local.runtime.generate import Ending, begin, top
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
    Items: ``fast`` a draft that was kept; ``dense`` with reason ``verify`` the token that the pass itself gave, ``slow`` if
    the pass ended with a refresh; others are steps without drafts. The last item of a span has the time of its pass and
    of the drafts that were not kept.
    """
    return slot.turn(_generate_exact(slot, vocabulary, prompt, sampler, n, stop, draft, progress, logprobs))


def _generate_exact(slot: Slot, vocabulary: Vocabulary, prompt: Sequence[int], sampler: Any, n: int | None, stop: Sequence[str],
                    draft: int | None, progress: Progress | None, logprobs: int | None) -> Iterator[Step]:
    info = begin(slot, prompt, progress)
    ending, length = Ending(slot, vocabulary, n, stop), SpanLength(draft)
    token = sampler.sample(slot.context)
    yield (step := replace(ending.step(token, info), **top(slot.context, -1, token, logprobs)))
    while not step.finish:
        room = min(ending.n_left, slot.n_ctx - info.pos - 1) - 1  # the token itself needs a cell and is followed by one
        span = decode_span(slot, vocabulary, sampler, token, room, length, logprobs)
        for token, info, more in span:
            yield (step := replace(ending.step(token, info), **more))
            if step.finish:
                return


def decode_span(slot: Slot, vocabulary: Vocabulary, sampler: Any, token: int, room: int,
                length: SpanLength, logprobs: int | None = None) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """The tokens that follow `token`, which is sure and not in the cache yet, by a span of `room` drafts at most.

    Returns [(token, its step, more fields of its Step)], one at least; the last is not in the cache yet.
    """
    n_known = slot.noise.n_steps(len(slot.tokens))
    n_drafts = min(_n_wanted(slot, length, n_known), room, _window_room(slot))
    if n_drafts < 1 or not slot.can_draft(token):
        info = slot.step(token)
        length.dense(info.t_ms)
        slot.n_since_refresh = 0 if info.kind == "slow" else slot.n_since_refresh + 1
        slot.noise.remember(slot.context, len(slot.tokens))
        token, tie = slot.noise.draw(slot.context, -1, sampler)
        return [(token, info, {"tie": tie, **top(slot.context, -1, token, logprobs)})]
    known = slot.tokens[len(slot.tokens) - n_known:]  # their logits came by dense steps
    drafts = _draft(slot, vocabulary, sampler.clone(), token, n_drafts)
    refresh = _refresh_is_due(slot, length)
    info = slot.verify([*known, token, *(d.token for d in drafts)], refresh)
    if known:
        slot.noise.compare(slot.context)
    kept, more = _keep(slot, sampler, drafts, n_known, logprobs)
    slot.rollback(len(drafts) - len(kept) + 1)
    slot.n_since_refresh = 0 if refresh else slot.n_since_refresh + len(kept)
    length.verified(len(drafts), len(kept) - 1, sum(d.info.t_ms for d in drafts), info.t_ms, n_known)
    return _items(kept, more, drafts, info)


def _n_wanted(slot: Slot, length: SpanLength, n_known: int) -> int:
    """Tokens to draft: as many as pay; none while dense steps are collected in which noise can be seen, then some in any case."""
    if not (length.begun and slot.noise.wants_steps):
        return length.next()
    return length.next() or FIRST if n_known == STEPS else 0


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
    info: StepInfo  # of the fast step whose logits it was sampled from


def _draft(slot: Slot, vocabulary: Vocabulary, sampler: Any, token: int, n: int) -> list[_Draft]:
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


def _items(kept: list[int], more: list[dict[str, Any]], drafts: list[_Draft], info: StepInfo) -> list[tuple[int, StepInfo, dict[str, Any]]]:
    """The items of a span; `kept` ends with the token that the pass gave."""
    n_accepted, pos = len(kept) - 1, drafts[0].info.pos
    ms = info.t_ms + sum(d.info.t_ms for d in drafts[n_accepted:])
    last = replace(info, pos=pos + n_accepted, depth=pos + n_accepted + 1, n_cells=pos + n_accepted + 1, t_ms=ms)
    items = [(d.token, d.info, fields) for d, fields in zip(drafts[:n_accepted], more)]
    return [*items, (kept[-1], last, {**more[-1], "n_drafted": len(drafts), "n_accepted": n_accepted})]
