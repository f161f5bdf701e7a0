"""A text that was read once is not read again: not in this process, not in the next. Counted in tokens that were decoded."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from support.command_line import cli_env

import sfi_local
from sfi_local.binding import context as native_context
from sfi_local.binding.state import checksum
from sfi_local.runtime.recent import Recent, Text
from sfi_local.store import prefixes

N = 900
TEXT = ("It was a dark night, and rain fell. " * 40)[:N]
GREEDY = sfi_local.Sampling(temp=0)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "1e9")
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefixes"


@contextmanager
def counted(model):
    """[tokens that were decoded for prompts]"""
    found, real = [0], native_context.decode

    def decode(context, tokens):
        found[0] += len(tokens)
        return real(context, tokens)
    with patch.object(native_context, "decode", decode):
        yield found
    if model.slot.engine:
        found[0] = model.slot.engine.stats().n_prefill


def answered(model, prompt, n=12):
    """(text, logits after it, tokens decoded for the prompt, kinds of the steps)"""
    with counted(model) as found:
        steps = list(model.complete(prompt, n=n, sampling=GREEDY))
    if not model.slot.engine:
        found[0] -= len(steps) - 1
    logits = native_context.logits(model.slot.context, -1).copy()
    return [step.token for step in steps], logits, found[0], [(step.kind, step.reason) for step in steps[1:]]


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("mode", ["stock", "dense", "sfi", "exact"])
def test_a_second_question_reads_what_is_new_and_is_answered_as_in_the_first_process(tiny, mode, kv):
    """Bit for bit: a model that was never closed, and one of another size that finds the text on the disk."""
    with sfi_local.load(tiny, mode=mode, type_k=kv, type_v=kv, n_threads=1, n_ctx=1280) as first:
        assert answered(first, TEXT + "What?")[2] == N + 5
        expected = answered(first, TEXT + "Who was it?")
        assert expected[2] == 9 and first.stats().cached_from == "memory"
        first.slot.keep(wait=True)
        prefixes.clear()
        answered(first, TEXT + "What?")
        first.slot.keep(wait=True)
    with sfi_local.load(tiny, mode=mode, type_k=kv, type_v=kv, n_threads=1, n_ctx=2048) as other:
        found = answered(other, TEXT + "Who was it?")
        assert other.stats().cached_from == "disk" and not other.notes
    assert found[2] == 9 and found[0] == expected[0] and found[3] == expected[3] and np.array_equal(found[1], expected[1])
    assert mode != "sfi" or all(kind == "fast" for kind, _ in found[3])


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_conversations_that_take_turns_are_not_read_again(tiny, where, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_MEMORY", "1e9" if where == "memory" else "0")
    with sfi_local.load(tiny, mode="sfi", n_threads=1, n_ctx=2048) as model:
        one, two = model.chat(TEXT, sampling=GREEDY, n=8), model.chat(TEXT[::-1], sampling=GREEDY, n=8)
        for talk, question in ((one, "A?"), (two, "B?")):
            list(talk.ask(question))
            assert model.stats().cached_from in (None, "memory")
        for talk, question in ((one, "C?"), (two, "D?"), (one, "E?")):
            with counted(model) as found:
                list(talk.ask(question))
            assert model.stats().cached_from == where and found[0] < 60


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("mode", ["stock", "dense", "sfi", "exact"])
def test_a_text_that_was_put_aside_in_memory_goes_on_bit_for_bit(tiny, mode, kv):
    with sfi_local.load(tiny, mode=mode, type_k=kv, type_v=kv, n_threads=1, n_ctx=1280) as model:
        answered(model, TEXT + "What?")
        expected = answered(model, TEXT + "Who was it?")
        answered(model, TEXT + "What?")
        prefixes.clear()
        assert answered(model, TEXT[::-1])[2] == N
        prefixes.clear()
        found = answered(model, TEXT + "Who was it?")
        assert model.stats().cached_from == "memory"
    assert found[2] == 9 and found[0] == expected[0] and found[3] == expected[3] and np.array_equal(found[1], expected[1])
    assert mode != "sfi" or all(kind == "fast" for kind, _ in found[3])


def test_memory_keeps_to_its_budget_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_MEMORY", "250")
    recent, texts = Recent(), [Text([i] * 600, bytes(90), bytes(10), [], 0) for i in range(4)]
    for text in texts[:2]:
        recent.put(text)
    assert recent.find([0] * 700) == (600, texts[0])  # used: the other goes
    recent.put(texts[2])
    assert recent.find([1] * 700) == (0, None) and recent.find([0, 0, 9]) == (2, texts[0])
    longer = Text([2] * 700, bytes(100), b"", [], 0)
    recent.put(longer)  # in the place of what it begins with
    assert recent.find([2] * 650) == (650, longer) and recent.find([0])[0] == 1
    recent.put(Text([5], bytes(251), b"", [], 0))
    assert recent.find([5]) == (0, None) and not recent.room_for(251) and recent.room_for(250)


def test_a_context_that_grows_reads_nothing_again(tiny):
    from sfi_local.runtime import model as runtime_model

    with patch.multiple(runtime_model, FIRST_CTX=1024, ROOMY_CTX=1024), sfi_local.load(tiny, mode="sfi", n_threads=1, cache=False) as model:
        answered(model, TEXT, n=8)
        before = model.slot.n_ctx
        _, _, n_read, kinds = answered(model, TEXT + TEXT[:700], n=8)
        assert model.slot.n_ctx > before and n_read == 701 or n_read == 700
        assert all(kind == "fast" for kind, _ in kinds)
        with patch.object(model.slot, "n_limit", 8192):
            model.slot.grow(4096)
            assert model.slot.step(65).kind == "fast"


def test_without_the_store_nothing_is_kept(tiny, store, monkeypatch):
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280, cache=False) as model:
        answered(model, TEXT)
    assert not store.exists()
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "0")
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        answered(model, TEXT)
    assert not store.exists()


def test_another_kv_type_or_model_is_read_anew(tiny, tmp_path):
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        answered(model, TEXT)
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280, type_k="q8_0", type_v="q8_0") as model:
        assert answered(model, TEXT)[2] == N
        assert model.stats().why_read == "it was read with K as f16 and V as f16, and this is K as q8_0 and V as q8_0"
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(tiny.read_bytes())
    with sfi_local.load(moved, n_threads=1, n_ctx=1280) as model:
        assert answered(model, TEXT)[2] == 1 and model.stats().cached_from == "disk"
    changed = bytearray(tiny.read_bytes())
    changed[-1] ^= 1
    moved.write_bytes(changed)
    with sfi_local.load(moved, n_threads=1, n_ctx=1280) as model:
        assert answered(model, TEXT)[2] == N


def test_a_disk_that_refuses_is_one_sentence_and_the_answer_comes(tiny, store):
    store.parent.mkdir()
    store.write_text("in the way")
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        for question in ("What?", "Who?"):
            tokens, _, _, _ = answered(model, TEXT + question)
            assert len(tokens) == 12
        model.slot.keep(wait=True)
        assert sum("not kept" in note for note in model.notes) == 1


def test_what_was_read_before_it_was_stopped_is_kept(tiny):
    def stop(done, total):
        if done >= 512:
            raise KeyboardInterrupt

    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        with pytest.raises(KeyboardInterrupt):
            next(model.complete(TEXT, n=1, progress=stop))
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        assert answered(model, TEXT)[2] == N - 512


RUN = "import sys; from sfi_local.cli.main import main; sys.exit(main())"


def run(tiny, store, *words):
    env = cli_env(SFI_LOCAL_CACHE=str(store.parent), SFI_LOCAL_PREFIX_BUDGET="1e9")
    return subprocess.run([sys.executable, "-m", "sfi_local", *map(str, words)], env=env, capture_output=True, text=True, timeout=120)


def test_the_command_line_says_what_it_did(tiny, store, tmp_path):
    (tmp_path / "story.txt").write_text(TEXT)
    ask = ("run", tiny, "-f", tmp_path / "story.txt", "-t", 1, "-n", 4, "--temp", 0, "--json", "-p")
    first, second, third = (json.loads(run(tiny, store, *ask, *more).stdout) for more in (["What?"], ["Who was it?"], ["Who was it?", "--no-cache"]))
    assert (first["n_cached"], first["cached_from"]) == (0, None)
    assert second["n_cached"] >= N and second["cached_from"] == "disk"
    assert re.fullmatch(r"what is kept differs from token \d+ on \('\w+' there, '\w+' here\)", second["why_read"])
    assert (third["n_cached"], third["cached_from"]) == (0, None)
    assert "from disk)" in run(tiny, store, *(word for word in ask if word != "--json"), "Who?").stderr

    listed = json.loads(run(tiny, store, "cache", "list", "--json").stdout)
    assert set(listed[0]) >= {"id", "model", "n_tokens", "bytes", "last_used"} and "dark night" in listed[0]["text"]
    assert "dark night" in run(tiny, store, "cache", "list").stdout
    done = run(tiny, store, "cache", "verify")
    assert done.returncode == 0 and ", 0 not." in done.stderr
    assert "Removed 1 text." in run(tiny, store, "cache", "rm", listed[0]["id"]).stderr
    assert run(tiny, store, "cache", "rm", "nothing").returncode == 1
    for path in (store).glob("*/entries/*"):
        path.write_bytes(path.read_bytes()[:-9])
    assert run(tiny, store, "cache", "verify").returncode == 1
    assert "Removed" in run(tiny, store, "cache", "clear").stderr and not store.exists()


def test_what_was_warmed_is_there(tiny, store, tmp_path):
    (tmp_path / "story.txt").write_text(TEXT)
    done = run(tiny, store, "cache", "warm", tiny, "-f", tmp_path / "story.txt", "-t", 1)
    assert done.returncode == 0 and "were read now" in done.stderr
    again = run(tiny, store, "cache", "warm", tiny, "-f", tmp_path / "story.txt", "-t", 1)
    assert "of which 1 were read now" in again.stderr
    asked = json.loads(run(tiny, store, "run", tiny, "-f", tmp_path / "story.txt", "-t", 1, "-n", 2, "--json", "-p", "Who?").stdout)
    assert asked["n_cached"] > N and asked["cached_from"] == "disk"
    assert run(tiny, store, "cache", "warm", tiny, "-f", tmp_path / "none.txt").returncode == 1


KILLED = """
import os, signal, sys, random, sfi_local
from sfi_local.store import prefix_files
left = [int(sys.argv[2])]
real = os.write
def kill(file, data, real=prefix_files._write_all):
    left[0] -= len(data)
    if left[0] < 0:
        file.write(data[:max(0, len(data) + left[0])])
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, data)
prefix_files._write_all = kill
with sfi_local.load(sys.argv[1], n_threads=1, n_ctx=1280) as model:
    list(model.complete(sys.argv[3], n=4))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_half(tiny, store):
    """After so many bytes: in the heads, in the rows, between two files."""
    env = cli_env(SFI_LOCAL_CACHE=str(store.parent), SFI_LOCAL_PREFIX_BUDGET="1e9")
    for n_bytes in (10, 1000, 200_000, 900_000):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tiny), str(n_bytes), TEXT], env=env, timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert prefixes.verify(checksum)[1] == []
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        assert answered(model, TEXT)[2] == N and not model.notes
    with sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        assert answered(model, TEXT)[2] == 1
        model.slot.keep(wait=True)
    assert not list(store.rglob(".*.part"))


def test_the_writer_does_not_hold_up_the_answer(tiny):
    """Rows are taken while the disk is slow, up to what may wait."""
    from sfi_local.store import prefix_files

    def slow(file, data, real=prefix_files._write_all):
        time.sleep(0.05)
        real(file, data)

    with patch.object(prefix_files, "_write_all", slow), sfi_local.load(tiny, n_threads=1, n_ctx=1280) as model:
        steps = model.complete(TEXT, n=3)
        next(steps)
        start = time.monotonic()
        next(steps)
        assert time.monotonic() - start < 0.5  # three files of four parts take longer
        list(steps)
        model.slot.keep(wait=True)
    assert os.listdir(prefixes.folder())
