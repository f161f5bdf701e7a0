"""What is asked for when a model is loaded is checked once, whoever asks."""

import pytest

from sfi_local import SfiParams
from sfi_local.errors import ArgumentError
from sfi_local.params import PORTABLE_POLICY
from sfi_local.runtime.settings import Settings, parse_quality


def test_nothing_that_is_asked_for_is_adapted_and_all_else_may_be():
    nothing, one, budget, policy = (Settings(params=p) for p in (None, {"tolerance": 0.1}, {"n_selected": 9}, {"policy": "window"}))
    whole = Settings(params=SfiParams(n_selected=9))
    assert [s.fits_budget for s in (nothing, one, budget, policy, whole)] == [True, True, False, True, False]
    assert [s.portable_params for s in (policy, whole)] == [None, None]
    assert nothing.portable_params == SfiParams.of(PORTABLE_POLICY) and budget.portable_params.n_selected == 9
    assert nothing.asked_params == SfiParams() and policy.asked_params == SfiParams.of("window") and whole.asked_params.n_selected == 9


def test_the_quality_chooses_the_tolerance_where_nothing_else_does():
    assert Settings().chooses_tolerance and Settings(mode="sfi", params={"n_selected": 9}).chooses_tolerance
    assert Settings(params=SfiParams(), quality="fast").chooses_tolerance
    for other in (dict(params={"tolerance": 0.1}), dict(params=SfiParams()), dict(params={"policy": "frozen"}), dict(mode="dense"),
                  dict(mode="exact"), dict(mode="stock"), dict(quality="same")):
        assert not Settings(**other).chooses_tolerance


@pytest.mark.parametrize("asked, words", [
    (dict(mode="fast"), "choose one of auto"), (dict(n_ctx=0), "n_ctx is 0"), (dict(n_ctx=1 << 40), "n_ctx is"),
    (dict(n_threads=0), "n_threads"), (dict(gpu_layers=-1), "gpu_layers"), (dict(type_v="q5_0"), "type_v is 'q5_0'"),
    (dict(params={"n_selekted": 3}), "no field of SfiParams"), (dict(params={"n_selected": 0}), "n_selected is 0"),
    (dict(quality="best"), "same, close, fast"), (dict(quality=0), "quality is 0"), (dict(quality=float("nan")), "nats"),
    (dict(quality=True), "quality is True"), (dict(quality="same", mode="sfi"), "leave one of them out"),
    (dict(quality="fast", mode="dense"), "fast steps"), (dict(quality=0.1, mode="stock"), "fast steps"),
    (dict(quality="fast", mode="exact"), "verified"), (dict(quality="fast", params={"tolerance": 0.1}), "leave out quality, or tolerance"),
    (dict(quality="floor", params={"policy": "frozen"}), "policy frozen"),
])
def test_what_cannot_be_meant_is_a_sentence(asked, words):
    with pytest.raises(ArgumentError, match=r"\.$") as refused:
        Settings(**asked).check()
    assert words in str(refused.value) and "--" not in str(refused.value)


@pytest.mark.parametrize("asked", [dict(), dict(quality="close", mode="dense"), dict(quality="same", mode="exact"), dict(quality="same"),
                                   dict(quality="close", params={"policy": "frozen"}), dict(quality="fast", params={"n_sink": 8}),
                                   dict(quality=0.01, params=SfiParams(tolerance=1.0)), dict(quality="same", mode="dense")])
def test_what_can_be_meant_is_taken(asked):
    assert Settings(**asked).check() == Settings(**asked)


def test_a_quality_is_a_word_or_nats():
    assert [parse_quality(text) for text in ("same", "close", "fast", "floor", "0.004")] == ["same", "close", "fast", "floor", 0.004]
    for text in ("0", "-1", "nan", "inf", "", "default"):
        with pytest.raises(ArgumentError, match="same, close, fast"):
            parse_quality(text)
