"""What compares two machines' tokens, and what makes wheels: refusals, and a tie that is told from a fault."""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
OTHER = "aarch64" if platform.machine() != "aarch64" else "x86_64"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


greedy = module(NATIVE / "tests" / "greedy.py")
REFERENCE = {"text": " a cat.", "pieces": [" a", " cat", "."], "gaps": [3.0, 0.02, 3.0]}


@pytest.mark.parametrize("other, said", [
    (" a cat.\n", "the same 3 tokens"), (json.dumps({"text": " a"}), "the same 1 tokens"),
    (" a dog.\n", "the same 1 tokens, then a tie: ' cat' is 0.020 nats before the next likely one here")])
def test_the_same_tokens_or_a_tie(other, said):
    assert greedy.compare(REFERENCE, other) == said


@pytest.mark.parametrize("other", [" the cat.\n", " a cat!\n"])
def test_another_token_that_is_no_tie_is_a_fault(other):
    with pytest.raises(SystemExit, match="differs: .* 3.000 nats before the next one"):
        greedy.compare(REFERENCE, other)


@pytest.mark.skipif(sys.platform != "linux", reason="wheels.py is for Linux")
def test_a_wheel_for_another_machine_is_not_run_here(tmp_path):
    done = subprocess.run([sys.executable, NATIVE / "wheels.py", "--arch", OTHER, "--check", "m", "--out", tmp_path / "dist"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "can be checked there alone" in done.stderr and not (tmp_path / "dist").exists()
