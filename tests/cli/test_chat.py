"""The conversation on a terminal, driven through a pseudo-terminal."""

import os
import re
import select
import subprocess
import time

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals of POSIX")

from support.command_line import cli_command, cli_env  # noqa: E402

OPTIONS = ("--mode", "sfi", "-t", "1", "--temp", "0", "--n-recent", "32", "--n-selected", "40")


class Terminal:
    """A chat in a pseudo-terminal; what it shows is collected in ``shown``."""

    def __init__(self, *arguments, **env: str):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(cli_command("run", *arguments), stdin=slave, stdout=slave, stderr=slave,
                                        env=cli_env(**{"TERM": "dumb", **env}), start_new_session=True,
                                        preexec_fn=lambda: _make_terminal(slave))
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern has appeared in new output; returns that output."""
        start, deadline = len(self.shown), time.monotonic() + seconds
        while not re.search(pattern, self.shown[start:]):
            assert time.monotonic() < deadline and self._read(), f"no {pattern!r} in {self.shown[start:]!r}"
        return self.shown[start:]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, key: str = "") -> int:
        """Read the rest and return the exit code; a key is typed every second, for readline may miss a Ctrl-C."""
        for _ in range(30):
            self.type(key)
            while self._read(1.0):
                continue
            if self.process.poll() is not None:
                break
        return self.process.wait(10)

    def _read(self, seconds: float = 60) -> bool:
        """Take what is shown next; False if nothing comes any more."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is gone
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def _make_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # Ctrl-C typed here becomes SIGINT there


@pytest.fixture
def terminal():
    made = []

    def start(*arguments, **env):
        made.append(Terminal(*map(str, arguments), **env))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_turns_reuse_the_cache_and_quit_leaves(terminal, tiny):
    chat = terminal(tiny, *OPTIONS, "-n", 12, "--system", "x" * 300)
    chat.wait_for("> ")
    chat.type("Hello\n")
    first = chat.wait_for(r"KV read.*\n(.|\n)*> ")
    chat.type("And then?\n")
    second = chat.wait_for(r"KV read.*\n(.|\n)*> ")
    n_first, n_second = (int(re.search(r"prefill (\d+) tokens \d", text)[1]) for text in (first, second))
    assert n_first > 300 > 100 > n_second
    chat.type("/quit\n")
    assert chat.end() == 0 and "Traceback" not in chat.shown


def test_new_starts_anew_and_the_end_of_input_leaves(terminal, tiny):
    chat = terminal(tiny, *OPTIONS, "-n", 4)
    chat.wait_for("> ")
    for text in ("Hello\n", "/new\nHello\n"):
        chat.type(text)
        chat.wait_for(r"KV read.*\n(.|\n)*> ")
    chat.type("\x04")
    assert chat.end() == 0


def test_ctrl_c_stops_the_answer_and_a_second_leaves(terminal, smollm2):
    chat = terminal(smollm2, "-n", -1, "--temp", 0, "--mode", "sfi")
    chat.wait_for("> ")
    chat.type("Write a long story about a river.\n")
    chat.wait_for("river(.|\n)*river")
    time.sleep(0.3)
    chat.type("\x03")
    chat.wait_for("interrupted(.|\n)*> ")
    assert chat.end("\x03") == 130 and "Traceback" not in chat.shown


def test_a_turn_that_does_not_fit_leaves_the_conversation_usable(terminal, tiny):
    chat = terminal(tiny, *OPTIONS, "-n", 4, "--ctx", 256)
    chat.wait_for("> ")
    chat.type("y" * 300 + "\n")
    assert "/new" in chat.wait_for(r"the context 256(.|\n)*> ")
    chat.type("Hello\n")
    chat.wait_for(r"KV read.*\n(.|\n)*> ")


# ---- marks on the tokens ---------------------------------------------------------------------------------------------

SLOW, LEGEND = "\x1b[1;33m", "each token shows the step it came from"
MARKED = (*OPTIONS, "--max-span", "6", "-n", 30, "-p", "Hello. " * 30)


def piped(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(cli_command("run", *arguments), capture_output=True, env=cli_env(**env), stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [("--color", "{tiny}"), ("{tiny}", "--color"), ("{tiny}", "--color", "auto")])
def test_color_marks_slow_tokens_on_a_terminal(terminal, tiny, arguments):
    shown = terminal(*(a.format(tiny=tiny) for a in arguments), *MARKED, TERM="xterm", NO_COLOR="")
    shown.wait_for("KV read")
    answer = shown.shown[shown.shown.index(LEGEND):].split("\n", 1)[1]
    n_slow = int(re.search(r"(\d+) slow", answer)[1])
    assert 1 <= answer.count(SLOW) <= n_slow  # a step may release no text
    assert shown.shown.count(LEGEND) == 1 and answer.count("\x1b[36m") == 1  # the first token is of the prefill


@pytest.mark.parametrize("env", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb", "NO_COLOR": ""}])
def test_color_keeps_to_what_the_terminal_and_its_user_want(terminal, tiny, env):
    plain = terminal(tiny, *MARKED, "--color", **env)
    plain.wait_for("KV read")
    assert SLOW not in plain.shown and LEGEND not in plain.shown


def test_color_is_for_terminals_unless_it_is_always(tiny):
    auto, never = piped(tiny, *map(str, MARKED), "--color"), piped(tiny, *map(str, MARKED))
    always = piped(tiny, *map(str, MARKED), "--color", "always", NO_COLOR="1")
    assert auto.stdout == never.stdout and b"\x1b" not in auto.stdout + auto.stderr
    assert SLOW.encode() in always.stdout and b"slow bold yellow" in always.stderr
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", always.stdout) == never.stdout
    assert b"\x1b" not in piped(tiny, *map(str, MARKED), "--color=always", "--json").stdout
    assert piped(tiny, "-p", "x", "--color=blue").returncode == 2


def test_marks_end_where_their_text_ends():
    from sfi_local.cli.terminal import MARKS, mark

    assert mark("x", "fast") == "x" and mark("", "slow") == "" and mark("x", "a new kind") == "x"
    assert mark("x", "slow") == SLOW + "x\x1b[0m" and set(MARKS) == {"prefill", "slow", "fast", "dense", "stock"}
