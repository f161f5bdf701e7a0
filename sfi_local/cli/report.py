"""What is said about an answer: the object of --json, and the line of statistics after the text."""

from __future__ import annotations

from typing import Any

from sfi_local.binding.library import source_id
from sfi_local.cli.progress import first_that_fits
from sfi_local.cli.request import PromptRequest
from sfi_local.runtime.draft_length import FAST, NGRAM

ENDS = {"length": "stopped at -n", "context": "the context is full", "stop": "stopped at a stop text", "": "stopped"}
DRAFTED_BY = {"n-grams": NGRAM, "fast steps": FAST}


def report(model: Any, tally: Any, request: PromptRequest, sampling: Any) -> dict[str, Any]:
    """The object that --json prints; rates in tokens per second."""
    return {
        "text": tally.text,
        "thought": "".join(tally.thoughts).strip(),
        "answer": "".join(tally.answers),
        "tokens": tally.tokens,
        "n_prompt": tally.n_prompt,
        "n_cached": tally.n_prompt - tally.n_prefilled,
        "cached_from": tally.cached_from,
        "why_read": tally.why_read,
        "n_generated": len(tally.tokens),
        "finish": tally.finish,
        "ttft_s": round(tally.s_first, 3),
        "prefill_tps": tally.prefill_tps,
        "decode_tps": tally.decode_tps,
        "steps": {kind: tally.steps[kind] for kind in ("slow", "fast", "dense", "stock")},
        "reasons": dict(tally.reasons),
        "kv_read_share": kv_read_share(model),
        "mode": request.mode,
        **decided(model, tally),
        "model": request.model,
        "source_id": source_id(),
        "policy": model.session.params.policy,
        "support": model.session.params.policy,  # what policy was called in earlier versions
        "kernels": kernels(model),
        "path": kernels(model),  # what kernels was called in earlier versions
        "budget": model.session.params.budget,
        "tolerance": model.session.params.tolerance,
        "n_ctx": model.session.n_ctx,
        "n_threads": model.n_threads,
        "kv_type": request.settings.type_k,
        "layers_on": model.gpus or ["CPU"],
        "kv_on": model.kv_gpus or ["CPU"],
        "temp": sampling.temp,
        "seed": sampling.seed,
        "notes": model.notes,
        **(drafts(model, tally) if request.mode == "exact" else {}),
    }


def drafts(model: Any, tally: Any) -> dict[str, Any]:
    """What --json says about mode exact.

    accepted: share of the drafted tokens that were kept, verify_cost: a pass over 8 tokens in dense steps; None where there was none
    drafts: in tokens, and of them those by fast steps and by the text itself, as [drafted, accepted]
    """
    return {
        "accepted": tally.n_accepted / tally.n_drafted if tally.n_drafted else None,
        "verify_cost": model.session.costs.verify_cost,
        "drafts": {"drafted": tally.n_drafted, "accepted": tally.n_accepted, "ties": tally.n_ties,
                   "ngram": list(tally.drafted(NGRAM)), "fast": list(tally.drafted(FAST))},
    }


def drafted(model: Any, tally: Any) -> list[str]:
    """The same in a few words; nothing where nothing was drafted."""
    if not tally.n_drafted:
        return []
    by = " and ".join(name for name, source in DRAFTED_BY.items() if tally.drafted(source)[0])
    cost = model.session.costs.verify_cost
    return [f"{tally.n_drafted} drafted by {by}, {100 * tally.n_accepted / tally.n_drafted:.0f} % accepted",
            *([f"8 are verified in {cost:.1f} dense steps"] if cost else [])]


def short_statistics(model: Any, tally: Any, width: int = 1 << 16) -> str:
    """The line after an answer, with as much as fits into so many columns."""
    steps = sum(tally.steps.values())
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.steps.items()))
    written = f"{len(tally.tokens)} written at {tally.decode_tps:.1f}/s" if steps else f"{len(tally.tokens)} written"
    end = [_end(tally)] if tally.finish in ENDS else []
    read = f"{tally.n_prefilled} token{'' if tally.n_prefilled == 1 else 's'} read" + from_disk(tally)
    share = f"KV read {100 * kv_read_share(model):.0f} %"
    whole = [f"{read} at {tally.prefill_tps:.0f}/s, {written}" + (f" ({kinds})" if kinds else ""), share]
    short = f"{tally.n_prefilled} read, {len(tally.tokens)} written, {tally.decode_tps:.1f}/s"
    told = [*drafted(model, tally), *taken(model, tally)]
    forms = ([*whole, *told, *end], [*whole, *told[:1], *end], [*whole, *end], [f"{read}, {written}", share, *end], [short, share, *end],
             [short, share.replace(" read", ""), *end], [short, *end], [f"{len(tally.tokens)} written", *end])
    return first_that_fits(["; ".join(parts) for parts in forms], width)


