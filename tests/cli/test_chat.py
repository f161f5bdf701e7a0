"""The conversation on a terminal, in windows of 80 x 24 and of 40 x 12 and on a dumb terminal."""

import json
import os
import re
import stat
import time

import pytest

pytest.importorskip("pty", reason="pseudo-terminals of POSIX")

from support.tiny_model import CHATML, write_tiny  # noqa: E402
from support.window import PASTE, Window  # noqa: E402

OPTIONS = ("--mode", "sfi", "-t", 1, "--temp", 0, "--set", "n_recent=32,n_selected=40")
SIZES = pytest.mark.parametrize("rows, columns", [(24, 80), (12, 40)])
READY = r"\n>$"


@pytest.fixture
def window(tmp_path):
    """Start a command in a window; of the user's files it sees none."""
    made = []

    def start(*arguments, **how):
        made.append(Window("run", *arguments, **{"SFI_LOCAL_CACHE": str(tmp_path), **how}))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def chat(window, tiny):
    """Start a chat with the tiny model; returns it when it is ready."""
    def start(*arguments, **how):
        one = window(tiny, *OPTIONS, "-n", 6, *arguments, **how)
        one.wait_to_see(READY)
        return one

    return start


def n_read(shown):
    """Tokens that the last answer had to read."""
    return int(re.findall(r"(\d+)(?: tokens?)? read", shown)[-1])


def last_message(one, path):
    """What the model was given last, by /save."""
    one.type(f"/save {path}\r")
    one.wait_for("Saved")
    messages = json.loads(path.read_text())["messages"]
    return "".join(part["text"] for part in [m for m in messages if m["role"] == "user"][-1]["parts"])


# ---- several lines ---------------------------------------------------------------------------------------------------

TEXT = "def f():\n  return 1\nExplain."


@SIZES
def test_a_bracketed_paste_is_one_message_that_can_be_edited(chat, tmp_path, rows, columns):
    one = chat(rows=rows, columns=columns)
    one.type(PASTE.format(TEXT))
    assert one.wait_to_see("Explain").endswith("> def f():\n.   return 1\n. Explain.")
    one.answer_to(" Why?")
    assert last_message(one, tmp_path / "a") == TEXT + " Why?" and one.shown.count(" written") == 1


@pytest.mark.parametrize("env", [{}, {"TERM": "dumb"}])
def test_so_is_one_of_a_terminal_that_does_not_bracket_it(chat, tmp_path, env):
    one = chat(**env)
    one.answer_to(TEXT + "\n", end="")
    time.sleep(0.5)
    assert last_message(one, tmp_path / "a") == TEXT and one.shown.count(" written") == 1


@pytest.mark.parametrize("env", [{}, {"TERM": "dumb"}])
@pytest.mark.parametrize("lines", [("def f():\\", "  return 1\\", "Explain."), ('"""', "def f():", "  return 1", "Explain.", '"""')])
def test_lines_that_go_on_are_one_message(chat, tmp_path, env, lines):
    one = chat(**env)
    for i, line in enumerate(lines):
        one.type(line)
        one.wait_to_see(re.escape(line) + "$")
        one.type("\n" if "TERM" in env else "\r")
        if i < len(lines) - 1:
            one.wait_to_see(r"\n\.$")
    one.wait_for(" written")
    assert last_message(one, tmp_path / "a") == TEXT and one.shown.count(" written") == 1


@pytest.mark.parametrize("env", [{}, {"TERM": "dumb"}])
def test_what_is_no_text_is_refused_and_the_chat_goes_on(chat, env):
    one = chat(**env)
    for data in (b"caf\xe9 au lait", PASTE.format("a\0b").encode() if not env else b"a\xff"):
        os.write(one.master, data)
        time.sleep(0.3)
        one.type("\n")
        one.wait_for("The message (is not UTF-8 text|has a NUL)")
    one.answer_to("Hello", "\n")
    assert "Traceback" not in one.shown


