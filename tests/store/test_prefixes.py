"""The prefix store by itself: what was put in comes out bit for bit or not at all, whatever happens to its files."""

import errno
import json
import os
import random
import re
import signal
import sys
import threading
import time
import zlib
from array import array
from pathlib import Path

import pytest
from support.tiny_model import SEED

from sfi_local.store import prefix_files, prefixes
from sfi_local.store.prefix_files import BLOCK
from sfi_local.store.prefixes import Prefixes, common

MODEL, ROW = "f" * 32, 8
CHECKSUM = zlib.crc32


def row(tokens, i):
    """K and V of a token, which depend on all before it."""
    return zlib.crc32(array("i", tokens[:i + 1]).tobytes()).to_bytes(ROW, "little")


def rows_from(tokens, n_blocks):
    for first in range(n_blocks * BLOCK, len(tokens) + 1, BLOCK):
        yield bytearray(b"".join(row(tokens, i) for i in range(first, min(first + BLOCK, len(tokens)))))


@pytest.fixture
def open_store(tmp_path):
    """(a store, the sentences that it said)"""
    def make(**changes):
        said = []
        return Prefixes(changes.get("fingerprint", MODEL), CHECKSUM, said.append, changes.get("root", tmp_path / "prefixes")), said
    return make


@pytest.fixture(autouse=True)
def roomy(monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "1e9")


def text_of(n, seed=SEED):
    draw = random.Random(seed)
    return [draw.randrange(50000) for _ in range(n)]


def put(store, tokens, blocks=(), state=b"state"):
    return store.save(tokens, blocks, rows_from(tokens, len(blocks)), state, "a model", "Once upon a time", ROW * len(tokens))


