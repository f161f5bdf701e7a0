"""What was calibrated: the largest tolerance within a bound, for this very model; kept, shown and forgotten."""

import json
import math

import pytest
from support.command_line import sentence

from sfi_local import SfiParams
from sfi_local.errors import SfiError
from sfi_local.tuning import tolerance
from sfi_local.tuning.tolerance import TOLERANCES, Setting, choose, command_for, expired, fidelity_file, forget, recall, remember

SETTINGS = [Setting(4e-3, 0.02, 0.05), Setting(1e-3, 0.004, 0.1), Setting(5e-4, 0.001, 0.2)]
SKETCH = SfiParams()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that stands for a model, and a build of the library."""
    monkeypatch.setattr("sfi_local.tuning.remembered.source_id", lambda: "one build")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


@pytest.fixture
def calibrated(file):
    remember(file, "f16", SKETCH, 0.005, SETTINGS)
    return file


# ---- choosing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bound, chosen", [(1.0, 4e-3), (0.02, 4e-3), (0.0199, 1e-3), (0.004, 1e-3), (0.001, 5e-4)])
def test_the_largest_tolerance_within_the_bound_in_any_order(bound, chosen):
    for settings in (SETTINGS, SETTINGS[::-1]):
        setting, reached = choose(settings, bound)
        assert (setting.tolerance, reached) == (chosen, True)


def test_where_none_is_within_it_is_the_smallest():
    assert choose(SETTINGS, 1e-4) == (SETTINGS[-1], False)


def test_another_file_kv_type_sketch_or_build_is_not_calibrated(calibrated, tmp_path, monkeypatch):
    bits = SKETCH.replace(sketch_k4=4, sketch_k2=16, sketch_k1=16)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert recall(calibrated, "f16", "f16", SKETCH.replace(tolerance=1.0)).floor == 0.005
    assert recall(tmp_path / "other.gguf", "f16", "f16", SKETCH) is recall(calibrated, "f16", "q8_0", SKETCH) is None
    assert recall(calibrated, "f16", "f16", bits) is None
    monkeypatch.setattr("sfi_local.tuning.remembered.source_id", lambda: "another build")
    assert recall(calibrated, "f16", "f16", SKETCH) is None


def test_the_command_that_makes_a_calibration():
    from pathlib import Path

    assert command_for(Path("/m/a b.gguf"), "f16", SKETCH) == "sfi-local calibrate '/m/a b.gguf'"
    assert command_for(Path("m.gguf"), "q8_0", SKETCH.replace(sketch_k4=4, second_look=0.25, n_selected=9)) == (
        "sfi-local calibrate m.gguf --kv-type q8_0 --set sketch_k4=4,second_look=0.25")


def test_one_of_another_build_is_said_once(calibrated, monkeypatch):
    assert expired(calibrated, "f16", "f16", SKETCH.replace(second_look=0.1)) == ""
    for build in ("another build", "a third"):
        monkeypatch.setattr("sfi_local.tuning.remembered.source_id", lambda: build)
        said = expired(calibrated, "f16", "f16", SKETCH)
        assert "another build of the library" in said and "`sfi-local calibrate" in said and said.endswith(".")
        assert expired(calibrated, "f16", "f16", SKETCH) == ""
    monkeypatch.setattr("sfi_local.tuning.remembered.source_id", lambda: "one build")
    assert recall(calibrated, "f16", "f16", SKETCH).floor == 0.005


def test_forgetting_one_model_or_all(calibrated, tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    remember(tmp_path / "other.gguf", "f16", SKETCH, 0.1, SETTINGS)
    remember(calibrated, "q8_0", SKETCH, 0.1, SETTINGS)
    assert forget(calibrated) == 2 and forget(calibrated) == 0
    assert [e["floor"] for e in tolerance.known()] == [0.1] and forget(None) == 1 and tolerance.known() == []


# ---- the file --------------------------------------------------------------------------------------------------------

def test_a_new_calibration_replaces_the_old_one(calibrated):
    remember(calibrated, "q8_0", SKETCH, 0.1, SETTINGS)
    remember(calibrated, "f16", SKETCH, 0.5, SETTINGS[:1])
    assert recall(calibrated, "f16", "f16", SKETCH).settings == (SETTINGS[0],) and len(tolerance.known()) == 2
    assert [p.name for p in fidelity_file().parent.iterdir()] == ["fidelity.json"]


def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(calibrated, monkeypatch):
    before = fidelity_file().read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SfiError, match="No space left"):
        remember(calibrated, "f16", SKETCH, 0.5, SETTINGS[:1])
    assert fidelity_file().read_bytes() == before and len(list(fidelity_file().parent.iterdir())) == 1


@pytest.mark.parametrize("change", [{"floor": "x"}, {"floor": -1}, {"settings": []}, {"settings": [{"tolerance": 1}]}, {"key": 3},
                                    {"budget": [1]}, {"floor": math.inf}, {"settings": None}])
def test_a_damaged_entry_counts_as_none(calibrated, change):
    entries = json.loads(fidelity_file().read_text())
    fidelity_file().write_text(json.dumps([entries[0] | change, None]))
    assert recall(calibrated, "f16", "f16", SKETCH) is None
    fidelity_file().write_text(json.dumps(entries)[:-5])
    assert recall(calibrated, "f16", "f16", SKETCH) is None


# ---- the commands ----------------------------------------------------------------------------------------------------

def test_calibrate_then_run_and_load_take_what_it_chose(cli, tiny):
    from sfi_local import load

    done = cli("calibrate", tiny, "--depth", 200, "-n", 4, "-t", 1, "-o", "json")
    assert done.returncode == 0, done.stderr
    stock, *rows = json.loads(done.stdout)
    assert (stock["mode"], stock["tolerance"]) == ("stock", None) and tuple(r["tolerance"] for r in rows) == TOLERANCES
    assert all(r["params"]["tolerance"] == r["tolerance"] and r["steps"]["fast"] == 4 for r in rows)
    found = recall(tiny, "f16", "f16", SKETCH)
    assert found.floor == stock["kld_mean"] and [s.kld_mean for s in found.settings] == [r["kld_mean"] for r in rows]
    [chosen] = [r["tolerance"] for r in rows if r["chosen"]]
    assert chosen == choose(found.settings, found.floor)[0].tolerance

    run = ("run", tiny, "-p", "x", "-n", 2, "-t", 1, "--mode", "sfi", "--json")
    assert [json.loads(cli(*run, *more).stdout)["tolerance"] for more in ((), ("--fidelity", 99), ("--set", "tolerance=0.5"))] == [
        chosen, max(TOLERANCES), 0.5]
    with load(tiny, mode="sfi", n_threads=1, quality=1e-30) as model:
        assert model._params.tolerance == choose(found.settings, 1e-30)[0].tolerance and model.notes
        assert model.quality.startswith("within 1e-30 nats (calibrated 2")


    from click.testing import CliRunner

    from sfi_local.cli.main import cli as group

    said = [CliRunner().invoke(group, ["calibrate", *words]).output for words in (
        ["--show"], [str(tiny), "--show"], [str(tiny), "--forget"], ["--show"], ["--forget"])]
    assert said[0] == said[1] and f"tiny.gguf, f16: quality close is tolerance {chosen:g}, fast " in said[0]
    assert "Forgotten: 1 measurement of tiny.gguf. From now on quality close is tolerance 0.0003" in said[2]
    assert "Nothing was measured" in said[3] and "nothing to forget" in said[4] and recall(tiny, "f16", "f16", SKETCH) is None


@pytest.mark.parametrize("command, code, words", [
    (("run", "-p", "x", "--fidelity", "floor"), 1, "sfi-local calibrate"), (("eval", "--fidelity", "0.1"), 1, "sfi-local calibrate"),
    (("bench", "--fidelity", "0.1"), 1, "sfi-local calibrate"), (("run", "-p", "x", "--fidelity", "-1"), 2, "nats"),
    (("run", "-p", "x", "--fidelity", "1", "--set", "tolerance=1"), 2, "leave out"),
    (("run", "-p", "x", "--quality", "fast", "--mode", "dense"), 2, "fast steps"), (("calibrate", "--depth", "99999"), 1, "--depth"),
])
def test_bad_input_is_a_sentence_and_leaves_no_file(cli, tiny, command, code, words):
    assert words in sentence(cli(command[0], tiny, *command[1:]), code)
    assert not fidelity_file().exists()


def test_a_tolerance_that_reads_more_than_dense_is_not_chosen():
    settings = (Setting(1e-3, 0.02, 0.4), Setting(1e-4, 0.01, 0.9), Setting(1e-5, 0.001, 1.1))
    assert choose(settings, 0.005) == (settings[1], False) and choose(settings[2:], 0.005) == (settings[2], True)