def test_the_first_line_says_how(chat):
    assert all(sign in chat().text.split("\n>")[0] for sign in ("paste", "\\", "/help"))


# ---- commands --------------------------------------------------------------------------------------------------------

@SIZES
def test_an_unknown_command_is_not_sent(chat, rows, columns):
    one = chat(rows=rows, columns=columns)
    one.type("/regn\r")
    seen = one.wait_to_see("blank before it")
    assert "did you mean /regen?" in " ".join(seen.split()) and "written" not in one.shown
    one.type("/help\r")
    one.wait_for("Alt-Enter")


def test_turns_reuse_the_cache_new_does_not_and_quit_leaves(chat):
    one = chat("--system", "x" * 300)
    first, second = (n_read(one.answer_to(text)) for text in ("Hello", "And then?"))
    assert first > 300 > 100 > second
    one.type("/tokens\r")
    assert re.search(r"\d+ of \d+ tokens: 2 turns, a system message", one.wait_for(r"tokens: .*"))
    one.type("/new\r")
    one.wait_for("A new conversation")
    assert n_read(one.answer_to("Hello")) < first
    one.type("/quit\r")
    assert one.end() == 0 and "Traceback" not in one.shown


def test_the_system_message_can_be_changed_shown_and_removed(chat):
    one = chat("--system", "One.")
    for typed, said in (("/system", "One."), ("/system Two, and three.", "is set"), ("/system", "Two, and three."), ("/system -", "no system"),
                        ("/system", "no system message")):
        one.type(typed + "\r")
        one.wait_for(r"\n[^\n]*" + re.escape(said))


def test_settings(chat):
    one = chat()
    for typed, said in (("/set", "temp 0, seed random, n 6, top_k 40, top_p 0.95, min_p 0.05"), ("/set temp=0.5", "temp 0.5"),
                        ("/set n=-1", "n no limit"), ("/set top-p=2", "give a value from 0 to 1"), ("/set tmp=1", "did you mean temp?"),
                        ("/set temp", "needs a value"), ("/set seed=x", "no number"), ("/set n=0", "give 1 or more"), ("/set seed=7", "seed 7")):
        one.type(typed + "\r")
        one.wait_for(re.escape(said))