def statistics(model: Any, tally: Any) -> str:
    """How an answer was computed, in full."""
    parts = [f"prefill {tally.n_prefilled} tokens {tally.prefill_tps:.1f}/s" + from_disk(tally)]
    parts += [tally.why_read] if tally.why_read else []
    if tally.steps:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.steps.items()))
        parts.append(f"decode {sum(tally.steps.values())} steps {tally.decode_tps:.1f}/s: {kinds}")
    if tally.reasons and model.mode != "dense":  # there every step is, because that was asked for
        parts.append("because " + ", ".join(f"{reason} {n}" for reason, n in tally.reasons.most_common()))
    if tally.n_drafted:
        kept = ", ".join(f"{name} {found[1]} of {found[0]}" for name, source in DRAFTED_BY.items() if (found := tally.drafted(source))[0])
        parts += [f"drafted {tally.n_drafted}, accepted {tally.n_accepted} ({kept}), ties {tally.n_ties}", *drafted(model, tally)[1:]]
    parts.append(f"KV read {100 * kv_read_share(model):.0f} %")
    if kernels(model) not in ("native", "stock"):
        parts.append(f"{kernels(model)} kernels")
    if model.gpus:
        parts.append(f"layers on {' and '.join(model.gpus)}, K and V on {' and '.join(model.kv_gpus) or 'the CPU'}")
    parts += taken(model, tally)
    found = decided(model, tally)["why"]
    parts += [found] if found else []
    return "; ".join(parts + [_end(tally)] if tally.finish in ENDS else parts)


def from_disk(tally: Any) -> str:
    """How much of a prompt was kept from another day; "" for nothing."""
    n = tally.n_prompt - tally.n_prefilled
    return f" ({n} from disk)" if tally.cached_from == "disk" and n > 0 else ""


def _end(tally: Any) -> str:
    return ENDS[tally.finish] + (" inside the thought" if tally.in_thought else "")


def decided(model: Any, tally: Any) -> dict[str, Any]:
    """What was decided for the user, and why.

    mode_taken: ``sfi``, ``dense``, ``stock`` or ``exact``; of mode auto ``dense, then sfi`` where both took steps
    auto_depth: cells from which mode auto is slow-fast; None in other modes, and where it is stock
    why:        how that depth was found, or why decoding is stock; ""
    quality:    how close to dense the fast steps are, see tuning/quality.py; "" where nothing says it
    """
    engine = model.session.engine if model.session else None
    depth = engine.params.auto_depth if engine and model.mode == "auto" else None
    why = model.session.why_stock if model.session else ""
    if depth is not None and not why:
        why = model.auto_found or ("given" if model.session.params.auto_depth else "by rule, for the text is not longer than the budget")
    return {"mode_taken": _mode_taken(model.mode, engine, tally.steps), "auto_depth": depth, "why": why, "quality": model.quality}


def _mode_taken(mode: str, engine: Any, steps: Any) -> str:
    if mode != "auto":
        return mode
    kinds = ["dense"] * bool(steps["dense"]) + ["sfi"] * bool(steps["slow"] or steps["fast"])
    return ", then ".join(kinds) or "dense" if engine else "stock"


def taken(model: Any, tally: Any) -> list[str]:
    """What mode auto and the quality came to, in a few words each."""
    found = decided(model, tally)
    words = []
    if model.mode == "auto":
        words.append(f"auto: {found['mode_taken']}" + (f" (sfi from {found['auto_depth']})" if found["auto_depth"] else ""))
    if found["quality"] and tally.steps["fast"]:
        words.append(f"quality {found['quality']}")
    return words


def kernels(model: Any) -> str:
    """Whose operations made the supports, see Engine.path; ``stock`` where sfi is not attached."""
    engine = model.session.engine if model.session else None
    return engine.path if engine else "stock"


def kv_read_share(model: Any) -> float:
    """Bytes of K and V read over those of dense decoding; 1.0 where sfi is not attached."""
    engine = model.session.engine if model.session else None
    return engine.stats().kv_read_share if engine else 1.0
