"""native/examples/ask, built by what an embedder has and driven by keys: opens, reads, answers, stops, goes on, closes at any time."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import cli_command, cli_env
from support.desktop import STALL_MS, closed_in_a_prefill, starter

SOURCE = Path(__file__).resolve().parents[2] / "native" / "examples" / "ask"
DRAG_SOURCE = Path(__file__).with_name("drag_source.c")

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


def test_what_a_model_takes_is_told_before_it_is_loaded(start, smollm2, short_text):
    app = start(smollm2, short_text)
    app.focus()
    app.wait("opened")
    assert [e["event"] for e in app.events[:2]] == ["needs", "loaded"]
    needs = app.all("needs")[0]
    assert abs(needs["weights"] / Path(smollm2).stat().st_size - 1) < 0.1 and 0 < needs["least"] < needs["most"]
    assert f"{needs['weights'] / 1e6:.0f} MB" in needs["text"] and "8,192" in needs["text"] and "are free" in needs["text"]
    app.quit()


def test_a_model_larger_than_memory_is_loaded_when_one_insists(start, smollm2, text):
    app = start("--memory", 150, smollm2, text)
    app.focus()
    app.wait("too_large")
    app.key("alt+l")
    app.wait("loaded")
    failed = app.wait("failed")["text"]  # and there is no room for its text
    assert re.search(r"takes \d+ MB, and 5\d MB are free: close other programs, or open a shorter text", failed), failed
    assert [e["event"] for e in app.events] == ["needs", "too_large", "loaded", "failed"]
    app.quit()


def choose(app, key, title, path):
    """In the dialog that a key opens."""
    app.focus()
    app.key(key)
    app.focus(title)
    time.sleep(0.5)  # it has the keys a moment after it is seen
    app.type(str(path))
    app.key("Return")


def test_files_are_chosen_in_a_dialog(start, smollm2, short_text):
    app = start()
    choose(app, "ctrl+m", "Choose a model", smollm2)
    app.wait("loaded")
    choose(app, "ctrl+o", "Open a text", short_text)
    assert app.wait("opened")["tokens"] > 1000
    app.focus()
    app.quit()


def test_a_text_is_dropped_on_the_window(start, display, smollm2, short_text, tmp_path):
    app = start(smollm2)
    window = app.focus()
    app.wait("loaded")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "gtk4"], capture_output=True, text=True).stdout.split()
    subprocess.run(["cc", DRAG_SOURCE, *flags, "-o", tmp_path / "source"], check=True)
    with starter(display, [str(tmp_path / "source")]) as start_source:
        source = start_source(short_text)
        display.do("windowsize", "--sync", window, "700", "720")
        display.do("windowmove", "--sync", source.focus("Drag source"), "800", "0")
        source.drag((880, 100), (400, 300))
        assert app.wait("opened")["tokens"] > 1000
        assert source.wait("dragged")["taken"]
    app.focus()
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