def test_an_answer_again_a_saved_conversation_and_back(chat, tmp_path):
    one = chat()
    one.type("/regen\r")
    one.wait_for("no answer yet")
    one.answer_to("Hello")
    assert "comes out the same again" in one.answer_to("/regen")
    one.type(f"/save {tmp_path / 'a b.json'}\r")
    one.wait_for("Saved")
    saved = json.loads((tmp_path / "a b.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] and stat.S_IMODE((tmp_path / "a b.json").stat().st_mode) == 0o600
    other = chat()
    other.type(f"/load {tmp_path / 'a b.json'}\r")
    other.wait_for("of 1 turn, read with")
    n = n_read(other.answer_to("And?"))
    assert n > n_read(one.answer_to("And?")) and "another model" not in other.shown
    again = json.loads((tmp_path / "a b.json").read_text())
    assert again == saved
    other.type("/load none\r")
    other.wait_for("no file none")


THINKER = CHATML[:-3] + r" + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '<think>\n') }}"


def test_thoughts_are_switched_and_a_second_turn_goes_on(window, tmp_path, native):
    one = window(write_tiny(tmp_path / "thinker.gguf", template=THINKER), *OPTIONS, "-n", 12, "--think-budget", 4)
    one.wait_to_see(READY)
    one.type("/think\r")
    one.wait_for("Thoughts are as the template has them")
    first = n_read(one.answer_to("Hello " * 20))
    assert n_read(one.answer_to("And?")) < first
    for typed, said in (("/think off", "Thoughts are off"), ("/think maybe", "write /think on or /think off"), ("/think on", "Thoughts are on")):
        one.type(typed + "\r")
        one.wait_for(said)
        one.answer_to("Hello")


def test_a_model_that_cannot_be_switched_says_so(chat):
    one = chat()
    one.type("/think on\r")
    one.wait_for("no switch for thoughts")


# ---- documents -------------------------------------------------------------------------------------------------------

def test_a_conversation_about_a_file_and_one_more(chat, tmp_path):
    (tmp_path / "report.txt").write_text("The report. " * 30)
    (tmp_path / "note.txt").write_text("A note.")
    one = chat("-f", tmp_path / "report.txt")
    assert "report.txt: 360 tokens, read with your next message." in one.text
    assert n_read(one.answer_to("What does it say?")) > 360
    assert n_read(one.answer_to("And then?")) < 100
    one.type(f"/read {tmp_path / 'note.txt'}\r")
    one.wait_for("note.txt: 7 tokens")
    one.answer_to("And this?")
    assert last_message(one, tmp_path / "a") == "A note.\n\nAnd this?"
    one.type("/read -\r")
    one.wait_for("needs the name of a file")
    one.type("/read none.txt\r")
    one.wait_for("There is no file none.txt")


def test_a_file_that_does_not_fit_is_refused_or_its_head_is_taken(window, tiny, chat, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 200)
    one = window(tiny, *OPTIONS, "--ctx", 512, "-f", tmp_path / "long.txt")
    one.wait_for("--truncate")
    assert one.end() == 1
    cut = chat("--ctx", 512, "-f", tmp_path / "long.txt", "--truncate")
    assert ", its head, read with" in cut.text
    assert 300 < n_read(cut.answer_to("What?")) < 512


def test_a_missing_file_is_said_before_the_model_is_loaded(window, tiny):
    one = window(tiny, "-f", "none.txt")
    one.wait_for("no file none.txt")
    assert one.end() == 1 and "loading" not in one.shown


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("env", [{}, {"TERM": "dumb"}])
def test_ctrl_c_clears_a_half_typed_line_and_twice_leaves(chat, tmp_path, env):
    one = chat(**env)
    one.type("half a li")
    one.wait_to_see("half a li$")
    one.type("\x03")
    one.wait_to_see(READY)
    one.answer_to("Hello", "\n")
    assert last_message(one, tmp_path / "a") == "Hello"
    one.wait_to_see(READY)
    one.type("\x03")
    one.wait_for("again leaves")
    assert one.leave("\x03") == 130 and "Traceback" not in one.shown


@pytest.mark.parametrize("env", [{}, {"TERM": "dumb"}])
def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(window, smollm2, tmp_path, env):
    one = window(smollm2, "--temp", 0, "--mode", "sfi", **env)
    one.wait_to_see(READY)
    one.type("Write a long story about a river.\n")
    one.wait_for(r"(?s)(2004l|river\.\r?\n).*\briver.*\briver")  # not those of the question
    one.type("\x03")
    one.wait_for("stopped")
    one.wait_to_see(READY)
    one.type(f"/save {tmp_path / 'a'}\n")
    one.wait_for("Saved")
    answer = json.loads((tmp_path / "a").read_text())["messages"][1]["parts"][0]
    assert len(answer["tokens"]) > 5 and " ".join(answer["text"].split())[:20] in " ".join(one.shown.split())
    assert one.leave() == 0 and "Traceback" not in one.shown


def test_ctrl_c_while_the_prompt_is_read_keeps_what_was_read(window, smollm2, tmp_path):
    (tmp_path / "long.txt").write_text("The river runs to the sea. " * 300)
    one = window(smollm2, "--temp", 0, "-f", tmp_path / "long.txt", rows=12, columns=40)
    one.wait_to_see(READY)
    one.type("What runs?\r")
    one.wait_for(r"512 of \d+ tokens")
    one.type("\x03")
    assert re.search(r"Stopped after \d+ of \d+ tokens;\s+they\s+are kept", one.wait_for(r"kept\."))
    one.type("/tokens\r")
    one.wait_for("0 turns")
    assert one.leave() == 0


# ---- a full context --------------------------------------------------------------------------------------------------

def test_a_full_context_forgets_the_oldest_turns_and_says_so(chat):
    one = chat("--ctx", 400, "--system", "s" * 50, "--set", "n_recent=16,n_selected=16")
    for _ in range(7):
        shown = one.answer_to("q" * 40)
        if "forgotten" in shown:
            break
    assert re.search(r"The context is full: the (oldest turn is|\d oldest turns are) forgotten\.", shown)
    one.type("/tokens\r")
    assert "a system message" in one.wait_for("tokens: .*")


def test_a_message_too_long_for_the_context_is_refused_and_the_conversation_goes_on(chat):
    one = chat("--ctx", 256, "--set", "n_recent=16,n_selected=16")
    one.answer_to("Hello")
    one.type("y" * 300 + "\r")
    one.wait_for(r"has \d+ tokens")
    one.type("/tokens\r")
    one.wait_for("1 turn")
    one.answer_to("Hello")


# ---- history, looks --------------------------------------------------------------------------------------------------

def test_what_was_typed_comes_back_another_day_unless_it_must_not(chat, tmp_path):
    one = chat()
    one.answer_to("Name three rivers")
    one.leave()
    assert stat.S_IMODE((tmp_path / "chat_history").stat().st_mode) == 0o600
    other = chat("--no-history")
    other.answer_to("A secret")
    other.leave()
    third = chat(SFI_LOCAL_NO_HISTORY="1")
    third.answer_to("Another secret")
    third.leave()
    assert "secret" not in (tmp_path / "chat_history").read_text()
    last = chat()
    last.type("\x1b[A")
    last.wait_to_see("Name three rivers$")


def test_tab_completes_commands_and_files(chat, tmp_path):
    (tmp_path / "report of today.txt").write_text("A report.")
    one = chat()
    one.type("/rea\t")
    one.wait_to_see("> /read$")
    one.type(f" {tmp_path}/rep\t")
    one.wait_to_see(r"t\s*o\s*d\s*a\s*y")  # a long path is wrapped anywhere
    one.type("\r")
    one.wait_for("9 tokens")


@SIZES
def test_statistics_are_one_line_and_quiet_leaves_it_out(chat, rows, columns):
    one = chat(rows=rows, columns=columns)
    one.answer_to("Hello")
    one.wait_to_see(READY)
    assert sum(" written" in line and line.endswith("stopped at -n") for line in one.lines) == 1
    quiet = chat("--quiet", rows=rows, columns=columns)
    quiet.type("Hello\r")
    quiet.wait_to_see(r"Hello\n(.|\n)*" + READY)
    assert "written" not in quiet.shown


def test_no_color_means_no_styles(chat):
    one = chat(NO_COLOR="1")
    one.answer_to("Hello")
    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", one.shown)


@pytest.mark.parametrize("columns", [34, 80])
def test_progress_moves_before_the_first_batch_is_done_and_stays_on_its_line(window, smollm2, tmp_path, columns):
    (tmp_path / "long.txt").write_text("The river runs to the sea. " * 60)
    one = window(smollm2, "--temp", 0, "-t", 1, "-n", 4, "-f", tmp_path / "long.txt", columns=columns, rows=12)
    one.wait_to_see(READY)
    shown = one.answer_to("What runs?").split("\r\x1b[K")
    assert sum(" s" in line for line in shown) >= 2 and max(len(line) for line in shown[1:-1]) < columns
    assert "reading" not in one.text


def test_a_resize_while_it_is_read_counts(window, smollm2, tmp_path):
    (tmp_path / "long.txt").write_text("The river runs to the sea. " * 150)
    one = window(smollm2, "--temp", 0, "-t", 1, "-n", 4, "-f", tmp_path / "long.txt")
    one.wait_to_see(READY)
    one.type("What runs?\r")
    one.wait_for(r"reading")
    one.resize(12, 30)
    lines = one.wait_for(r" written").split("\r\x1b[K")
    assert max(len(line) for line in lines[3:-1]) < 30
