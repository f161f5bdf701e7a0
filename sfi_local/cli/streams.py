"""Standard streams that are there and take any text: of a daemon, a program without a console, a redirection, another locale."""

from __future__ import annotations

import os
import sys


def prepare() -> None:
    """Once, before anything is opened or written."""
    _occupy_descriptors()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            terminal = stream.isatty()  # which knows its own encoding; files and pipes are UTF-8
            stream.reconfigure(errors="replace", **({} if terminal else {"encoding": "utf-8"}))


def _occupy_descriptors() -> None:
    """Where one of 0, 1, 2 is closed, the next file that is opened would get it, and what native code prints."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return
        os.set_inheritable(fd, True)
