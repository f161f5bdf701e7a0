"""Start `sfi-local` the way users do, and read its refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def cli_command(*args) -> list[str]:
    return [sys.executable, "-m", "sfi_local", *map(str, args)]


def cli_env(**env: str) -> dict[str, str]:
    """The environment of a child process that runs the same sfi_local as this one."""
    import sfi_local

    return {**os.environ, "PYTHONPATH": str(Path(sfi_local.__file__).parents[1]), **env}


def interrupted(command: list[str], sign: bytes, cwd: Path) -> tuple[int, bytes]:
    """(exit code, stdout) of a command that gets Ctrl-C a moment after a line of its stderr has had the sign."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli_env(), cwd=cwd)
    while sign not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def sentence(process: subprocess.CompletedProcess, code: int = 1) -> str:
    """The one sentence of a refusal: right exit code, nothing on stdout, no traceback, no abort."""
    text = process.stderr.decode()
    assert process.returncode == code, text
    assert process.stdout == b""
    assert "Traceback" not in text and "GGML_ASSERT" not in text
    line = text.strip().splitlines()[-1]
    assert line.endswith(".") or code == 2
    return line
