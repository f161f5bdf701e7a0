"""What is said about an answer: what mode auto decided and why, and how close to dense it is."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sfi_local import SfiParams
from sfi_local.cli.report import decided, drafts, short_statistics, statistics
from sfi_local.runtime.draft_length import Costs
from sfi_local.runtime.step import Step, Tally

STATS = SimpleNamespace(kv_read_share=0.25)


def model(mode="auto", depth=1024, found="measured before", why_stock="", quality="close (not calibrated)", given=0):
    engine = None if why_stock or mode == "stock" else SimpleNamespace(params=SfiParams(auto_depth=depth), path="native", stats=lambda: STATS)
    session = SimpleNamespace(engine=engine, why_stock=why_stock, params=SfiParams(auto_depth=given))
    return SimpleNamespace(mode=mode, session=session, auto_found=found, quality=quality, gpus=[], kv_gpus=[])


def tally(**steps):
    return SimpleNamespace(steps=Counter(steps), tokens=[1] * 5, decode_tps=9.0, prefill_tps=99.0, n_prompt=7, n_prefilled=7,
                           cached_from=None, why_read="", finish="end", reasons=Counter(), n_drafted=0, n_accepted=0, n_ties=0)


@pytest.mark.parametrize("one, steps, mode, depth, why", [
    (model(), {"dense": 4}, "dense", 1024, "measured before"), (model(), {"dense": 1, "fast": 3}, "dense, then sfi", 1024, "measured before"),
    (model(), {"slow": 1, "fast": 3}, "sfi", 1024, "measured before"), (model(), {}, "dense", 1024, "measured before"),
    (model(found=""), {"dense": 4}, "dense", 1024, "by rule, for the text is not longer than the budget"),
    (model(found="", given=1024), {"fast": 4}, "sfi", 1024, "given"),
    (model(why_stock="head size 24"), {"stock": 4}, "stock", None, "head size 24"),
    (model("sfi", depth=0), {"fast": 4}, "sfi", None, ""), (model("exact"), {"dense": 4}, "exact", None, ""),
    (model("stock"), {"stock": 4}, "stock", None, "")])
def test_what_was_decided_and_why(one, steps, mode, depth, why):
    found = decided(one, tally(**steps))
    assert (found["mode_taken"], found["auto_depth"], found["why"]) == (mode, depth, why)


def test_the_last_line_says_it_in_a_few_words_where_there_is_room():
    line = short_statistics(model(), tally(fast=4))
    assert line.endswith("KV read 25 %; auto: sfi (sfi from 1024); quality close (not calibrated)")
    assert "quality" not in short_statistics(model(), tally(dense=4)) and "auto: dense (sfi from 1024)" in short_statistics(model(), tally(dense=4))
    assert "auto" not in short_statistics(model("sfi"), tally(fast=4))
    assert len(short_statistics(model(), tally(fast=4), 60)) <= 60
    assert "measured before" in statistics(model(), tally(dense=4))


def spans(*found):
    """A tally of spans, each (what drafted, drafted, accepted)."""
    made = Tally()
    for source, n_drafted, n_accepted in found:
        made.add(Step(1, "a", "dense", "verify", 1.0, 1, 1, 1, n_drafted=n_drafted, n_accepted=n_accepted, drafted_by=source))
    return made


def test_what_drafted_how_much_was_kept_and_what_verifying_costs():
    one, made = model("exact"), spans(("ngram", 31, 30), ("fast", 3, 1), ("ngram", 6, 1))
    one.session.costs = Costs(10.0, 9.0, {8: 25.0})
    assert drafts(one, made) == {"accepted": 0.8, "verify_cost": 2.5, "drafts": {
        "drafted": 40, "accepted": 32, "ties": 0, "ngram": [37, 31], "fast": [3, 1]}}
    assert "; 40 drafted by n-grams and fast steps, 80 % accepted; 8 are verified in 2.5 dense steps" in short_statistics(one, made)
    assert "drafted 40, accepted 32 (n-grams 31 of 37, fast steps 1 of 3), ties 0; 8 are verified in 2.5 dense steps" in statistics(one, made)
    assert "drafted" not in short_statistics(one, spans()) and drafts(one, spans())["accepted"] is None


def test_before_any_pass_nothing_is_said_of_its_cost():
    one = model("exact")
    one.session.costs = Costs(10.0, 9.0)
    assert drafts(one, spans())["verify_cost"] is None and "verified" not in statistics(one, spans(("ngram", 3, 1)))


def test_where_layers_and_the_cache_are_is_said_where_a_gpu_has_some():
    one = model()
    assert "layers on" not in statistics(one, tally(fast=3))
    one.gpus = ["a card"]
    assert "layers on a card, K and V on the CPU" in statistics(one, tally(fast=3))
    one.kv_gpus = ["a card"]
    assert "K and V on a card" in statistics(one, tally(fast=3))
