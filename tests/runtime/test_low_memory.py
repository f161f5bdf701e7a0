"""--low-memory: what it sets, on the command line and in load(), and that answers are those of the same types of K and V."""

import pytest

from sfi_local import load
from sfi_local.binding.context import N_BATCH, SMALL_BATCH
from sfi_local.binding.library import log
from sfi_local.cli.main import cli as group
from sfi_local.cli.options import take_settings
from sfi_local.errors import UsageError
from sfi_local.runtime import memory
from sfi_local.runtime.keeper import Keeper
from sfi_local.runtime.sampling import Sampling
from sfi_local.store.gguf_file import read_gguf
from sfi_local.store.layout import layers

TEXT = "The sea was calm, and the boat lay still. " * 20  # more tokens than a small batch


def typed(name, *words):
    return group.get_command(None, name).make_context(name, [*words, "model"]).params


@pytest.mark.parametrize("name", ["run", "serve", "view"])
def test_k_and_v_are_q8_0_unless_a_type_was_asked_for(name):
    def settings(*words):
        options = typed(name, *words)
        return take_settings({"mode": "auto", **options})
    low, own, usual = settings("--low-memory"), settings("--low-memory", "--kv-type", "q4_0"), settings()
    assert (low.low_memory, low.type_k, low.type_v) == (True, "q8_0", "q8_0")
    assert (own.low_memory, own.type_k) == (True, "q4_0") and (usual.low_memory, usual.type_k) == (False, "f16")


def test_bench_takes_it_too():
    assert typed("bench", "--low-memory")["low_memory"] and typed("bench")["kv_types"] == ()
    with pytest.raises(UsageError, match="--low-memory keeps none there"):
        group.get_command(None, "bench").main(["--low-memory", "--wait", "no-model"], standalone_mode=False)


@pytest.mark.parametrize("mode", ["sfi", "dense", "stock", "exact"])
def test_the_same_tokens_as_with_large_batches(tiny, mode):
    def answer(**options):
        with load(tiny, mode=mode, n_ctx=2048, cache=False, **options) as model:
            return [step.token for step in model.generate(TEXT, n=8, sampling=Sampling(temp=0))]
    assert answer(low_memory=True) == answer(type_k="q8_0", type_v="q8_0")


def test_contexts_take_less_and_no_more_than_is_reckoned(native, tiny):
    file = read_gguf(tiny)

    def taken(**options):
        with load(tiny, n_ctx=8192, mode="stock", cache=False, **options) as model, log.collected() as lines:
            list(model.generate("a", n=1))
        sizes = [float(line.split("=")[1].split()[0]) for line in lines if "compute buffer size" in line]
        return sum(sizes) * 2**20
    low, usual = taken(low_memory=True), taken(type_k="q8_0", type_v="q8_0")
    assert 0 < low < 0.4 * usual

    def reckoned(n_ubatch):
        return memory.by_metadata(file, layers(file), "q8_0", "q8_0", n_ubatch)(8192)
    assert reckoned(SMALL_BATCH) < reckoned(N_BATCH)
    assert memory.by_llama(file, "q8_0", "q8_0", 8192, n_ubatch=SMALL_BATCH)(8192) < memory.by_llama(file, "q8_0", "q8_0", 8192)(8192)


def test_no_text_is_kept_in_memory(tiny, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_PREFIX_MEMORY", "1e9")
    keepers = [Keeper(lambda: "a", lambda data: 0, "m", lambda tokens: "", print, in_memory=kept) for kept in (True, False)]
    assert [keeper.recent.room_for(1) for keeper in keepers] == [True, False]
    with load(tiny, n_ctx=2048, mode="stock", low_memory=True) as model:
        assert not model.slot.keeper.recent.room_for(0)
