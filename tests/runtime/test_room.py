"""While the tokens of a prompt are made, a thread makes the context: earlier, and nothing else about it is different."""

import sys
import threading

import numpy as np
import pytest

import sfi_local
from sfi_local.binding import context as native_context
from sfi_local.errors import OutOfMemoryError

TEXT = "It was a dark night, and rain fell. " * 20
GREEDY = sfi_local.Sampling(temp=0)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere cells take memory before they are used")


def answered(model):
    """(tokens, logits after them, sentences)"""
    tokens = [step.token for step in model.complete(TEXT, n=12, sampling=GREEDY)]
    return tokens, native_context.logits(model.slot.context, -1).copy(), model.notes


@pytest.mark.parametrize("mode", ["stock", "sfi", "exact"])
@pytest.mark.parametrize("n_ctx", [None, 1280])
def test_the_answer_is_the_same_bit_for_bit(tiny, mode, n_ctx):
    options = {"mode": mode, "n_ctx": n_ctx, "n_threads": 1, "cache": False}
    with sfi_local.load(tiny, **options) as model:
        expected = answered(model)
    with sfi_local.load(tiny, **options) as model:
        with model.making_room(len(TEXT)):
            pass
        context = model.slot.context
        assert context is not None and model.slot.tokens == []
        found = answered(model)
        assert model.slot.context is context
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1]) and found[2] == expected[2]


def test_what_goes_wrong_is_told_when_the_room_is_needed(tiny, monkeypatch):
    def refuse(slot, n_ctx):
        raise OutOfMemoryError("There is no memory.")
    with sfi_local.load(tiny, n_threads=1, cache=False) as model:
        with monkeypatch.context() as patch:
            patch.setattr(type(model.slot), "grow", refuse)
            with model.making_room(100):
                pass
            with pytest.raises(OutOfMemoryError):
                answered(model)
        assert answered(model)[0]


def test_what_ends_the_tokens_ends_the_thread(tiny):
    with sfi_local.load(tiny, n_threads=1, cache=False) as model:
        with pytest.raises(KeyboardInterrupt), model.making_room(10 ** 9):
            raise KeyboardInterrupt
        assert not any(thread.name == "room" for thread in threading.enumerate())
        assert answered(model)[0]
