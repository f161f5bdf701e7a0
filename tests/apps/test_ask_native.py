"""native/examples/ask, built by what an embedder has and driven by keys: opens, reads, answers, stops, goes on, closes at any time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import cli_command, cli_env
from support.desktop import STALL_MS, closed_in_a_prefill, starter

SOURCE = Path(__file__).resolve().parents[2] / "native" / "examples" / "ask"

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.skipif(sys.platform != "linux", reason="Xvfb is for Linux")]


@pytest.fixture(scope="module")
def program(display, tmp_path_factory):
    """The app, built by find_package(sfi)."""
    for command, package in (("cmake", "cmake"), ("pkg-config", "pkg-config")):
        if not shutil.which(command):
            pytest.skip(f"{command} cannot be found: apt install {package}")
    if subprocess.run(["pkg-config", "--exists", "libadwaita-1 >= 1.2"]).returncode:
        pytest.skip("GTK 4 with libadwaita cannot be found: apt install libadwaita-1-dev")
    doctor = subprocess.run(cli_command("doctor", "--json"), env=cli_env(), capture_output=True, text=True)
    prefix = json.loads(doctor.stdout)["embedding"]["prefix"]
    build = tmp_path_factory.mktemp("ask")
    for command in (["cmake", "-S", SOURCE, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"], ["cmake", "--build", build, "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(build / "sfi-ask")


@pytest.fixture
def start(program, display):
    """Starts it; it is ended with the test."""
    with starter(display, [program, "--trace"]) as start:
        yield start


def check_stalls(app, phase):
    """Our code and what GTK paints of it keep the window for no longer than a frame lasts. What other programs take from it, which the
    clock on the wall would count too, is not the app's: processor time, and time without a core is left out; see stalls.h."""
    for found in [e for e in app.all("stalls") if e["phase"] == phase]:
        assert found["work_ms"] <= STALL_MS and found["held_ms"] <= STALL_MS, found


def test_it_opens_reads_answers_stops_and_goes_on(start, smollm2, text):
    app = start(smollm2, text)
    app.focus()
    opened, read = app.wait("opened"), app.wait("read")
    assert read["new"] == read["tokens"] == opened["tokens"] > 1500
    assert [e["done"] for e in app.all("reading")] == sorted(e["done"] for e in app.all("reading")) and len(app.all("reading")) > 4
    app.type("What does the assert statement do?")
    app.key("Return")
    app.wait("token", 12)  # it streams
    app.key("Escape")
    stopped = app.wait("answered")
    assert stopped["end"] == "stopped" and 12 <= stopped["tokens"] < 120 and stopped["fast"] > 0 and stopped["new"] < 40

    app.type("And in one word?")
    app.key("Return")
    app.wait("token", stopped["tokens"] + 3)
    app.key("Escape")
    again = app.wait("answered", 2)
    assert 0 < again["new"] < 40 and again["tokens"] >= 3  # the question alone is read

    app.key("ctrl+n")
    app.wait("forgot")
    app.type("What is this text about?")
    app.key("Return")
    app.wait("token", stopped["tokens"] + again["tokens"] + 2)
    check_stalls(app, "reading")
    check_stalls(app, "answering")
    app.quit()


def test_reading_is_stopped_and_a_question_reads_on(start, smollm2, short_text):
    app = start(smollm2, short_text)
    app.focus()
    app.wait("opened")
    app.wait("reading", 3)
    app.key("Escape")
    app.wait("stopped")
    done = app.all("reading")[-1]["done"]
    app.type("What is it about?")
    app.key("Return")
    app.wait("asked")
    app.wait("token", 1)
    began_at = [e["done"] for e in app.all("reading") if app.events.index(e) > app.events.index(app.all("asked")[0])]
    assert began_at[0] >= done > 0  # what was read is not read again
    app.quit()


@pytest.mark.parametrize("model, says", [("nothing.gguf", "no model to read"), ("text.gguf", "no model: a GGUF file begins"),
                                         ("broken.gguf", "cannot be loaded")])
def test_a_bad_model_is_told_in_the_window(start, tmp_path, text, model, says):
    (tmp_path / "text.gguf").write_text("This is a text.")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 64)
    app = start(tmp_path / model, text)
    app.focus()
    assert says in app.wait("failed")["text"]
    app.quit()
    assert len(app.all("failed")) == 1  # and that there is no model for the text is not said over it


def test_a_text_that_is_too_long_is_told_with_both_numbers(start, smollm2, tmp_path, text):
    app = start("--ctx", 1000, smollm2, text)
    app.focus()
    failed = app.wait("failed")["text"]
    assert "The text has 2," in failed and "can hold 1,000" in failed and "shorter text" in failed
    app.quit()


@pytest.mark.parametrize("content, says", [(b"", "empty"), (b"\xff\xfe\0x", "UTF-8"), (None, "no text to read")])
def test_what_is_no_text_is_told(start, smollm2, tmp_path, content, says):
    if content is not None:
        (tmp_path / "odd.txt").write_bytes(content)
    app = start(smollm2, tmp_path / "odd.txt")
    app.focus()
    assert says in app.wait("failed")["text"]
    app.quit()


def test_it_closes_in_the_middle_of_a_prefill(start, smollm2, long_text):
    for app in closed_in_a_prefill(start, smollm2, long_text):
        assert not app.all("read")
