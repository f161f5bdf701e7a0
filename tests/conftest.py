"""Shared by the tests: the native library, a tiny seeded model, the real model if it was pulled, and the command line."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.command_line import cli_command, cli_env
from support.tiny_model import SEED, write_tiny

os.environ["SFI_LOCAL_PREFIX_BUDGET"] = "0"  # no test is served what another has read; those of the store set it
os.environ.setdefault("SFI_LOCAL_AUTO_DEPTH", "0")  # nothing is measured for auto, or written to the user's cache


# A shell starts background jobs deaf to Ctrl-C, and what they start inherits it; here Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"seed {SEED}"


@pytest.fixture(scope="session")
def native():
    """The native library; the test is skipped with the reason where there is none."""
    from sfi_local.binding.library import open_library
    from sfi_local.errors import LibraryError

    try:
        return open_library()
    except LibraryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, native) -> Path:
    """A llama with random weights: 4 layers, 4 heads, 2 KV heads, head size 32, one token per byte, ChatML."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm2(native) -> Path:
    """The real model, from the cache that `sfi-local pull` fills."""
    from sfi_local.catalogue import find

    entry = find("smollm2-135m")
    if not entry.fetched:
        pytest.skip(f"{entry.path} is not there: run `sfi-local pull smollm2-135m`")
    return entry.path


@pytest.fixture
def cli(tmp_path):
    """Run `sfi-local ARGS` in an empty directory; returns the finished process."""
    def run(*args, input: str | bytes = b"", **env: str) -> subprocess.CompletedProcess:
        data = input.encode() if isinstance(input, str) else input
        return subprocess.run(cli_command(*args), input=data, capture_output=True, cwd=tmp_path, env=cli_env(**env),
                              timeout=300)
    return run
