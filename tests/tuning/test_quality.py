"""Settings and what was measured -> parameters, mode and words: a pure function."""

from pathlib import Path

import pytest

from sfi_local import SfiParams
from sfi_local.errors import InputError
from sfi_local.runtime.settings import Settings
from sfi_local.tuning.quality import FASTER, Taken, take
from sfi_local.tuning.tolerance import Calibration, Setting

FILE = Path("model.gguf")
FOUND = Calibration(0.005, (Setting(4e-3, 0.024, 0.05), Setting(1e-3, 0.004, 0.1), Setting(5e-4, 0.001, 0.2)), (4, 32, 1024), "2026-11-28T10:00")


def taken(found=FOUND, exact_works=True, **asked):
    return take(Settings(**asked).check(), FILE, found, exact_works)


@pytest.mark.parametrize("quality, tolerance, words", [
    (None, 1e-3, "close (calibrated 2026-11-28)"), ("close", 1e-3, "close (calibrated 2026-11-28)"),
    ("fast", 4e-3, "fast (calibrated 2026-11-28)"), ("floor", 1e-3, "floor (calibrated 2026-11-28)"),
    (0.002, 5e-4, "within 0.002 nats (calibrated 2026-11-28)")])
def test_of_a_calibrated_model_the_largest_tolerance_within_the_bound(quality, tolerance, words):
    found = taken(quality=quality)
    assert (found.params.tolerance, found.quality, found.mode, found.notes) == (tolerance, words, "auto", ())


def test_of_any_other_the_default_or_five_times_that():
    for quality, factor, words in ((None, 1, "close (not calibrated)"), ("close", 1, "close (not calibrated)"),
                                   ("fast", FASTER, "fast (not calibrated)")):
        found = taken(None, quality=quality, mode="sfi")
        assert found.params == SfiParams(tolerance=factor * SfiParams.tolerance) and found.quality == words


@pytest.mark.parametrize("quality", ["floor", 0.004])
def test_nats_need_a_calibration_and_the_command_is_said(quality):
    with pytest.raises(InputError, match=r"`sfi-local calibrate model.gguf --set sketch_k4=4,sketch_k2=8` once"):
        taken(None, quality=quality, params={"sketch_k4": 4, "sketch_k2": 8})


def test_the_same_is_mode_exact_where_it_works_and_the_librarys_own_decoding_elsewhere():
    assert (taken(quality="same").mode, taken(quality="same", exact_works=False).mode) == ("exact", "stock")
    assert {taken(quality=quality, mode=mode).quality for quality in (None, "same") for mode in ("exact", "dense", "stock")} == {"same"}
    assert taken(mode="exact", exact_works=False).mode == "exact"  # was asked for: the library says why not


def test_what_was_asked_for_is_left_alone():
    assert taken(params={"tolerance": 0.1}) == Taken("auto", SfiParams(tolerance=0.1), SfiParams.of("frozen", tolerance=0.1), True)
    assert taken(params=SfiParams(tolerance=0.1)) == Taken("auto", SfiParams(tolerance=0.1), None, False)
    assert taken(params={"policy": "window"}) == Taken("auto", SfiParams.of("window"), None, True)
    assert taken(params=SfiParams(tolerance=0.1), quality="fast").params.tolerance == 4e-3


def test_only_what_cannot_be_reached_gets_a_note():
    [note] = taken(quality=1e-4).notes
    assert "0.0005" in note and "0.001;" in note and note.endswith(".")
    assert "budget of 4 + 32 + 1024" in taken(quality="floor", params={"n_selected": 64}).notes[0]
    assert taken(quality="close", params={"n_selected": 64}).notes == ()
