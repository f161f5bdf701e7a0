"""How many tokens are drafted: as many as pay, none where that is slower."""

import pytest

from sfi_local.runtime.draft_length import FIRST, MAX_DRAFTS, PROBE_EVERY, SpanLength


def follow(acceptance, ms_dense, ms_draft, height, slope, spans=60):
    """The length that is found on a machine of these times, where of a span the share `acceptance` is kept."""
    length = SpanLength()
    length.dense(ms_dense)
    for _ in range(spans):
        n = length.next()
        if n:
            length.verified(n, round(acceptance * n), n * ms_draft, height + slope * (n + 1))
        else:
            length.dense(ms_dense)
    return length.next()


def test_a_dense_step_is_measured_first():
    length = SpanLength(fixed=5)
    assert length.next() == 0
    length.dense(10.0)
    assert length.next() == 5


def test_a_fixed_length_stays_and_another_begins_with_the_first():
    free = SpanLength()
    free.dense(10.0)
    assert free.next() == FIRST


@pytest.mark.parametrize("acceptance, least, most", [(1.0, 24, MAX_DRAFTS), (0.9, 4, 24), (0.5, 1, 6)])
def test_spans_are_longer_where_more_is_kept(acceptance, least, most):
    assert least <= follow(acceptance, ms_dense=100, ms_draft=10, height=100, slope=2) <= most


def test_tokens_that_a_pass_computes_again_are_part_of_its_time():
    plain, again = SpanLength(), SpanLength()
    for length, n_known in ((plain, 0), (again, 16)):
        length.dense(100)
        for n in (4, 8, 4, 8):
            length.verified(n, n, 10 * n, 100 + 2 * (n_known + 1 + n), n_known)
    assert plain.next() == again.next() > 8


def test_where_drafting_does_not_pay_there_are_dense_steps_and_now_and_then_a_span():
    assert follow(0.9, ms_dense=10, ms_draft=9, height=10, slope=5) == 0
    length = SpanLength()
    length.dense(10)
    length.verified(FIRST, 0, 9.0 * FIRST, 60)
    lengths = [length.next() or length.dense(10.0) or 0 for _ in range(PROBE_EVERY + 1)]
    assert lengths == [0] * PROBE_EVERY + [FIRST]


def test_an_impossible_measurement_harms_nothing():
    length = SpanLength()
    length.dense(0.001)
    length.verified(8, 8, 0.0, 0.0)
    assert 0 <= length.next() <= MAX_DRAFTS
