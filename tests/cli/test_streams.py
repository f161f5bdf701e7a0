"""The command line without standard streams, and where their encoding lacks the characters."""

import subprocess

import pytest
from support.command_line import cli_command, cli_env

COMMAND = ("run", "-p", "Hi", "-n", "6", "--temp", "0", "-t", "1", "--raw")


def run(tiny, tail, cwd, **env):
    """The command in a shell, which closes or redirects streams as the tail says."""
    command = [*cli_command(COMMAND[0], tiny, *COMMAND[1:])]
    return subprocess.run(["sh", "-c", f'"$@" {tail}', "sh", *command], capture_output=True, cwd=cwd, env=cli_env(**env), timeout=120)


@pytest.mark.parametrize("tail", [">&-", "2>&-", "<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tiny, tmp_path, tail):
    done = run(tiny, tail, tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["latin1", "ascii", "cp1252", "utf-16"])
def test_what_is_redirected_is_utf_8_whatever_the_locale(tiny, tmp_path, encoding):
    expected = run(tiny, "", tmp_path, PYTHONUTF8="1", PYTHONIOENCODING="utf-8")
    done = run(tiny, "", tmp_path, PYTHONUTF8="0", PYTHONIOENCODING=encoding)
    assert done.stdout == expected.stdout and done.returncode == 0 and any(byte > 127 for byte in done.stdout)


def test_a_number_beyond_32_bits_is_refused_with_a_sentence(cli, tiny):
    done = cli("run", tiny, "-p", "Hi", "--n-selected", 99999999999)
    assert done.returncode in (1, 2) and b"Traceback" not in done.stderr and b"99999999999" in done.stderr
