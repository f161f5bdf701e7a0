"""What is drafted, and how many tokens: as many as pay, none where that is slower, and nothing to speak of to find that out."""

import pytest

from sfi_local.runtime.draft_length import FAST, FIRST, HURDLE, MAX_DRAFTS, NGRAM, PROBE_EVERY, SIZES, Costs, SpanLength

SURE, NEVER = [0.99] * 31, [0.05] * 31


def follow(ms_dense, ms_fast, height, slope, acceptance=0.0, odds=(), steps=600, room=MAX_DRAFTS):
    """(the plan that is found on a machine of these times, tokens per dense step until then); of fast drafts the share is kept, of those
    by the text as many as the odds say."""
    length, tokens, ms = SpanLength(), 0, 0.0
    for _ in range(steps):
        source, n = length.next(room, odds)
        if not n:
            length.dense(ms_dense)
            tokens, ms = tokens + 1, ms + ms_dense
            continue
        took, drafts = height + slope * (n + 1), n * ms_fast if source == FAST else 0.0
        kept = round((acceptance if source == FAST else odds[0]) * n)
        length.verified(source, n, kept, drafts, took)
        tokens, ms = tokens + kept + 1, ms + drafts + took
    return length.next(room, odds), tokens * ms_dense / ms


def test_a_dense_step_is_measured_first():
    length = SpanLength(fixed=5)
    assert length.next(31) == ("", 0)
    length.dense(10.0)
    assert length.next(31) == (FAST, 5)


def test_a_fixed_length_stays_within_the_room():
    length = SpanLength(fixed=8)
    length.dense(10.0)
    assert length.next(31, SURE) == (NGRAM, 8) and length.next(31, NEVER) == (FAST, 8)
    assert length.next(3, SURE) == (NGRAM, 3) and length.next(31, SURE[:2], fast=False) == (NGRAM, 2)
    assert length.next(31, (), fast=False) == length.next(0, SURE) == ("", 0)
    none = SpanLength(fixed=0)
    none.dense(10.0)
    assert none.next(31, SURE) == ("", 0)


@pytest.mark.parametrize("acceptance, least, most", [(1.0, 15, 31), (0.9, 3, 23), (0.5, 1, 5)])
def test_spans_of_fast_steps_are_longer_where_more_is_kept(acceptance, least, most):
    (source, n), _ = follow(100, 10, 100, 2, acceptance)
    assert source == FAST and least <= n <= most


@pytest.mark.parametrize("height, slope", [(10.0, 0.4), (6.0, 4.0)])  # of a pass, where a dense step takes 10
def test_what_the_text_surely_says_is_drafted_at_length(height, slope):
    plan, rate = follow(10, 9, height, slope, odds=SURE)
    assert plan[0] == NGRAM and plan[1] >= 15 and rate > 2


def test_of_two_sources_the_faster():
    assert follow(100, 10, 100, 2, acceptance=0.9, odds=SURE)[0][0] == NGRAM
    assert follow(100, 10, 100, 2, acceptance=0.9, odds=NEVER)[0][0] == FAST


def test_no_more_is_drafted_than_there_is_room_for():
    assert follow(10, 9, 10, 0.4, odds=SURE, room=4)[0] == (NGRAM, 3)
    assert follow(10, 9, 10, 0.4, odds=SURE[:2])[0] == (NGRAM, 2) and SIZES[1] == 2


@pytest.mark.parametrize("odds", [(), NEVER, [0.3] * 31])
@pytest.mark.parametrize("times", [(10, 9, 6, 4), (10, 10, 10, 6), (10, 5, 6, 4)])
def test_where_nothing_pays_finding_that_out_costs_nearly_nothing(times, odds):
    plan, rate = follow(*times, acceptance=0.5, odds=odds)
    assert plan == ("", 0) and rate > 0.985


def test_what_is_drafted_is_expected_to_be_faster():
    length = SpanLength()
    length.dense(10.0)
    length.verified(FAST, FIRST, 1, 9.0 * FIRST, 25.0)
    for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        source, n = length.next(31, [p] * 31)
        best = max(length.gain(NGRAM, size, [p] * 31) for size in SIZES)
        assert (length.gain(source, n, [p] * 31) == best > HURDLE) if n else best <= HURDLE


def test_a_pass_that_seemed_dear_is_tried_again():
    """One measurement was disturbed: after PROBE_EVERY dense steps it no longer counts."""
    length = SpanLength()
    length.dense(10.0)
    length.verified(FAST, FIRST, 0, 9.0 * FIRST, 900.0)
    plans = []
    while not plans or plans[-1] == ("", 0):
        plans.append(length.next(31, SURE))
        length.dense(10.0)
    assert plans[-1][0] == NGRAM and len(plans) <= PROBE_EVERY + 1


def test_the_cost_of_a_pass_lies_between_those_that_were_seen():
    costs = Costs()
    assert costs.verify_cost is None
    costs.dense_took(10.0)
    costs.pass_took(4, 25.0), costs.pass_took(16, 85.0)
    assert (costs.of_pass(1), costs.of_pass(4), costs.of_pass(10), costs.of_pass(16)) == (1.0, 2.5, 5.5, 8.5)
    assert costs.verify_cost == 4.5 and costs.of_pass(31) == 16.0
    costs.pass_took(4, 2500.0)
    assert 2.5 < costs.of_pass(4) < 30  # once may be a disturbance
    costs.pass_took(4, 20.0), costs.dense_took(5.0)
    assert costs.of_pass(4) == 4.0  # that dense step was disturbed
    costs.dense = 10.0
    assert costs.of_pass(4) == 2.0


def test_an_impossible_measurement_harms_nothing():
    length = SpanLength()
    length.dense(0.0)
    length.verified(FAST, 8, 8, 0.0, 0.0)
    source, n = length.next(31, SURE)
    assert 0 <= n <= MAX_DRAFTS
