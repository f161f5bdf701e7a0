"""Where auto begins to be slow-fast: measured once, remembered, never in the way of a run."""

import json
from dataclasses import replace

import pytest

from sfi_local import Sampling, SfiParams
from sfi_local.tuning import auto_depth
from sfi_local.tuning.auto_depth import Timing, auto_depth_of, break_even, calibration_file

GREEDY = Sampling(temp=0)  # else a seed in twenty ends the text early
SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
TIMES = [Timing(500, 6.0, 7.0, 5.0), Timing(1000, 7.0, 8.0, 5.0)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(auto_depth.ENV, raising=False)
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny):
    from sfi_local import load

    with load(tiny, n_threads=1, params=SMALL) as model:
        yield model


@pytest.fixture
def measured(monkeypatch):
    """Measurements that take no time; a list of the calls."""
    calls = []

    def measure(model, params, *types):
        calls.append((params.budget, types))
        return TIMES

    monkeypatch.setattr(auto_depth, "measure", measure)
    return calls


# ---- pure ------------------------------------------------------------------------------------------------------------

def test_break_even_is_where_the_mean_of_a_span_crosses_dense():
    params = SMALL.replace(max_span=64)
    depth = break_even(TIMES, params)

    def dense(d): return 5 + d / 500
    def mean(d): return (6 + d / 500 + 20 * 5) / 21

    assert mean(depth + 2) < 0.97 * dense(depth + 2) and mean(depth - 2) > 0.97 * dense(depth - 2)


def test_break_even_is_the_budget_at_least():
    cheap = [Timing(100, 6.0, 6.0, 1.0), Timing(1000, 7.0, 7.0, 1.0)]
    assert break_even(cheap, SMALL) == SMALL.budget


def test_without_slow_steps_it_is_where_fast_crosses_dense():
    def dense(d): return 5 + d / 500
    def fast(d): return 6 + d / 2500

    timings = [Timing(d, dense(d), 99.0, fast(d)) for d in (500, 1000, 2000)]
    depth = break_even(timings, SfiParams.of("sketch"))
    assert fast(depth + 2) < 0.97 * dense(depth + 2) and fast(depth - 2) > 0.97 * dense(depth - 2)
    assert break_even([Timing(d, dense(d), 99.0, 1.0) for d in (500, 1000)], SfiParams.of("sketch")) == 128


@pytest.mark.parametrize("timings", [
    [Timing(500, 7.0, 7.0, 5.0), Timing(1000, 6.0, 8.0, 5.0)],     # dense steps that get faster
    [Timing(500, 6.0, 7.0, 5.0), Timing(1000, 6.1, 90.0, 5.0)],    # slow steps that eat the gain
])
def test_times_that_cannot_be_are_no_measurement(timings):
    with pytest.raises(Exception, match="do not grow"):
        break_even(timings, SMALL)


# ---- the file --------------------------------------------------------------------------------------------------------

def test_a_measurement_is_kept_and_used_again(model, measured):
    first = auto_depth_of(model, SMALL, "f16", "f16")
    again = auto_depth_of(model, SMALL, "f16", "f16")
    assert first == (break_even(TIMES, SMALL), "measured") and again == (first[0], "measured before") and len(measured) == 1
    assert [e["auto_depth"] for e in auto_depth.known()] == [first[0]]
    assert [p.name for p in calibration_file().parent.iterdir()] == ["auto.json"]


def test_another_budget_kv_type_thread_or_file_is_measured_anew(model, measured):
    auto_depth_of(model, SMALL, "f16", "f16")
    auto_depth_of(model, SMALL, "q8_0", "q8_0")
    auto_depth_of(model, SMALL.replace(n_selected=41), "f16", "f16")
    model.n_threads = 2
    auto_depth_of(model, SMALL, "f16", "f16")
    model.path.touch()
    auto_depth_of(model, SMALL, "f16", "f16")
    assert len(measured) == len(auto_depth.known()) == 5


@pytest.mark.parametrize("content", ["", "[", "{}", "3", '[{"auto_depth": 1}]', "[null]", '[{"key": {}, "auto_depth": "x"}]'])
def test_a_corrupt_file_is_ignored_and_written_anew(model, measured, content):
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(content)
    assert auto_depth_of(model, SMALL, "f16", "f16")[1] == "measured"
    assert len(json.loads(calibration_file().read_text())) == 1


def test_what_goes_wrong_leaves_the_rule_and_a_reason(model, monkeypatch):
    def broken(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(auto_depth, "measure", broken)
    assert auto_depth_of(model, SMALL, "f16", "f16") == (2 * SMALL.budget, "not measured: no memory")


def test_a_cache_that_cannot_be_written_is_no_error(model, measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "file"))
    depth, how = auto_depth_of(model, SMALL, "f16", "f16")
    assert depth == break_even(TIMES, SMALL) and how == "measured"


def test_a_failed_measurement_is_not_tried_again_on_the_same_day(model, monkeypatch):
    calls = []

    def too_slow(*_):
        calls.append(1)
        raise auto_depth._CannotMeasure("too slow")

    monkeypatch.setattr(auto_depth, "measure", too_slow)
    for _ in range(3):
        assert auto_depth_of(model, SMALL, "f16", "f16") == (2 * SMALL.budget, "not measured: too slow")
    assert len(calls) == 1
    monkeypatch.setattr(auto_depth, "_today", lambda: "3000-01-01")
    auto_depth_of(model, SMALL, "f16", "f16")
    assert len(calls) == 2


