"""The line that says how far a piece of work is: what it says, and that it moves and leaves nothing behind."""

import io
import re
import time

import pytest

from sfi_local.cli import progress
from sfi_local.cli.progress import Pace, Progress, Runs, first_that_fits, forms, spoken


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_time_that_is_left_follows_the_latest_pace():
    pace = Pace()
    assert pace.left(1000, 0) is None
    pace.add(0, 0)
    for i in range(1, 9):  # 512 tokens in 2 s, later in 20
        pace.add(512 * i, 2 * min(i, 4) + 20 * max(0, i - 4))
    assert pace.left(512 * 9, 88) == pytest.approx(20)
    assert pace.left(512 * 9, 98) == pytest.approx(10)
    assert pace.left(512 * 9, 200) == 0


def test_many_small_reports_are_one_pace():
    pace = Pace()
    for i in range(3001):
        pace.add(i, i / 100)
    assert pace.left(6000, 30) == pytest.approx(30, rel=0.05) and len(pace._points) < 100


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("width", range(1, 100, 7))
@pytest.mark.parametrize("unit", ["tokens", "bytes", "%", "runs"])
def test_no_line_is_wider_than_the_window(width, unit):
    for left in (None, 0, 59.4, 4000):
        assert len(first_that_fits(forms("reading", unit, 1024, 3646, 12, left), width)) <= width


def test_what_is_said():
    assert forms("reading", "tokens", 1024, 4096, 12, 100)[0] == "reading [####............] 1024 of 4096 tokens, 2 min left"
    assert forms("reading", "tokens", 0, 4096, 12, None)[1] == "reading 4096 tokens, 12 s"
    assert forms("loading", "%", 0.5, 1, 1, 1)[1] == "loading 50 %, 1 s left"
    assert forms("fetching", "bytes", 5e6, 0, 3, None)[0].startswith("fetching 5.0 MB, 3 s")
    assert [spoken(s) for s in (0.4, 59.4, 60, 3599, 3900)] == ["0 s", "59 s", "1 min", "1 h 0 min", "1 h 5 min"]


def test_it_moves_before_the_first_report_and_is_erased(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    stream = Terminal()
    with Progress("reading", "tokens", "preparing", stream) as reading:
        time.sleep(0.1)
        assert "preparing, 0 s" in stream.getvalue()
        reading(0, 3646)
        time.sleep(0.1)
        assert "reading [................] 3646 tokens" in stream.getvalue()
    drawn = stream.getvalue()
    assert drawn.endswith("\r\x1b[K") and "\n" not in drawn
    time.sleep(0.1)
    assert stream.getvalue() == drawn
    reading.close()
    assert stream.getvalue() == drawn


def test_what_is_over_at_once_is_not_shown():
    stream = Terminal()
    with Progress("reading", "tokens", stream=stream) as reading:
        reading(10, 10)
    assert stream.getvalue() == ""


def test_a_terminal_that_goes_away_does_not_end_the_work(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    stream = Terminal()
    with Progress("reading", "tokens", stream=stream) as reading:
        stream.close()
        time.sleep(0.1)
        reading(1, 2)


def test_few_plain_lines_where_nothing_can_be_drawn_over(monkeypatch):
    stream = io.StringIO()
    with Progress("reading", "tokens", stream=stream) as reading:
        for i in range(100):
            reading(i, 100)
        assert stream.getvalue() == ""
        monkeypatch.setattr(progress, "PLAIN_S", 0)
        reading(50, 100)
    assert re.fullmatch(r"reading 50 of 100 tokens, \d+ s( left)?\n", stream.getvalue())


def test_a_sentence_in_between_has_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    stream = Terminal()
    with Progress("reading", "tokens", stream=stream):
        time.sleep(0.1)
        progress.erase_drawn()
        stream.write("A sentence.\n")
        time.sleep(0.1)
    assert re.search(r"reading, 0 s\r\x1b\[KA sentence\.\n\r\x1b\[Kreading, 0 s", stream.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "PLAIN_S", 0)
    stream = Terminal()
    with Progress("reading", "tokens", stream=stream) as reading:
        reading(50, 100)
    assert "\x1b" not in stream.getvalue() and stream.getvalue().endswith("\n")


def test_runs_name_what_is_measured(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    stream = Terminal()
    with Runs(4, stream) as runs:
        time.sleep(0.05)
        runs.say("f16 @ 2000: sfi, 2 of 5")
        runs.advance()
        time.sleep(0.05)
    assert "loading, 0 s" in stream.getvalue() and "measuring f16 @ 2000: sfi, 2 of 5 [####............] 1 of 4 runs" in stream.getvalue()
    plain = io.StringIO()
    with Runs(4, plain) as runs:
        for detail in ("a: 1", "a: 2", "b: 1"):
            runs.say(detail)
    assert plain.getvalue() == "sfi-local: measuring a\nsfi-local: measuring b\n"
