"""What makes lines one message, and what is kept of them."""

import os
import stat

import pytest

from sfi_local.cli import ask
from sfi_local.cli.ask import closed, history_file, is_open

pty = pytest.importorskip("pty", reason="pseudo-terminals of POSIX")


@pytest.mark.parametrize("text", ["one \\", '"""', '"""def f():\n  return 1', '  """a', '"""""'])
def test_a_message_goes_on(text):
    assert is_open(text)


@pytest.mark.parametrize("text", ["", "one", "a path C:\\\\", '"""a"""', '"""\na\n"""', 'he said """a', '""""""'])
def test_a_message_is_whole(text):
    assert not is_open(text)


def test_the_marks_of_a_block_are_not_part_of_it():
    assert closed('"""\ndef f():\n  return 1\n"""') == "def f():\n  return 1"
    assert closed("  two\nlines ") == "  two\nlines "
    assert closed('say """a""" twice') == 'say """a""" twice'


@pytest.fixture
def master():
    """A pseudo-terminal: (what a user writes to, what is read from)"""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_lines_that_come_together_are_one_message_and_the_next_is_its_own(master):
    ours, theirs = master
    os.write(ours, b"def f():\n  return 1\nExplain.\n")
    assert ask.read_together(theirs) == b"def f():\n  return 1\nExplain.\n"
    os.write(ours, b"next\n")
    assert ask.read_together(theirs) == b"next\n"


def test_the_last_line_of_a_paste_needs_no_newline(master):
    ours, theirs = master
    os.write(ours, b"def f():\n  return 1\nExplain.")
    assert ask.read_together(theirs) == b"def f():\n  return 1\nExplain."
    os.write(ours, b"typed\nhalf")  # one line and the beginning of the next, which its writer may still change
    assert ask.read_together(theirs) == b"typed\n"
    os.write(ours, b" a line\n")
    assert ask.read_together(theirs) == b"half a line\n"


def test_the_end_of_input_behind_a_half_typed_line_sends_it(master):
    ours, theirs = master
    os.write(ours, b"half\x04\x04")
    assert ask.read_together(theirs) == b"half"
    os.write(ours, b"\x04")
    assert ask.read_together(theirs) == b""


def test_the_history_is_its_writers_alone_and_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ask, "LARGEST_HISTORY", 2000)
    path = history_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    history = ask._history(path)
    for i in range(200):
        history.store_string(f"message {i}\nof two lines")
    history.store_string("x" * (ask.LONGEST_REMEMBERED + 1))
    path.chmod(0o644)
    assert history_file() == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = list(ask._history(path).load_history_strings())
    assert kept[0] == "message 199\nof two lines" and 10 < len(kept) < 150
    assert all(text.startswith("message ") and text.endswith("\nof two lines") for text in kept)


def test_a_cache_that_cannot_be_written_means_no_history(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "file"))
    assert history_file() is None
