"""A system with nothing of one's own: no environment, no home, no folder in which anything can be written."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a file system that nobody can write to")
@pytest.mark.parametrize("command", [["run", "-p", "one two three " * 90, "-n", "2", "--mode", "sfi"], ["doctor"]])
def test_it_answers_where_it_can_write_nothing(tiny, command):
    model = [str(tiny)] if command[0] == "run" else []
    done = subprocess.run([sys.executable, "-m", "sfi_local", command[0], *model, *command[1:]], cwd="/proc", capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "HOME": "/proc/none"}, timeout=240)
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr, done.stderr
    assert not Path("/proc/none").exists()