def got(store, tokens):
    """(tokens that were given, the state), their rows being what they must be."""
    found, there = store.find(tokens), []
    if found is None:
        return 0, b""

    def add(new, rows, n_rows):
        assert len(rows) == n_rows * ROW >= ROW * len(new)
        for i, token in enumerate(new):
            there.append(token)
            assert bytes(rows[i * ROW:(i + 1) * ROW]) == row(there, len(there) - 1), "another row"
    n, state = store.fetch(found, add, ROW)
    assert there == list(tokens[:n])
    return n, bytes(state)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_what_was_kept_is_there_for_another_process(open_store, n):
    tokens = text_of(n)
    assert len(put(open_store()[0], tokens)) == n // BLOCK
    store, said = open_store()
    assert got(store, tokens) == (n, b"state") and not said
    assert prefixes.size_of(store.root) <= ROW * n + 8 * n + 600 * (1 + n // BLOCK)


@pytest.mark.parametrize("n", [1, 100, 256, 300, 511, 512, 513, 699])
def test_every_text_gets_as_many_tokens_as_it_shares(open_store, n):
    tokens, (store, _) = text_of(700), open_store()
    put(store, tokens)
    assert got(store, [*tokens[:n], -1, *tokens[n:]])[0] == n


def test_a_text_that_goes_on_adds_blocks_and_rewrites_none(open_store):
    tokens, (store, _) = text_of(1500), open_store()
    first = put(store, tokens[:700])
    before = {path.name: path.stat().st_mtime_ns for path in store._blocks.iterdir()}
    names = put(store, tokens, first)
    assert names[:2] == first and len(names) == 5
    assert {name: (store._blocks / name).stat().st_mtime_ns for name in before} == before
    assert [row["n_tokens"] for row in prefixes.rows(CHECKSUM, store.root)] == [1500]  # the shorter one is of no more use
    assert got(store, tokens) == (1500, b"state")


def test_two_texts_share_the_blocks_that_they_share(open_store):
    one, (store, _) = text_of(1000), open_store()
    other = [*one[:600], *text_of(400, SEED + 1)]
    put(store, one), put(store, other)
    assert len(list(store._blocks.iterdir())) == 3 + 1
    assert got(store, one) == (1000, b"state") and got(store, other) == (1000, b"state")


def test_a_name_that_two_blocks_have_is_found_out_by_their_tokens(open_store, monkeypatch):
    """A forced collision of the hash: neither text is given the rows of the other."""
    monkeypatch.setattr(prefix_files.BlockHead, "name", property(lambda head: "0" * 32))
    one, other, (store, said) = text_of(512), text_of(512, SEED + 1), open_store()
    put(store, one), put(store, other)
    assert got(store, other)[0] in (0, 256) and got(store, one)[0] in (0, 256)  # or the assertions on rows
    assert len(said) == 1


def family(n_texts, seed=SEED):
    """Texts of which each goes on like an earlier one for a while."""
    draw, texts = random.Random(seed), [text_of(700, seed)]
    while len(texts) < n_texts:
        old = draw.choice(texts)
        n = draw.choice([0, 10, 63, 64, 65, 127, 128, 200, 256, 300, 511, 512, 600])
        texts.append([*old[:n], *(draw.randrange(50000) for _ in range(draw.randrange(1, 700)))])
    return texts


@pytest.mark.parametrize("index", ["there", "gone", "damaged", "cut"])
def test_the_best_of_many_entries_is_found_whatever_the_index_holds(open_store, index):
    store, texts = open_store()[0], family(40)
    for tokens in texts:
        put(store, tokens)
    path = store.root / MODEL / "index"
    if index == "gone":
        path.unlink()
    elif index != "there":
        data = path.read_bytes()
        path.write_bytes(data[:len(data) // 2 - 7] if index == "cut" else bytes(reversed(data)))
    store, said = open_store()
    for tokens in [*texts, *family(20, SEED + 5), *([*t[:n], -1] for t in texts[:9] for n in (64, 100, 255, 400))]:
        best = max(common(tokens, other) for other in texts)
        found = store.find(tokens, 64)
        assert (found.n if found else 0) == (best if best >= 64 else 0)
    assert not said


def test_of_many_entries_few_are_read(open_store, monkeypatch):
    store, looked = open_store()[0], []
    monkeypatch.setattr(Prefixes, "_drop_covered", lambda *_: None)
    monkeypatch.setattr(prefixes, "collect", lambda *_: None)
    texts = [text_of(70, seed) for seed in range(300)]
    for tokens in texts:
        put(store, tokens)
    real = Prefixes._look
    monkeypatch.setattr(Prefixes, "_look", lambda *args: looked.append(args) or real(*args))
    assert store.find(texts[123], 64).n == 70 and len(looked) == 1
    assert store.find(text_of(600, 999), 64) is None and len(looked) == 1


def test_the_index_forgets_what_is_gone(open_store):
    store, _ = open_store()
    for seed in range(50):
        put(store, text_of(70, seed))
        for path in store._entries.iterdir():
            path.unlink()
    put(store, text_of(70, 99))
    assert (store.root / MODEL / "index").stat().st_size < 30 * 176


def test_why_a_text_is_read_again_is_known(open_store):
    tokens = text_of(600)
    open_store()[0].save(tokens, (), rows_from(tokens, 0), b"", "a model", "Once", 0, "K as f16 and V as f16")
    store, said = open_store(fingerprint="a" * 32)
    assert store.find(tokens) is None and store.find_elsewhere(tokens, 512).settings == "K as f16 and V as f16"
    assert store.find_elsewhere(tokens[:500], 512) is None and store.find_elsewhere(text_of(600, 1), 512) is None and not said


def test_another_model_finds_nothing(open_store):
    put(open_store()[0], text_of(600))
    store, said = open_store(fingerprint="a" * 32)
    assert store.find(text_of(600)) is None and not said


def test_the_store_keeps_to_its_budget_and_evicts_what_was_not_used_for_longest(open_store, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "30000")
    store, said = open_store()
    texts = [text_of(600, seed) for seed in range(5)]  # 4800 bytes of rows, 2400 of tokens twice
    for i, tokens in enumerate(texts):
        put(store, tokens)
        for path in store._entries.iterdir():
            os.utime(path, (i, i)) if path.stat().st_mtime > 1000 else None
        got(store, texts[0])
    assert got(store, texts[0])[0] == 600 and got(store, texts[4])[0] == 600 and got(store, texts[1])[0] == 0
    assert prefixes.size_of(store.root) <= 30000 and not said
    put(store, text_of(9000))
    assert len(said) == 1 and "may take 30.0 kB" in said[0]


@pytest.mark.parametrize("at", range(6))
def test_a_full_disk_is_one_sentence_and_no_file_is_left_half(open_store, monkeypatch, at):
    real, left = prefix_files._write_all, [at]

    def write(file, data):
        left[0] -= 1
        if left[0] < 0:
            file.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)
    monkeypatch.setattr(prefix_files, "_write_all", write)
    store, said = open_store()
    assert put(store, text_of(600)) is None and len(said) == 1 and "is full" in said[0]
    assert put(store, text_of(600)) is None and len(said) == 1
    monkeypatch.setattr(prefix_files, "_write_all", real)
    assert got(store, text_of(600)) == (0, b"") and not list(store.root.rglob(".*.part"))
    assert len(put(store, text_of(600))) == 2 and got(store, text_of(600))[0] == 600


def test_a_folder_that_cannot_be_written_is_one_sentence(open_store, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store, said = open_store(root=tmp_path / "file" / "prefixes")
    assert put(store, text_of(600)) is None and store.find(text_of(600)) is None
    assert len(said) == 1 and "cannot be written" in said[0]


def test_a_folder_that_was_deleted_meanwhile_is_a_miss(open_store):
    store, said = open_store()
    names = put(store, text_of(600))
    found = store.find(text_of(600))
    prefixes.clear(store.root)
    assert store.fetch(found, lambda *_: pytest.fail("nothing is there"), ROW)[0] == 0
    assert put(store, text_of(900), names) is None  # its first blocks are gone
    assert len(put(store, text_of(900))) == 3 and got(store, text_of(900))[0] == 900 and not said


def test_a_file_of_a_newer_version_is_a_miss_with_a_sentence_and_stays(open_store, monkeypatch):
    store, _ = open_store()
    monkeypatch.setattr(prefix_files, "VERSION", prefix_files.VERSION + 1)
    put(store, text_of(600))
    monkeypatch.undo()
    store, said = open_store()
    assert got(store, text_of(600)) == (0, b"") and len(said) == 1 and "newer version" in said[0]
    assert len(list(store._entries.iterdir())) == 1


def test_writers_take_turns(open_store):
    texts = [text_of(700, seed) for seed in range(6)]
    threads = [threading.Thread(target=put, args=(open_store()[0], tokens)) for tokens in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got(open_store()[0], tokens) == (700, b"state") for tokens in texts)


def test_everything_is_private(open_store):
    store, _ = open_store()
    put(store, text_of(600))
    assert store.root.stat().st_mode & 0o77 == 0
    assert all(path.stat().st_mode & 0o77 == 0 for path in store.root.rglob("*") if path.is_file())


def test_what_is_kept_can_be_listed_checked_and_removed(open_store):
    store, _ = open_store()
    put(store, text_of(600)), put(store, text_of(300, 1))
    kept = prefixes.rows(CHECKSUM, store.root)
    assert {row["n_tokens"] for row in kept} == {300, 600} and kept[0]["text"] == "Once upon a time"
    assert prefixes.verify(CHECKSUM, store.root) == (2 + 1 + 2, [])
    long = next(row for row in kept if row["n_tokens"] == 600)
    assert prefixes.remove([long["id"]], CHECKSUM, store.root) == [long["id"]]
    assert got(store, text_of(600))[0] == 0 and got(store, text_of(300, 1))[0] == 300
    assert len(list(store._blocks.iterdir())) == 1
    assert prefixes.clear(store.root) > 0 and not store.root.exists()


# ---- files that were changed ---------------------------------------------------------------------------------------------

CORPUS = Path(__file__).with_name("prefix_corpus.jsonl")  # changes that once had an outcome of their own; SFI_FUZZ_ADD=1 adds to it


def drawn(files, draw):
    """A change: [which file, what is done to it, where, with what]."""
    which = draw.randrange(len(files))
    size = len(files[which])
    at = draw.randrange(size) if draw.random() < 0.5 else draw.randrange(min(size, 700))
    kind = draw.choice(("flip", "cut", "swap", "insert", "huge", "other"))
    argument = {"flip": lambda: draw.randrange(8), "cut": lambda: 0, "swap": lambda: [draw.randrange(size), draw.randrange(1, 64)],
                "insert": lambda: draw.randbytes(draw.randrange(1, 9)).hex(), "huge": lambda: draw.choice((1, 4, 8)),
                "other": lambda: draw.randrange(len(files))}[kind]()
    return [which, kind, at, argument]


def changed(files, change):
    which, kind, at, argument = change
    data = bytearray(files[which])
    at %= len(data)
    if kind == "flip":
        data[at] ^= 1 << argument
    elif kind == "cut":
        del data[at:]
    elif kind == "swap":
        other, n = argument[0] % len(data), argument[1]
        data[at:at + n], data[other:other + n] = data[other:other + n], data[at:at + n]
    elif kind == "insert":
        data[at:at] = bytes.fromhex(argument)
    elif kind == "huge":
        data[at:at + argument] = b"\xfe" * argument
    else:
        data = files[argument % len(files)]
    return bytes(data)


@pytest.fixture
def fuzzed(open_store):
    """try_it(change) -> what came of it: (tokens that were given of two texts, the kind of sentence); asserts that every row is right"""
    one, other, (store, _) = text_of(600, 1), text_of(520, 2), open_store()
    put(store, one), put(store, other)
    paths = sorted((path for path in store.root.rglob("*") if path.is_file() and path.name != "lock"), key=lambda path: path.stat().st_mtime_ns)
    files = [path.read_bytes() for path in paths]
    expected = {id(tokens): b"".join(row(tokens, i) for i in range(len(tokens))) for tokens in (one, other)}

    def given(store, tokens):
        """How many tokens were given, all with their own rows."""
        found, at = store.find(tokens), [0]
        if found is None:
            return 0

        def add(new, rows, n_rows):
            begin, at[0] = at[0], at[0] + len(new)
            assert list(new) == tokens[begin:at[0]] and bytes(rows[:ROW * len(new)]) == expected[id(tokens)][ROW * begin:ROW * at[0]]
        n, _ = store.fetch(found, add, ROW)
        assert n == at[0]
        return n

    def try_it(change, check_all=False):
        paths[change[0]].write_bytes(changed(files, change))
        store, said = open_store()
        outcome = [given(store, one), given(store, other)]
        assert len(said) <= 1
        if check_all:
            prefixes.verify(CHECKSUM, store.root), prefixes.rows(CHECKSUM, store.root)
        for path, data in zip(paths, files):
            if check_all or path == paths[change[0]] or not path.exists():
                path.write_bytes(data)
        return *outcome, re.sub(r".*: (.*)\): .*", r"\1", said[0]) if said else ""
    try_it.files = files
    yield try_it
    assert got(open_store()[0], one) == (600, b"state")


def test_changes_that_once_mattered(fuzzed):
    changes = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    assert len({fuzzed(change, check_all=True) for change in changes}) > 10


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_a_file_makes_wrong_rows(fuzzed, seed):
    """A miss or a sentence, and never a wrong token. SFI_FUZZ_SECONDS runs it for longer, SFI_FUZZ_SEED elsewhere."""
    draw = random.Random(1000 * SEED + seed + int(os.environ.get("SFI_FUZZ_SEED", "0")))
    seen = {fuzzed(json.loads(line)) for line in CORPUS.read_text().splitlines()}
    until, n = time.monotonic() + float(os.environ.get("SFI_FUZZ_SECONDS", "40")) / 4, 0
    while time.monotonic() < until:
        change, n = drawn(fuzzed.files, draw), n + 1
        outcome = fuzzed(change, check_all=n % 50 == 0)
        if outcome not in seen and os.environ.get("SFI_FUZZ_ADD"):
            with open(CORPUS, "a", encoding="utf-8") as file:
                file.write(json.dumps(change) + "\n")
        seen.add(outcome)
    print(f"{n} changed files, {len(seen)} outcomes")
    assert n


# ---- what can happen to those who write ----------------------------------------------------------------------------------

def writer(store, seed):
    """What a process does that writes texts for ever."""
    for i in range(10**6):
        put(store, text_of(600, f"{seed} {i}"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_writers_that_are_killed_at_200_moments_leave_nothing_half(open_store):
    store, draw, n_whole = open_store()[0], random.Random(SEED), 0
    for i in range(200):
        writers = [fork_of(writer, store, number) for number in ([i] if i % 4 else [i, -i])]
        time.sleep(draw.random() * 0.02)
        for process in writers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        good, bad = prefixes.verify(CHECKSUM, store.root)
        assert bad == []
        n_whole += good
    store, said = open_store()
    assert n_whole and put(store, text_of(600)) and got(store, text_of(600)) == (600, b"state") and not said
    assert not list(store.root.rglob(".*.part"))


def fork_of(work, *arguments):
    process = os.fork()
    if process:
        return process
    try:
        work(*arguments)
    finally:
        os._exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of a process")
@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 5000])
def test_a_disk_that_takes_no_more_is_one_sentence(open_store, limit):
    import resource

    def work():
        store, said = open_store()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert put(store, text_of(900)) is None and put(store, text_of(900)) is None
        assert len(said) == 1 and "cannot be written (File too large)" in said[0]
        assert not list(store.root.rglob(".*.part"))
        os._exit(0)
    assert os.waitpid(fork_of(work), 0)[1] == 0
    assert len(put(open_store()[0], text_of(900))) == 3 and got(open_store()[0], text_of(900))[0] == 900


def test_a_store_that_may_only_be_read_is_read(open_store, monkeypatch):
    put(open_store()[0], text_of(600))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(prefixes, "write", refuse)
    store, said = open_store()
    assert got(store, text_of(600)) == (600, b"state") and not said
    assert put(store, text_of(600, 1)) is None and put(store, text_of(600, 2)) is None
    assert len(said) == 1 and "Read-only file system" in said[0]


@pytest.mark.parametrize("jump", [0, 1, 4e9, -1e6])
def test_a_clock_that_jumps_changes_no_more_than_the_order(open_store, monkeypatch, jump):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "30000")
    store, said = open_store()
    for seed in range(6):
        put(store, text_of(600, seed))
        for path in store.root.rglob("*"):
            if path.is_file():
                os.utime(path, (jump, jump))
    assert prefixes.size_of(store.root) <= 30000 and not said
    assert got(store, text_of(600, 5)) == (600, b"state") and len(prefixes.rows(CHECKSUM, store.root)) >= 1


def test_common_is_the_length_of_the_common_beginning():
    for n in (0, 1, 2, 63, 64, 65, 200):
        a = text_of(200)
        assert common(a, a[:n]) == n and common(a[:n], a) == n and common(a, [*a[:n], -1, *a[n + 1:]]) == n
