"""Sparse prefill: where it is exact all the same, that it is one where it should be, and that an exact text is never taken for such a one.

Of the tiny model every cell matters about as much as any other. So a least share of 1 leaves each query what is near alone, one of
nothing passes over nothing.
"""

import numpy as np
import pytest
from support.tiny_model import SEED

FROM, END = 2048, 512  # cells from which it may be sparse, and tokens at the end that never are
N = 3072


@pytest.fixture(scope="module")
def params():
    from sfi_local import SfiParams

    return SfiParams(n_selected=64)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(SEED).integers(0, 256, N + 8).tolist()


@pytest.fixture
def logits(open_context, tiny_weights, text):
    """Logits of a dense step after n tokens that were prefilled in parts of so many."""
    def make(params, n, part=N):
        context = open_context(tiny_weights, params, n_ctx=N + 64)
        for i in range(0, n, part):
            context.prefill(text[i:i + min(part, n - i)])
        return np.asarray(context.steps(text[n:n + 1], "dense"))
    return make


@pytest.mark.parametrize("n, part", [(FROM + END - 1, N), (N, END)])
def test_short_texts_and_the_end_are_read_exactly(logits, params, n, part):
    """In parts that are no longer than an end everything is one."""
    sparse = params.replace(prefill="sparse", prefill_least=1.0)
    assert np.array_equal(logits(sparse, n, part), logits(params, n, part))


def test_a_long_text_is_read_sparsely(logits, params):
    exact = logits(params, N)
    near = logits(params.replace(prefill="sparse", prefill_least=1.0), N)
    assert np.isfinite(near).all() and np.abs(near - exact).max() > 1e-3


def test_where_nothing_is_passed_over_it_is_the_same_to_rounding(logits, params):
    same = logits(params.replace(prefill="sparse", prefill_least=1e-9), N)
    np.testing.assert_allclose(same, logits(params, N), atol=1e-3)


def test_a_part_of_a_text_that_goes_on_may_be_sparse_to_its_end(open_context, tiny_weights, params, text):
    def after(params):
        context = open_context(tiny_weights, params, n_ctx=N + 64)
        context.engine.prefill(text[:FROM], more=True)
        context.engine.prefill(text[FROM:FROM + 200], more=True)
        context.engine.prefill(text[FROM + 200:FROM + 400])
        return np.asarray(context.steps(text[:1], "dense"))

    assert not np.array_equal(after(params.replace(prefill="sparse", prefill_least=1.0)), after(params))


def test_what_was_read_sparsely_has_a_name_of_its_own_in_the_store(tiny, native):
    from sfi_local.loading import fingerprint_of, told_settings
    from sfi_local.runtime.settings import Settings
    from sfi_local.store.gguf_file import read_gguf

    file = read_gguf(tiny)
    settings = [Settings(params=p) for p in (None, {"prefill": "exact"}, {"prefill": "sparse"}, {"prefill": "sparse", "prefill_least": 0.02})]
    names = [fingerprint_of(file, s, None)() for s in settings]
    assert names[0] == names[1] and len(set(names)) == 3
    assert "sparse" in told_settings(settings[2]) and "sparse" not in told_settings(settings[0])
