"""What bench shows: a table for the window, and no number without its doubts."""

import time

import pytest

from sfi_local.lab import other_work
from sfi_local.lab.bench.report import above_ceiling, context, is_busy, plot, show
from sfi_local.lab.other_work import OtherWork, busy_seconds, share_between

FACTS = {"model": "qwen2.5-coder-1.5b", "threads": 2, "reps": 5, "n": 128, "text": "Python's help topics", "slow_every": None, "fill": "prefill",
         "budget": {"n_sink": 4, "n_recent": 64, "n_selected": 250}, "machine": "AMD EPYC 9R14 96-Core Processor, 2 cores", "read_bandwidth": 21.3,
         "date": "2026-11-30T03:00:00+00:00", "source_id": "0c1e57098+2c98d7c0df20", "command": "sfi-local bench qwen2.5-coder-1.5b"}


def row(mode, depth, tps, other_work=0.02, ceiling=1.5, ratio=1.2, spread=0.05, kv_type="f16"):
    return {**FACTS, "kv_type": kv_type, "depth": depth, "mode": mode, "decode_tps": tps, "spread": spread, "tps_reps": [0.97 * tps, tps, 1.02 * tps],
            "other_work": other_work, "ms_step": 1000 / tps, "ms_slow": 12.34, "ms_fast": 5.67, "steps": {"slow": 6, "fast": 122},
            "kv_read_share": 0.143, "ratio_to_stock": ratio, "ratio_to_dense": 1.1, "ceiling": ceiling, "gbps": 12.3, "kv_gbps": 4.5}


ROWS = [row(mode, depth, 1000.0 - depth / 100, kv_type=kv) for kv in ("f16", "q8_0") for depth in (0, 32768) for mode in ("stock", "dense", "sfi")]


@pytest.mark.parametrize("width", [40, 60, 80, 132])
def test_the_table_fits_the_window_and_keeps_what_matters(width):
    text = show("table", ROWS, width)
    head = text.splitlines()[0]
    assert max(map(len, text.splitlines())) <= width and all(title in head for title in ("depth", "mode", "tokens/s", "x stock"))
    assert ("KV read" in head and "ceiling" in head) == (width >= 80) and ("KV GB/s" in head) == (width >= 132)


def test_without_a_window_nothing_is_left_out():
    assert "KV GB/s" in show("table", ROWS).splitlines()[0] and "KV GB/s" in show("md", ROWS)


def test_one_repetition_has_no_spread():
    assert " -  " in show("table", [row("stock", 0, 10, spread=None)], 80).splitlines()[1]


def test_a_busy_machine_is_marked_and_said():
    quiet, busy = row("stock", 0, 20), row("dense", 1000, 14.1, other_work=0.62)
    text = show("table", [quiet, busy], 80)
    assert [line.count("!") for line in text.splitlines()[1:3]] == [0, 1] and "up to 62 % of the CPUs' time" in text
    assert "!" not in show("table", [quiet], 80) and is_busy(busy) and not is_busy(row("dense", 0, 1, other_work=None))


def test_what_cannot_be_is_said():
    high = row("dense", 1000, 40, ratio=1.7)
    assert above_ceiling(high) and "dense at 1000 came out above the ceiling" in " ".join(context([high]))
    assert not above_ceiling(row("exact", 1000, 40, ratio=1.7)) and not above_ceiling(row("dense", 1000, 40, ratio=1.55))
    assert not above_ceiling(row("dense", 1000, 40, ceiling=None))


def test_the_picture_says_machine_threads_and_day(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "none"  # texts stay texts
    plot([*ROWS, row("dense", 1000, 40, other_work=0.9)], str(tmp_path / "x.svg"))
    picture = (tmp_path / "x.svg").read_text()
    assert all(text in picture for text in ("AMD EPYC 9R14", "2 threads", "2026-11-30", "5 x 128 steps", "measured beside other programs"))
    plot(ROWS, str(tmp_path / "y.svg"))
    assert "beside other programs" not in (tmp_path / "y.svg").read_text()


STAT = """cpu  9 9 9 9
cpu0 1000 0 500 9000 70 0 10 20 0 0
cpu1 2000 0 0 8000 0 0 0 0 0 0
cpu11 5 0 0 5 0 0 0 0 0 0
intr 1
"""


def test_the_work_of_these_cpus_is_counted_and_waiting_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(other_work.os, "sysconf", lambda name: 100)
    (tmp_path / "stat").write_text(STAT)
    assert busy_seconds(tmp_path / "stat", {0}) == 15.3 and busy_seconds(tmp_path / "stat", {0, 1}) == 35.3
    assert share_between((0, 10.0, 1.0), (10, 25.0, 6.0), 2) == 0.5
    assert share_between((0, None, 1.0), (10, 25.0, 6.0), 2) is None and share_between((0, 1, 1), (0, 1, 1), 2) is None


def test_a_system_that_does_not_tell_gives_no_share(tmp_path, monkeypatch):
    monkeypatch.setattr(other_work, "import_psutil", lambda: None)
    assert OtherWork(tmp_path / "none").share() is None


def test_our_own_work_is_not_that_of_others(monkeypatch):
    monkeypatch.setattr(other_work, "busy_seconds", lambda *_: own())
    own = lambda: sum(other_work.os.times()[:2])  # noqa: E731  (a machine on which we are alone)
    others = OtherWork()
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    assert others.share() == pytest.approx(0, abs=0.02)
