"""Apps in a display of their own (Xvfb), driven by real keys and clicks (xdotool); what happens they say as lines of JSON on stdout."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest

from support.tiny_model import SEED

TIMEOUT = 90.0  # seconds for what takes one on an idle machine
STALL_MS = 16.0


class Display:
    """An X server. number: as in DISPLAY"""

    def __init__(self) -> None:
        missing = [name for name in ("Xvfb", "xdotool") if not shutil.which(name)]
        if missing:
            pytest.skip(f"{' and '.join(missing)} cannot be found: apt install xvfb xdotool")
        read, write = os.pipe()
        self._server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "1000x800x24", "-nolisten", "tcp", "-noreset"], pass_fds=[write],
                                        stderr=subprocess.DEVNULL)
        os.close(write)
        with os.fdopen(read) as told:
            self.number = told.readline().strip()
        assert self.number, "Xvfb did not start"

    @property
    def env(self) -> dict[str, str]:
        """For an app: no desktop, no bus, drawn by the processor."""
        return {**os.environ, "DISPLAY": f":{self.number}", "GDK_BACKEND": "x11", "GSK_RENDERER": "cairo", "GSETTINGS_BACKEND": "memory",
                "GTK_A11Y": "none", "DBUS_SESSION_BUS_ADDRESS": "disabled:", "LC_ALL": "C.UTF-8"}

    def do(self, *arguments: str) -> str:
        return subprocess.run(["xdotool", *arguments], env=self.env, capture_output=True, text=True, timeout=30).stdout.strip()

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()


class App:
    """A running app. events: what it has said so far"""

    def __init__(self, display: Display, command: list[str], **env: str):
        self.display, self.events = display, []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**display.env, **env})
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=lambda: self._errors.extend(self._process.stderr))]
        for reader in self._readers:
            reader.start()

    def end(self) -> None:
        """Where it has not ended by itself."""
        if self._process.poll() is None:
            self._process.kill()
        self._ended(10)

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _ended(self, timeout: float) -> int:
        code = self._process.wait(timeout)
        for reader in self._readers:
            reader.join()
        return code

    def all(self, event: str) -> list[dict]:
        return [e for e in self.events if e["event"] == event]

    def wait(self, event: str, n: int = 1, timeout: float = TIMEOUT, **fields) -> dict:
        """The n-th event of this name, with these fields."""
        def found():
            return [e for e in self.events if e["event"] == event and all(e.get(k) == v for k, v in fields.items())]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= n or self._process.poll() is not None, timeout)
        assert len(found()) >= n, f"no {event} {fields or ''} came after {self.events[-8:]}; {''.join(self._errors)[-2000:]}"
        return found()[n - 1]

    def focus(self, title: str = "Ask a document") -> str:
        """Its window of this title, which takes the keys from now on."""
        end = time.monotonic() + TIMEOUT
        while not (found := self.display.do("search", "--onlyvisible", "--name", title).split()):
            assert time.monotonic() < end and self._process.poll() is None, f"no window: {''.join(self._errors)}"
            time.sleep(0.05)
        self.display.do("windowfocus", "--sync", found[-1])
        return found[-1]

    def key(self, *names: str) -> None:
        self.display.do("key", *names)

    def type(self, text: str) -> None:
        self.display.do("type", "--delay", "4", text)

    def drag(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """With the left button, from here to there, in steps as a hand does it."""
        self.display.do("mousemove", *map(str, start), "mousedown", "1")
        for i in range(1, 13):
            self.display.do("mousemove", *(str(a + (b - a) * i // 12) for a, b in zip(start, end)))
            time.sleep(0.03)
        time.sleep(0.3)
        self.display.do("mouseup", "1")

    def click(self, x: int, y: int) -> None:
        self.display.do("mousemove", str(x), str(y), "click", "1")

    def quit(self) -> float:
        """Ctrl+Q, and the end of the process without a complaint; returns the seconds it took."""
        began = time.monotonic()
        self.key("ctrl+q")
        code = self._ended(TIMEOUT)  # far more than it takes: here a hang is told from a busy machine
        said = "".join(self._errors)
        assert code == 0, f"it ended with {signal.Signals(-code).name if code < 0 else code}: {said}"
        assert not re.search(r"Traceback|CRITICAL|Error|WARNING", said), said
        return time.monotonic() - began


@contextmanager
def starter(display: Display, command: list[str], **env: str) -> Iterator[Callable[..., App]]:
    """A function that starts an app with more arguments; those that it started are ended behind it."""
    apps: list[App] = []

    def start(*arguments: object) -> App:
        apps.append(App(display, [*command, *map(str, arguments)], **env))
        return apps[-1]

    yield start
    for app in apps:
        app.end()


def closed_in_a_prefill(start: Callable[..., App], *arguments: object) -> Iterator[App]:
    """Apps that were closed at random moments of the second after the first report of a prefill: 5 of them, or SFI_TEST_CLOSES."""
    rng = random.Random(SEED)
    for _ in range(int(os.environ.get("SFI_TEST_CLOSES", "5"))):
        app = start(*arguments)
        app.focus()
        total = app.wait("reading")["total"]
        time.sleep(rng.random())
        app.quit()
        assert app.all("reading")[-1]["done"] < total
        yield app


def text_of(path: Path, n: int) -> Path:
    """A file with n characters of Python's own reference."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics.values())[:n], encoding="utf-8")
    return path
