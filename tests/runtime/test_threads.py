"""Several threads on one model: a second one at every point of a generation, cancel and close from anywhere, forks."""

import os
import random
import subprocess
import sys
import threading
import time

import pytest
from support.command_line import cli_env

from sfi_local import Sampling, SfiParams, load
from sfi_local.errors import AbortedError, BusyError, DetachedError

pytestmark = pytest.mark.usefixtures("native")

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
SMALL = SfiParams.of("frozen", n_sink=4, n_recent=64, n_selected=600, max_span=12, auto_depth=1)
GREEDY = Sampling(temp=0)
N = 24


class OfLoad:
    """What load() gives."""

    def __init__(self, path, mode):
        self.model = load(path, mode=mode, n_ctx=1024, n_threads=1, params=SMALL)

    @property
    def slot(self):
        return self.model.slot

    def stream(self):
        for step in self.model.generate(PROMPT, n=N, sampling=GREEDY):
            yield step.token

    def tokenize(self):
        return self.model.tokenize("fox")


class OfLlama:
    """SlowFastLlama."""

    def __init__(self, path, mode):
        from sfi_local import SlowFastLlama

        self.model = SlowFastLlama(str(path), mode=mode, n_ctx=1024, n_threads=1, sfi_params=SMALL)

    @property
    def slot(self):
        return self.model._slot

    def stream(self):
        from llama_cpp import LlamaGrammar

        letters = LlamaGrammar.from_string(f"root ::= [a-z]{{{N}}}", verbose=False)  # llama-cpp-python streams whole characters
        for chunk in self.model.create_completion(PROMPT, max_tokens=N, temperature=0, stream=True, grammar=letters):
            yield chunk["choices"][0]["text"]

    def tokenize(self):
        return self.model.tokenize(b"fox")


FACES = {"load": OfLoad, "llama": OfLlama}
BOTH = [("load", "sfi"), ("load", "exact"), ("llama", "sfi"), ("llama", "stock")]


@pytest.fixture
def face(tiny, request):
    kind, mode = request.param
    one = FACES[kind](tiny, mode)
    yield one
    one.model.close()


both = pytest.mark.parametrize("face", BOTH, indirect=True, ids=["-".join(pair) for pair in BOTH])
POINTS = ("prefill", "first step", "later step", "between")


def drive(face, monkeypatch, point, act):
    """All that a stream gives, while act() is called once at a point of it: inside the slot, or between two items."""
    slot, calls = face.slot, {"prefill": 0, "step": 0}

    def hook(name):
        real = getattr(slot, name)

        def hooked(*args, **kwargs):
            kind = "prefill" if name == "_prefill" else "step"
            calls[kind] += 1
            if (point, calls[kind]) in (("prefill", 1), ("first step", 1), ("later step", 9)) and (kind == "prefill") == (point == "prefill"):
                act()
            return real(*args, **kwargs)
        monkeypatch.setattr(slot, name, hooked, raising=False)

    for name in ("_prefill", "_engine_step", "_stock_step"):
        hook(name)
    out = []
    for i, item in enumerate(face.stream()):
        out.append(item)
        if point == "between" and i == 3:
            act()
    return out


def in_thread(function):
    """What a function gives in another thread, or the exception it raises."""
    result = []

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert result, "the second thread hangs"
    return result[0]


# ---- a second thread -------------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("point", POINTS)
def test_a_second_generation_is_refused_and_changes_nothing(face, monkeypatch, point):
    alone, seen = list(face.stream()), []
    again = drive(face, monkeypatch, point, lambda: seen.append((in_thread(lambda: list(face.stream())), in_thread(face.tokenize))))
    assert again == alone and list(face.stream()) == alone
    assert isinstance(seen[0][0], BusyError) and seen[0][1] == face.tokenize()


def test_who_is_not_refused_gets_the_text_that_he_gets_alone(tiny):
    one = OfLlama(tiny, "sfi")
    alone, results = list(one.stream()), []

    def work():
        for _ in range(6):
            try:
                results.append(list(one.stream()))
            except BusyError:
                results.append("busy")
            time.sleep(random.Random(len(results)).random() / 100)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 24 and all(result in (alone, "busy") for result in results) and alone in results
    one.model.close()


@pytest.mark.parametrize("call", ["eval", "reset", "save_state", "load_state", "generate"])
def test_llama_s_other_uses_of_the_cache_are_refused_meanwhile(tiny, call):
    one = OfLlama(tiny, "sfi")
    alone, state = list(one.stream()), one.model.save_state()
    calls = {"eval": lambda: one.model.eval([65]), "reset": one.model.reset, "save_state": one.model.save_state,
             "load_state": lambda: one.model.load_state(state), "generate": lambda: list(one.model.generate([65, 66]))}
    stream = one.stream()
    begun = [next(stream)]
    assert isinstance(in_thread(calls[call]), BusyError)
    assert begun + list(stream) == alone
    one.model.close()


# ---- cancel ----------------------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("who", ["another thread", "itself"])
def test_cancel_ends_it_at_every_point_and_the_next_answer_is_whole(face, monkeypatch, point, who):
    alone = list(face.stream())
    cancel = (lambda: in_thread(face.model.cancel)) if who == "another thread" else face.model.cancel
    face.slot.cut(0)
    with monkeypatch.context() as patch, pytest.raises(AbortedError, match="cancelled"):
        drive(face, patch, point, cancel)
    assert list(face.stream()) == alone or face.slot.mode.name == "sfi"  # whose support may come from other queries now
    face.slot.cut(0)
    assert list(face.stream()) == alone