def test_the_environment_overrules(model, measured, monkeypatch):
    monkeypatch.setenv(auto_depth.ENV, "1234")
    assert auto_depth_of(model, SMALL, "f16", "f16")[0] == 1234
    monkeypatch.setenv(auto_depth.ENV, "0")
    assert auto_depth_of(model, SMALL, "f16", "f16")[0] == 2 * SMALL.budget
    assert not measured and not calibration_file().exists()


# ---- in a run --------------------------------------------------------------------------------------------------------

def test_a_short_text_does_not_pay_and_a_long_one_pays_once(model, measured):
    kinds = [s.kind for s in model.generate("x" * 40, n=20, sampling=GREEDY)]
    assert not measured and set(kinds[1:]) == {"dense"}
    list(model.generate("x" * 70, n=20, sampling=GREEDY))
    list(model.generate("x" * 90, n=20, sampling=GREEDY))
    assert len(measured) == 1 and "pays from a depth of" in model.notes[0]
    assert model.session.engine.params.auto_depth == break_even(TIMES, SMALL)


def test_steps_are_dense_below_the_measured_depth_and_slow_fast_above(model, monkeypatch):
    monkeypatch.setattr(auto_depth, "measure", lambda *_: [Timing(100, 6.0, 6.0, 5.8), Timing(200, 7.0, 7.0, 5.8)])
    depth = break_even(auto_depth.measure(), SMALL)
    assert 76 < depth < 200
    sampling = Sampling(temp=0)
    kinds = [s.kind for s in model.generate("x" * (depth - 10), n=30, sampling=sampling)][1:]
    assert set(kinds[:9]) == {"dense"} and set(kinds[11:]) <= {"slow", "fast"} and "fast" in kinds


def test_a_real_measurement_has_times_of_every_kind_and_leaves_the_model_usable(model, monkeypatch):
    monkeypatch.setattr(auto_depth, "LIMIT_S", 60.0)
    monkeypatch.setattr(auto_depth, "ROUNDS", 1)
    monkeypatch.setattr(auto_depth, "LEAST_CPU", 0)  # the machine may be busy
    timings = auto_depth.measure(model, SMALL, "f16", "f16")
    assert [t.depth for t in timings] == [512, 2048]
    assert all(0 < x < 1e4 for t in timings for x in (t.dense, t.slow, t.fast))
    assert model.session is None and len(list(model.generate("abc", n=3, sampling=GREEDY))) == 3


def test_dense_is_timed_as_auto_takes_it_below_its_depth(model, monkeypatch):
    from sfi_local.runtime.slot import Slot

    taken, step = set(), Slot.step

    def watched(self, *args):
        info = step(self, *args)
        taken.add((info.kind, info.reason))
        return info

    monkeypatch.setattr(Slot, "step", watched)
    monkeypatch.setattr(auto_depth, "LIMIT_S", 60.0)
    monkeypatch.setattr(auto_depth, "ROUNDS", 1)
    monkeypatch.setattr(auto_depth, "LEAST_CPU", 0)
    auto_depth.measure(model, SMALL, "f16", "f16")
    assert taken == {("slow", "forced"), ("fast", "forced"), ("dense", "short")}


def test_beside_a_busy_program_nothing_is_measured(model, monkeypatch):
    monkeypatch.setattr(auto_depth, "LIMIT_S", 60.0)
    monkeypatch.setattr(auto_depth, "LEAST_CPU", 2)  # more than this process can have
    assert auto_depth_of(model, SMALL, "f16", "f16") == (2 * SMALL.budget, "not measured: other programs kept the processor busy")


def test_more_threads_than_cpus_do_not_look_like_a_busy_program(model, monkeypatch):
    n_cpus = []
    monkeypatch.setattr(auto_depth, "usable_cpus", lambda: {0})
    monkeypatch.setattr(auto_depth, "_time_at", lambda *args: n_cpus.append(args[-1]))
    model.n_threads = 2
    auto_depth.measure(model, SMALL, "f16", "f16")
    assert n_cpus == [1, 1]


def test_a_run_that_calibrates_says_so_on_stderr_once(cli, tiny):
    options = ("run", tiny, "-p", "The quick brown fox. " * 12, "-n", 10, "--temp", 0, "-t", 1, "--set", "n_recent=32,n_selected=40")
    runs = [cli(*options, "--json"), cli(*options)]
    assert [r.returncode for r in runs] == [0, 0] and calibration_file().exists()
    notes, why = json.loads(runs[0].stdout)["notes"], json.loads(calibration_file().read_text())[0]["why"]
    assert why or "Measured once" in notes[0] and b"Measured once" in runs[0].stderr
    assert b"Measured" not in runs[1].stdout + runs[1].stderr


def test_on_a_gpu_depths_are_larger_and_must_fit_its_memory(model, monkeypatch):
    monkeypatch.setattr(type(model), "gpus", ["a card"])
    card = auto_depth.gpu.Gpu("CUDA0", "a card", free=1 << 40, total=1 << 40)
    monkeypatch.setattr(auto_depth.gpu, "gpus", lambda: [card])
    assert auto_depth._depths(model, SMALL, "f16", "f16") == [4096, 16384]
    monkeypatch.setattr(auto_depth.gpu, "gpus", lambda: [replace(card, free=1 << 25)])
    shallow, deep = auto_depth._depths(model, SMALL, "f16", "f16")
    assert 2048 <= deep < 16384 and shallow == deep // 4
    monkeypatch.setattr(auto_depth.gpu, "gpus", lambda: [replace(card, free=1 << 20)])
    assert auto_depth_of(model, SMALL, "f16", "f16") == (16384, "not measured: too little memory is left on the GPU")
