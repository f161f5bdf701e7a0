"""A slot: its context grows without computing anything again, its state comes back, and exceptions of every callback come out."""

import subprocess
import sys

import pytest
from support.command_line import cli_env

from sfi_local import Sampling, SfiParams, load
from sfi_local.binding.context import sequence_size
from sfi_local.errors import ContextFullError, OutOfMemoryError
from sfi_local.runtime.modes import MODES, mode_of
from sfi_local.runtime.slot import Slot

pytestmark = pytest.mark.usefixtures("native")

TEXT = [72, 101, 108, 108, 111, 46, 32] * 60
SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
GREEDY = Sampling(temp=0)


@pytest.fixture
def slot(tiny):
    from sfi_local.binding.context import maker

    made, model = [], load(tiny, n_threads=1)

    def make(mode="dense", n_ctx=512, kv="f16", **options):
        made.append(Slot(maker(model.weights, 1, kv, kv), n_ctx, mode, SMALL, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    model.close()


def greedy(slot, n):
    sampler, out = GREEDY.chain(), []
    for _ in range(n):
        out.append(sampler.sample(slot.context))
        slot.step(out[-1])
    return out


@pytest.mark.parametrize("mode", ["dense", "stock"])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_grown_context_has_the_cells_bit_for_bit(slot, mode, kv):
    one, other = slot(mode, 512, kv), slot(mode, 2048, kv)
    one.prefill(TEXT)
    one.grow(2048)
    other.prefill(TEXT)
    assert (one.n_ctx, one.tokens) == (2048, TEXT)
    for each in (one, other):
        each.step(65)
    assert greedy(one, 20) == greedy(other, 20)


@pytest.mark.parametrize("mode", ["dense", "stock", "sfi"])
def test_a_full_context_grows_by_itself_up_to_its_limit(slot, mode):
    one = slot(mode, 256, n_limit=600)
    one.prefill(TEXT[:250])
    for i in range(350):
        one.step(65 + i % 20)
    assert (one.n_ctx, len(one.tokens), one.n_prefilled) == (600, 600, 250)
    with pytest.raises(ContextFullError):
        one.step(65)
    assert len(one.tokens) == 600


def test_a_conversation_that_outgrows_its_context_is_not_read_again(tiny, monkeypatch):
    from sfi_local.runtime import model as module

    monkeypatch.setattr(module, "FIRST_CTX", 512)
    monkeypatch.setattr(module, "ROOMY_CTX", 512)
    monkeypatch.setattr(module, "_round_up", lambda n: -(-n // 256) * 256)
    with load(tiny, mode="dense", n_threads=1) as model:
        tokens = TEXT + [step.token for step in model.generate(TEXT, n=10, sampling=GREEDY)]
        small = model.slot.n_ctx
        list(model.generate(tokens + [65] * 20, n=600, sampling=GREEDY))
        assert small == 512 < model.slot.n_ctx and model.slot.n_prefilled <= 21


def test_without_a_limit_the_context_grows_with_the_answer(tiny):
    with load(tiny, mode="dense", n_threads=1) as model:
        steps = model.generate("x", n=None, sampling=Sampling(temp=0, logit_bias={65: 100.0}))
        for _ in range(5):
            next(steps)
        assert model.slot.n_ctx <= 4096
        steps.close()


def test_what_cannot_grow_is_as_it_was(slot, monkeypatch):
    one = slot("dense", 512)
    one.prefill(TEXT)
    real = one._make

    def make(n_ctx):
        if n_ctx > 512:
            raise OutOfMemoryError("no")
        return real(n_ctx)

    monkeypatch.setattr(one, "_make", make)
    with pytest.raises(OutOfMemoryError):
        one.grow(4096)
    assert (one.n_ctx, one.tokens) == (512, TEXT)
    one.step(65)
    assert one.tokens == [*TEXT, 65]


@pytest.mark.parametrize("short", ["of the cells", "of the larger context beside them"])
def test_without_memory_to_carry_the_cells_they_are_computed_again(slot, monkeypatch, short):
    one = slot("dense", 512)
    one.prefill(TEXT)
    n_bytes = sequence_size(one._context)
    monkeypatch.setattr("sfi_local.runtime.slot.available_memory", lambda: 10 if short == "of the cells" else n_bytes + 10)
    one.grow(1024)
    assert one.tokens == [] and one.reuse(TEXT) == 0
    one.prefill(TEXT)


def test_a_saved_state_goes_on_elsewhere(slot):
    one, other = slot("dense", 512), slot("dense", 1024)
    one.prefill(TEXT)
    state = one.save()
    assert other.load(TEXT, state) and other.tokens == TEXT
    one.step(65), other.step(65)
    assert greedy(one, 10) == greedy(other, 10)
    assert not other.load(TEXT, b"") and other.tokens == []
    other.prefill(TEXT)


# ---- exceptions ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["sfi", "stock", "exact"])
@pytest.mark.parametrize("where", ["progress", "schedule", "sampler", "processor"])
def test_an_exception_in_every_callback_comes_out_and_the_next_answer_is_whole(tiny, mode, where):
    if (mode, where) == ("exact", "schedule"):
        pytest.skip("there is no schedule in mode exact")
    params = SfiParams.of("frozen", n_sink=4, n_recent=64, n_selected=900, max_span=12, auto_depth=1)

    class Failing:
        validate = chain = clone = lambda self: self
        close = lambda self: None

        def sample(self, context, row=-1):
            raise ZeroDivisionError

    def fail(*_):
        raise ZeroDivisionError

    more = {"progress": {"progress": fail}, "schedule": {"schedule": fail}, "sampler": {"sampling": Failing()},
            "processor": {"processors": [fail]}}[where]
    with load(tiny, mode=mode, n_threads=1, n_ctx=1024, params=params) as model:
        if mode == "stock" and where == "schedule":
            pytest.skip("stock steps have no kind to choose")
        alone = [step.token for step in model.generate(TEXT, n=10, sampling=GREEDY)]
        model.slot.cut(0)
        with pytest.raises(ZeroDivisionError):
            list(model.generate(TEXT, n=10, **{"sampling": GREEDY, **more}))
        model.slot.cut(0)
        assert [step.token for step in model.generate(TEXT, n=10, sampling=GREEDY)] == alone


@pytest.mark.parametrize("when", [0, 1])
def test_an_exception_while_weights_are_read_comes_out(tiny, when):
    calls = []

    def fail(done, total):
        calls.append(done)
        if len(calls) > when:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(tiny, progress=fail)


@pytest.mark.parametrize("where", ["stopping_criteria", "logits_processor"])
def test_an_exception_in_llama_s_callbacks_comes_out(tiny, where):
    from sfi_local import SlowFastLlama

    def fail(tokens, logits):
        raise ZeroDivisionError

    llm = SlowFastLlama(str(tiny), n_ctx=512, n_threads=1)
    alone = llm.create_completion("Hello", max_tokens=5, temperature=0)["choices"][0]["text"]
    with pytest.raises(ZeroDivisionError):
        llm.create_completion("Hello", max_tokens=5, temperature=0, **{where: [fail] if where == "logits_processor" else fail})
    assert llm.create_completion("Hello", max_tokens=5, temperature=0)["choices"][0]["text"] == alone
    llm.close()


# ---- lifetimes and programs without streams --------------------------------------------------------------------------

ORDERS = """
import gc, itertools, sys
from sfi_local import load, Sampling, SlowFastLlama
kept = []
for order in itertools.permutations(range(4)):
    for how in ("close", "drop"):
        model = load(sys.argv[1], mode="sfi", n_threads=1)
        chat = model.chat()
        steps = chat.ask("Hello there", n=20, sampling=Sampling(grammar="root ::= [a-z]+"))
        next(steps)
        llm = SlowFastLlama(sys.argv[1], n_ctx=512, n_threads=1)
        stream = llm("Hello", max_tokens=9, stream=True)
        next(stream, None)
        things = [[model], [steps, chat], [llm], [stream]]
        del model, chat, steps, llm, stream
        for i in order:
            for thing in things[i]:
                if how == "close" and hasattr(thing, "close"):
                    thing.close()
            things[i] = None
            thing = None
            gc.collect()
print("whole")
"""


def run_script(code, *args, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=cli_env(), timeout=300, **options)


def test_objects_may_be_closed_and_dropped_in_any_order(tiny):
    done = run_script(ORDERS, tiny)
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr


WITHOUT_STREAMS = """
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
sys.stdin = sys.stdout = sys.stderr = None
report = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
try:
    from sfi_local import load, Sampling, SlowFastLlama
    with load(sys.argv[1], n_threads=1, verbose=True) as model:
        n = len(list(model.generate("Hello", n=5, sampling=Sampling(temp=0))))
        try:
            model.generate("Hello", sampling=Sampling(grammar="root ::= ("))
        except ValueError:
            n += 100
    llm = SlowFastLlama(sys.argv[1], n_ctx=512, n_threads=1)
    n += llm("Hello", max_tokens=5, temperature=0)["usage"]["completion_tokens"]
    os.lseek(report, 0, 0)
    os.write(report, f"{n} tokens".ljust(200).encode())
except BaseException as error:
    os.write(report, repr(error).encode())
"""


def test_a_program_without_any_stream_can_use_it(tiny, tmp_path):
    """What native code prints goes to whatever file has descriptor 2 then; it must not be the end of the program."""
    done = run_script(WITHOUT_STREAMS, tiny, tmp_path / "report")
    n, word = (tmp_path / "report").read_text().split()[:2]
    assert word == "tokens" and int(n) > 105 and done.returncode == 0


# ---- modes -----------------------------------------------------------------------------------------------------------

def test_modes_are_known_by_name_and_a_wrong_name_is_refused():
    assert list(MODES) == ["auto", "sfi", "dense", "exact", "stock"] and all(mode_of(name).name == name for name in MODES)
    assert mode_of(MODES["auto"]) is MODES["auto"]
    with pytest.raises(ValueError, match="auto, sfi, dense"):
        mode_of("fast")


@pytest.mark.parametrize("name", ["sfi", "dense", "stock", "auto"])
def test_a_mode_has_the_kinds_of_steps_that_it_says(slot, name):
    one = slot(name, 1024)
    one.prefill(TEXT)
    kinds = {one.step(65 + i % 9).kind for i in range(30)}
    assert kinds <= set(MODES[name].kinds)


@pytest.mark.skipif(sys.platform != "linux", reason="only there do cells take memory when they are used")
def test_a_first_context_has_room_for_what_may_come(tmp_path, monkeypatch):
    """So that nothing moves, and no more memory is taken than by a small one; where there is no such memory, it begins small."""
    from support.tiny_model import write_tiny

    from sfi_local.runtime import model as module

    path = write_tiny(tmp_path / "long.gguf", n_ctx=40960)
    with load(path, mode="sfi", n_threads=1, cache=False) as model:
        list(model.generate(TEXT, n=4, sampling=GREEDY))
        assert model.slot.n_ctx == module.ROOMY_CTX
        context = model.slot.context
        model.slot.n_limit, model.slot.keeper = 40960, None
        list(model.generate(TEXT * (5000 // len(TEXT)), n=4, sampling=GREEDY))
        assert model.slot.context is context
    with load(path, mode="sfi", n_threads=1, cache=False, low_memory=True) as model:
        list(model.generate(TEXT, n=4, sampling=GREEDY))
        assert model.slot.n_ctx == module.FIRST_CTX
    real = Slot.grow

    def grow(self, n_ctx):
        if n_ctx > module.FIRST_CTX:
            raise OutOfMemoryError("no")
        real(self, n_ctx)

    monkeypatch.setattr(Slot, "grow", grow)
    with load(path, mode="sfi", n_threads=1, cache=False) as model:
        list(model.generate(TEXT, n=4, sampling=GREEDY))
        assert model.slot.n_ctx == module.FIRST_CTX