@both
def test_cancel_does_nothing_where_nothing_is_generated(face):
    alone = list(face.stream())
    face.model.cancel()
    face.slot.cut(0)
    assert list(face.stream()) == alone


@pytest.mark.parametrize("mode", ["sfi", "stock"])
def test_a_single_batch_of_prefill_is_ended_between_two_operations(tiny, mode, monkeypatch):
    """Its one llama_decode would end well by itself."""
    with load(tiny, mode=mode, n_threads=1, params=SMALL) as model:
        real = model.slot._prefill
        monkeypatch.setattr(model.slot, "_prefill", lambda *args: (model.cancel(), real(*args))[1])
        with pytest.raises(AbortedError):
            list(model.generate([65] * 400, n=2, sampling=GREEDY))
        assert model.slot.tokens == []


@pytest.mark.parametrize("kind", FACES)
def test_cancel_at_any_moment(tiny, kind):
    one, rng = FACES[kind](tiny, "dense"), random.Random(7)
    alone, start = list(one.stream()), time.perf_counter()
    one.slot.cut(0)
    list(one.stream())
    whole = time.perf_counter() - start
    for _ in range(25):
        one.slot.cut(0)
        timer = threading.Timer(rng.random() * whole, one.model.cancel)
        timer.start()
        try:
            assert list(one.stream()) == alone
        except AbortedError:
            pass
        timer.join()
        assert list(one.stream()) == alone
    one.model.close()


# ---- close -----------------------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("point", POINTS)
def test_close_ends_it_at_every_point(face, monkeypatch, point):
    closers = []

    def close():
        closers.append(threading.Thread(target=face.model.close))
        closers[0].start()
        while not face.slot.access.closed:
            time.sleep(0.001)

    with pytest.raises(DetachedError, match="closed"):
        drive(face, monkeypatch, point, close)
    closers[0].join(60)
    assert not closers[0].is_alive() and face.slot.context is None
    with pytest.raises(DetachedError):
        face.tokenize()


@both
def test_close_from_the_generation_itself(face, monkeypatch):
    with pytest.raises(DetachedError):
        drive(face, monkeypatch, "later step", face.model.close)
    face.model.close()
    assert face.slot.context is None


@pytest.mark.parametrize("kind", FACES)
def test_close_at_any_moment(tiny, kind):
    rng = random.Random(11)
    for _ in range(20):
        one, ended = FACES[kind](tiny, "sfi"), []

        def work():
            try:
                while True:
                    for _ in one.stream():
                        one.tokenize()
            except DetachedError as error:
                ended.append(error)

        threads = [threading.Thread(target=work)]
        [thread.start() for thread in threads]
        time.sleep(rng.random() * 0.1)
        one.model.close()
        [thread.join(60) for thread in threads]
        assert len(ended) == 1


def test_a_model_is_not_freed_under_a_thread_that_tokenizes(tiny):
    text, ended = "The quick brown fox. " * 2000, []
    for _ in range(5):
        model = load(tiny, n_threads=1)

        def work():
            try:
                while True:
                    model.tokenize(text)
            except DetachedError as error:
                ended.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        time.sleep(0.02)
        model.close()
        [thread.join(60) for thread in threads]
    assert len(ended) == 15


def run_script(code, *args, **options):
    """A Python program of its own; fails on a crash, a traceback or a minute."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=cli_env(), timeout=60, **options)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_a_daemon_thread_that_generates_at_the_end_of_the_program(tiny):
    run_script("""
import sys, threading, time
from sfi_local import load
model = load(sys.argv[1], mode="sfi", n_threads=1)
def work():
    while True:
        for step in model.generate("x" * 300, n=500):
            pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
""", tiny)


# ---- forks -----------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys
from sfi_local import load, SlowFastLlama
from sfi_local.errors import LibraryError
if sys.argv[2] == "load":
    model = load(sys.argv[1], mode="sfi", n_threads=2)
    use = lambda: list(model.generate("Hello", n=3))
else:
    model = SlowFastLlama(sys.argv[1], n_ctx=512, n_threads=2)
    use = lambda: model("Hello", max_tokens=3)
use()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    for call in (use, lambda: model.tokenize("x" if sys.argv[2] == "load" else b"x"), lambda: load(sys.argv[1], n_threads=2).slot.grow(512)):
        try:
            call()
            os._exit(3)
        except LibraryError as error:
            assert "fork" in str(error)
    model.close()
    del model
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
use()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kind", FACES)
def test_a_fork_is_refused_with_a_sentence_and_the_parent_goes_on(tiny, kind):
    run_script(FORK, tiny, kind)


def test_a_process_that_is_spawned_has_a_model_of_its_own(tiny, tmp_path):
    code = """
import multiprocessing, sys
def work(path):
    from sfi_local import load
    with load(path, n_threads=1) as model:
        return len(list(model.generate("Hello", n=3)))
if __name__ == "__main__":
    print(multiprocessing.get_context("spawn").Pool(1).map(work, [sys.argv[1]]))
"""
    script = tmp_path / "spawn.py"  # which imports it again
    script.write_text(code)
    done = subprocess.run([sys.executable, script, tiny], capture_output=True, text=True, env=cli_env(), timeout=100)
    assert done.stdout.strip() == "[3]", done.stderr


def test_the_check_of_the_process_is_cheap(tiny):
    with load(tiny, n_threads=1) as model:
        model.slot.grow(512)
        start = time.perf_counter()
        for _ in range(1000):
            with model.slot.access:
                pass
        assert time.perf_counter() - start < 0.5  # 500 us each at most; it takes about 2

