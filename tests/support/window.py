"""A command in a window: a pseudo-terminal, and an emulator that says what its screen shows."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pyte

from support.command_line import cli_command, cli_env

PASTE = "\x1b[200~{}\x1b[201~"  # what a terminal that brackets pastes sends


class Window:
    """shown: all that was written; screen: its last rows as a person sees them"""

    def __init__(self, *arguments, rows=24, columns=80, **env):
        self.screen = pyte.Screen(columns, rows)
        self._stream, self._decoder = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")("replace")
        self.master, slave = pty.openpty()
        self._size(slave, rows, columns)
        self.process = subprocess.Popen(cli_command(*map(str, arguments)), stdin=slave, stdout=slave, stderr=slave,
                                        env=cli_env(**{"TERM": "xterm-256color", "NO_COLOR": "", **env}), start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))  # Ctrl-C becomes SIGINT there
        os.close(slave)
        self.shown = ""

    @property
    def lines(self):
        """The rows of the screen, without blanks at their ends."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self):
        return "\n".join(self.lines).rstrip()

    def resize(self, rows, columns):
        self.screen.resize(rows, columns)
        self._size(self.master, rows, columns)
        os.killpg(os.getpgid(self.process.pid), signal.SIGWINCH)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern, seconds=120):
        """Read until the pattern is in what was written since the call; returns that."""
        start, deadline = len(self.shown), time.monotonic() + seconds
        while not re.search(pattern, self.shown[start:]):
            assert time.monotonic() < deadline and self._read(seconds), f"no {pattern!r} in {self.shown[start:]!r}"
        return self.shown[start:]

    def wait_to_see(self, pattern, seconds=120):
        """Read until the pattern is on the screen; returns the screen."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline and self._read(seconds), f"no {pattern!r} in\n{self.text}"
        return self.text

    def answer_to(self, text, end="\r"):
        """Send a message; returns what was written up to the line of statistics."""
        self.type(text + end)
        return self.wait_for(r"\d written.*\n")

    def leave(self, key="\x04"):
        """Type Ctrl-D, or another key, where a chat waits for a message; returns the exit code."""
        self.wait_to_see(r"\n>$")
        self.type(key)
        return self.end()

    def end(self):
        """Read the rest and return the exit code."""
        for _ in range(60):
            while self._read(1.0):
                continue
            if self.process.poll() is not None:
                break
        return self.process.wait(10)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds):
        """Take what is shown next; False if nothing comes any more."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # the other side is gone
            return False
        text = self._decoder.decode(data)
        self.shown += text
        self._stream.feed(text)
        return bool(data)

    @staticmethod
    def _size(fd, rows, columns):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
