"""sfi_local/examples/ask.py, driven by keys: opens, reads, answers, stops, goes on, closes at any time; and it is short."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import cli_env
from support.desktop import STALL_MS, closed_in_a_prefill, starter

RUNNER = Path(__file__).resolve().parents[1] / "support" / "ask_window.py"
APP = Path(__file__).resolve().parents[2] / "sfi_local" / "examples" / "ask.py"

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.skipif(sys.platform != "linux", reason="Xvfb is for Linux")]


@pytest.fixture
def start(display):
    """Starts it; it is ended with the test."""
    if subprocess.run([sys.executable, "-c", "import tkinter"], capture_output=True).returncode:
        pytest.skip("tkinter is no part of this Python: apt install python3-tk")
    with starter(display, [sys.executable, str(RUNNER)], **cli_env(SFI_LOCAL_AUTO_DEPTH="0")) as start:
        yield start


def test_it_has_less_than_200_lines():
    assert len(APP.read_text(encoding="utf-8").splitlines()) < 200


def test_it_opens_reads_answers_stops_and_goes_on(start, smollm2, text):
    app = start(smollm2, text)
    app.focus()
    app.wait("opened")
    app.wait("shown", state="ready")
    assert len(app.all("reading")) > 3
    app.type("What does the assert statement do?")
    app.key("Return")
    app.wait("token", 12)
    app.key("Escape")
    stopped = app.wait("answered")
    assert stopped["end"] == "stopped" and 12 <= stopped["tokens"] < 120 and stopped["new"] < 60
    assert any(e["lit"] for e in app.all("token")), "the strip was never lit"
    assert stopped["work_ms"] <= STALL_MS  # processor time of a tick; other programs take their time from a window too

    app.type("And in one word?")
    app.key("Return")
    app.wait("token", stopped["tokens"] + 3)
    app.key("Escape")
    assert app.wait("answered", 2)["new"] < 60  # the question alone is read
    app.quit()


def test_reading_is_stopped_and_a_question_reads_on(start, smollm2, short_text):
    app = start(smollm2, short_text)
    app.focus()
    app.wait("opened")
    app.wait("reading", 2)
    app.key("Escape")
    assert app.wait("shown", state="ready")["said"] == "Stopped."
    done = app.all("reading")[-1]["done"]
    app.type("What is it about?")
    app.key("Return")
    app.wait("token")
    app.key("Escape")
    answered = app.wait("answered")
    assert 0 < done and answered["new"] <= app.all("reading")[0]["total"] - done + 60
    app.quit()


def test_what_is_wrong_is_told_in_the_window(start, smollm2, tmp_path, text):
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\0x")
    for arguments, says in (((tmp_path / "nothing.gguf", text), "nothing.gguf"), ((smollm2, tmp_path / "odd.txt"), "UTF-8"),
                            ((smollm2, tmp_path / "none.txt"), "none.txt"), (("--ctx", "1000", smollm2, text), "1000")):
        app = start(*arguments)
        app.focus()
        n = 1 if arguments[0] != smollm2 and arguments[0] != "--ctx" else 2  # the first one says that the model is there
        assert says in app.wait("shown", n + 1, state="idle")["said"]  # before, that it loads
        app.quit()


def test_it_closes_in_the_middle_of_a_prefill(start, smollm2, long_text):
    for app in closed_in_a_prefill(start, smollm2, long_text):
        assert not [e for e in app.all("shown") if e["state"] == "ready"]
