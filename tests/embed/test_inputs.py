"""What programs, systems and people do to an embedded library: a sentence or the same tokens, never a crash or a hang."""

import re
import shutil
from pathlib import Path

import pytest
from support.embedding import compiled, run, tool, tree


@pytest.fixture(scope="module")
def prefix(native):
    return tree()


@pytest.fixture(scope="module")
def program(prefix, tmp_path_factory):
    return compiled(prefix, Path(__file__).with_name("inputs.c"), "-lpthread", out=tmp_path_factory.mktemp("inputs") / "inputs")


@pytest.fixture(scope="module")
def tokens(program, smollm2):
    done = run(program, "plainly", smollm2)
    assert done.returncode == 0 and len(done.stdout.split()) == 12
    return done.stdout


@pytest.mark.parametrize("what", ["threads", "fork", "signals", "version"])
def test_what_a_program_does(program, smollm2, what):
    done = run(program, what, smollm2)
    assert done.returncode == 0, done.stdout


def test_a_library_that_is_too_old_is_named(program, smollm2):
    assert "built for version 0.1.1 of libsfi and runs on 0.1.0: install" in run(program, "version", smollm2).stdout


def test_a_handler_may_exit_while_threads_compute(program, smollm2):
    assert run(program, "exit", smollm2, timeout=60).returncode == 7


def test_little_memory_is_a_sentence(program, smollm2):
    done = run(program, "memory", smollm2)
    assert done.returncode == 0 and "no context was made" in done.stdout, done.stdout


def test_a_cancel_from_another_thread_ends_a_prefill_at_once(program, smollm2):
    done = run(program, "cancel", smollm2, "3000", "0.2")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"within (\d+) ms", done.stdout)[1]) < 2000  # 20 on a machine that has nothing else to do


def test_a_cancel_from_another_thread_ends_a_step_before_it_is_done(program, smollm2):
    """And the same step is then taken as if nothing had been. Medians: a busy machine may stop either thread for a while."""
    done = run(program, "cancel-steps", smollm2, "1000")
    assert done.returncode == 0, done.stdout
    stopped, step = re.search(r"([\d.]+) ms after the cancel in the median.*a step takes ([\d.]+)", done.stdout).groups()
    assert float(stopped) < float(step), done.stdout


def test_no_home_no_environment_and_nothing_to_write_to(program, smollm2, tokens):
    done = run(tool("env"), "-i", program, "plainly", smollm2, cwd=Path("/proc"))
    assert done.returncode == 0 and done.stdout == tokens


def test_a_decimal_comma(program, smollm2, tmp_path):
    define = shutil.which("localedef")
    made = define and run(define, "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8").returncode == 0
    if not made:
        pytest.skip("the system's definitions of locales are not installed")
    done = run(program, "comma", smollm2, LOCPATH=str(tmp_path), LC_ALL="de_DE.UTF-8")
    assert done.returncode == 0, done.stdout


def test_a_cpu_that_lacks_a_feature_is_told_so(prefix, program, smollm2):
    """Nehalem is of 2008: a build for one machine refuses, and a portable one runs."""
    qemu = tool("qemu-x86_64")
    done = run(qemu, "-cpu", "Nehalem", program, "plainly", smollm2, timeout=500)
    if "for any" in (prefix / "README.md").read_text(encoding="utf-8"):
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 3 and re.search(r"built for a CPU with .*avx.*lacks: use a portable build", done.stdout), done.stdout + done.stderr
