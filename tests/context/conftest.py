"""Contexts on the weights of the tiny model."""

import numpy as np
import pytest
from support.contexts import Context, load_weights
from support.supports import N
from support.tiny_model import SEED


@pytest.fixture(scope="module")
def tiny_weights(native, tiny):
    with load_weights(native, tiny) as model:
        yield model


@pytest.fixture
def open_context(native):
    """Make Contexts that are closed at the end of the test: open_context(weights, params, ...)."""
    made = []

    def make(weights, params, **settings):
        made.append(Context(native, weights, params, **settings))
        return made[-1]

    yield make
    for one in made:
        if one.address:
            one.close()


@pytest.fixture(scope="module")
def small():
    from sfi_local import SfiParams

    return SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=24, max_span=8, min_span=2, boundary=False)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of N byte tokens."""
    return np.random.default_rng(SEED).integers(0, 256, (3, N)).tolist()


@pytest.fixture
def ready(opened, prompts):
    """A context of up to two sequences whose sequence 0 holds a prompt, a support and one fast step."""
    context = opened(n_seq=2, n_ctx=512)
    context.prefill(prompts[0])
    assert context.step(1).kind == "fast"
    return context
