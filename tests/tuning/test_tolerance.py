"""The tolerance for a fidelity: the largest within the bound, of what was measured for this very model, or a sentence."""

import json
import math

import pytest

from sfi_local import SfiParams
from sfi_local.cli.options import take_params
from sfi_local.errors import ArgumentError, InputError, SfiError, UsageError
from sfi_local.tuning import tolerance
from sfi_local.tuning.tolerance import DEFAULT, FLOOR, TOLERANCES, Setting, choose, fidelity_file, parse, recall, remember, params_for
from support.command_line import sentence

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


def tolerance_of(path, wanted, params=SKETCH, kv_type="f16"):
    return params_for(params, path, kv_type, kv_type, wanted)[0].tolerance


# ---- choosing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bound, chosen", [(1.0, 4e-3), (0.02, 4e-3), (0.0199, 1e-3), (0.004, 1e-3), (0.001, 5e-4)])
def test_the_largest_tolerance_within_the_bound_in_any_order(bound, chosen):
    for settings in (SETTINGS, SETTINGS[::-1]):
        setting, reached = choose(settings, bound)
        assert (setting.tolerance, reached) == (chosen, True)


def test_where_none_is_within_it_is_the_smallest():
    assert choose(SETTINGS, 1e-4) == (SETTINGS[-1], False)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "roof", "", "default"])
def test_what_is_no_fidelity_is_refused(text):
    with pytest.raises(ArgumentError, match="floor"):
        parse(text)
    assert parse("0.004") == 0.004 and parse("floor") == FLOOR


def test_a_bound_a_floor_and_nothing(calibrated):
    assert tolerance_of(calibrated, 0.02) == 4e-3
    assert tolerance_of(calibrated, FLOOR) == tolerance_of(calibrated, DEFAULT) == 1e-3
    assert tolerance_of(calibrated, None, SKETCH.replace(tolerance=7.0)) == 7.0


def test_only_what_was_asked_for_gets_a_note(calibrated):
    params, note = params_for(SKETCH, calibrated, "f16", "f16", 1e-4)
    assert params.tolerance == 5e-4 and "0.0005" in note and "0.001;" in note and note.endswith(".")
    assert params_for(SKETCH, calibrated, "f16", "f16", 0.02)[1] == params_for(SKETCH, calibrated, "f16", "f16", DEFAULT)[1] == ""
    assert "budget of 4 + 32 + 1024" in params_for(SKETCH.replace(n_selected=64), calibrated, "f16", "f16", FLOOR)[1]


def test_another_file_kv_type_sketch_or_build_is_not_calibrated(calibrated, tmp_path, monkeypatch):
    bits = SKETCH.replace(sketch_k4=4, sketch_k2=16, sketch_k1=16)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert recall(calibrated, "f16", "f16", SKETCH.replace(tolerance=1.0)).floor == 0.005
    assert recall(tmp_path / "other.gguf", "f16", "f16", SKETCH) is recall(calibrated, "f16", "q8_0", SKETCH) is None
    assert recall(calibrated, "f16", "f16", bits) is None
    with pytest.raises(InputError, match="calibrate .*model.gguf --kv-type q8_0 --sketch-bits 4,16,16:0,0:0` once"):
        tolerance_of(calibrated, FLOOR, bits, "q8_0")
    monkeypatch.setattr("sfi_local.tuning.remembered.source_id", lambda: "another build")
    assert recall(calibrated, "f16", "f16", SKETCH) is None and tolerance_of(calibrated, DEFAULT) == SKETCH.tolerance


def test_a_policy_without_tolerance_has_no_fidelity(calibrated):
    frozen = SfiParams.of("frozen")
    assert params_for(frozen, calibrated, "f16", "f16", DEFAULT) == (frozen, "")
    with pytest.raises(ArgumentError, match="frozen"):
        params_for(frozen, calibrated, "f16", "f16", FLOOR)


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


# ---- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, left", [({}, DEFAULT), ({"fidelity": 0.01}, 0.01), ({"tolerance": 0.1}, None),
                                         ({"policy": "frozen"}, None)])
def test_what_is_typed_decides_the_tolerance(given, left):
    options = typed(given)
    take_params(options)
    assert options == {"fidelity": left}


@pytest.mark.parametrize("other", [{"tolerance": 0.0}, {"policy": "window"}])
def test_two_that_decide_are_refused(other):
    with pytest.raises(UsageError, match="leave out"):
        take_params(typed({"fidelity": FLOOR, **other}))


def typed(given):
    """The options of a command as click gives them."""
    import click

    from sfi_local.cli.options import fidelity_option, sfi_options

    command = click.command()(sfi_options(fidelity_option(lambda **_: None)))
    return {**{p.name: None for p in command.params}, **given}


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
    assert [json.loads(cli(*run, *more).stdout)["tolerance"] for more in ((), ("--fidelity", 99), ("--tolerance", 0.5))] == [
        chosen, max(TOLERANCES), 0.5]
    with load(tiny, mode="sfi", n_threads=1, fidelity=1e-30) as model:
        assert model._params.tolerance == choose(found.settings, 1e-30)[0].tolerance and model.notes


@pytest.mark.parametrize("command, code, words", [
    (("run", "-p", "x", "--fidelity", "floor"), 1, "sfi-local calibrate"), (("eval", "--fidelity", "0.1"), 1, "sfi-local calibrate"),
    (("bench", "--fidelity", "0.1"), 1, "sfi-local calibrate"), (("run", "-p", "x", "--fidelity", "-1"), 2, "nats"),
    (("run", "-p", "x", "--fidelity", "1", "--tolerance", "1"), 2, "leave out"),
    (("run", "-p", "x", "--fidelity", "1", "--mode", "dense"), 2, "fast steps"), (("calibrate", "--depth", "99999"), 1, "--depth"),
])
def test_bad_input_is_a_sentence_and_leaves_no_file(cli, tiny, command, code, words):
    assert words in sentence(cli(command[0], tiny, *command[1:]), code)
    assert not fidelity_file().exists()


def test_a_tolerance_that_reads_more_than_dense_is_not_chosen():
    settings = (Setting(1e-3, 0.02, 0.4), Setting(1e-4, 0.01, 0.9), Setting(1e-5, 0.001, 1.1))
    assert choose(settings, 0.005) == (settings[1], False) and choose(settings[2:], 0.005) == (settings[2], True)
