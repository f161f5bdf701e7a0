"""Parameters: the mirror agrees with the library, and what is out of range is refused with a sentence."""

import pytest

from sfi_local.errors import ArgumentError
from sfi_local.params import POLICIES, SfiParams, auto_depth


def test_defaults_are_those_of_the_library(native):
    from sfi_local.binding.engine import default_params

    assert SfiParams() == default_params() and SfiParams().policy == "sketch"


@pytest.mark.parametrize("policy", POLICIES)
def test_defaults_of_a_policy_are_those_of_the_library(native, policy):
    from sfi_local.binding.engine import policy_params

    assert SfiParams.of(policy) == policy_params(policy)


@pytest.mark.parametrize("change, word", [
    ({"n_selected": 0}, "n_selected"), ({"n_recent": 0}, "n_recent"), ({"n_sink": -1}, "n_sink"),
    ({"max_span": 0}, "max_span"), ({"min_span": -1}, "min_span"), ({"n_queries": 65}, "64"),
    ({"n_queries": 0}, "n_queries"), ({"n_queries": 65}, "n_queries"), ({"n_recent": 15}, "queries"), ({"selector": ""}, "topk"),
    ({"sketch_k4": 8, "sketch_k1": 4}, "multiple of 32"), ({"sketch_k4": 6, "sketch_k2": 4}, "multiples of 4"), ({"sketch_v2": 8}, "16"),
    ({"sketch_k4": 8, "sketch_first": 1}, "sketch_first"), ({"sketch_first": 1}, "sketch_first"), ({"second_look": -1.0}, "second_look"),
    ({"selector": "best"}, "topk"), ({"prefill": "fast"}, "exact, sparse"), ({"prefill_least": 1.5}, "prefill_least"),
    ({"lambda_clip": 1.5}, "lambda_clip"), ({"temperature": 0.0}, "temperature"),
])
def test_out_of_range_is_refused(change, word):
    with pytest.raises(ArgumentError, match=word):
        SfiParams.of("frozen", **change).validate()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ArgumentError, match="sketch"):
        SfiParams(policy="best").validate()


def test_budget_is_the_sum_of_the_three_parts():
    assert SfiParams(n_sink=1, n_recent=20, n_selected=300).budget == 321


def test_a_budget_larger_than_the_context_is_refused_with_a_value_that_fits():
    with pytest.raises(ArgumentError, match="take n_selected=764 or less, or raise n_ctx"):
        SfiParams.of("frozen").check_context(1024)
    SfiParams.of("frozen", n_selected=764).check_context(1024)


@pytest.mark.parametrize("n_ctx", [64, 256, 300, 1024, 2308, 8192])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_fitted_budget_fits(policy, n_ctx):
    whole = SfiParams.of(policy)
    fitted = whole.fit_context(n_ctx).validate()
    fitted.check_context(n_ctx)
    assert fitted == whole or fitted.budget == n_ctx


def test_auto_starts_where_half_of_the_cache_is_read():
    params = SfiParams.of("frozen", n_sink=0, n_recent=100, n_selected=400)
    assert auto_depth(params) == 2 * params.budget
    assert auto_depth(SfiParams()) < SfiParams().budget  # a sketch is read in a fraction of the time
