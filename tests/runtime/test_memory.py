"""What is said where a GPU or the machine has too little memory, or where there is no GPU: without one."""

import re
from dataclasses import replace

import pytest

from sfi_local import SfiParams, load
from sfi_local.binding import gpu
from sfi_local.cli.spelling import spelled
from sfi_local.errors import ArgumentError, OutOfMemoryError
from sfi_local.runtime import memory
from sfi_local.runtime.memory import ContextCost, Room, by_metadata, check_memory, exact_cost
from sfi_local.store.gguf_file import read_gguf
from sfi_local.store.layout import layers, sfi_bytes

CARD = gpu.Gpu("CUDA0", "a small card", free=8 << 30, total=12 << 30)


@pytest.fixture
def available(monkeypatch):
    """Set what the system has free, in bytes."""
    return lambda n_bytes: monkeypatch.setattr(memory, "available_memory", lambda: n_bytes)


def need(weights, context, share=1.0):
    return gpu.Need("model.gguf", weights << 30, context << 30, share)


def test_all_layers_go_to_a_gpu_unless_fewer_are_asked_for():
    assert gpu.share_of(32, None, [CARD]) == 1.0
    assert gpu.share_of(32, 33, [CARD]) == 1.0
    assert gpu.share_of(32, 11, [CARD]) == pytest.approx(1 / 3)
    assert gpu.share_of(32, None, []) == 0.0


def test_what_is_left_is_for_the_context():
    assert gpu.room_for_context(need(4, 1), [CARD], 32) == pytest.approx(3.6 * 2**30, rel=1e-6)  # 95 % of 8 GiB are usable
    assert gpu.room_for_context(need(4, 1, share=0.5), [CARD], 32) > gpu.room_for_context(need(4, 1), [CARD], 32)
    assert gpu.room_for_context(need(9, 1), [CARD, CARD], 32) > 0


def test_too_little_memory_is_refused_with_what_is_missing_and_what_would_fit():
    with pytest.raises(OutOfMemoryError) as refusal:
        gpu.room_for_context(need(6, 4), [CARD], 32)
    text = refusal.value.told(spelled)
    assert "2.6 GB more than a small card (8.6 GB free)" in text and "--kv-type q8_0" in text
    layers = int(text.rstrip(".").rsplit(" ", 1)[1])
    assert gpu.room_for_context(need(6, 4, gpu.share_of(32, layers, [CARD])), [CARD], 32)
    with pytest.raises(OutOfMemoryError):
        gpu.room_for_context(need(6, 4, gpu.share_of(32, layers + 1, [CARD])), [CARD], 32)


def cost(file, params=None, kv_type="f16"):
    all_layers = layers(file)
    return ContextCost(by_metadata(file, all_layers, kv_type, kv_type), all_layers, kv_type, kv_type, params)


def test_a_context_costs_its_sketch_too(tiny):
    file = read_gguf(tiny)
    stock, sketch = cost(file), cost(file, SfiParams())
    n = 1 << 20
    assert sketch.bytes(n) == stock.bytes(n) + sfi_bytes(layers(file), SfiParams(), n)
    for one in (stock, sketch):
        cells = one.cells(1 << 28)
        assert one.bytes(cells) <= 1 << 28 < one.bytes(cells + 1)
    assert stock.cells(0) == 0
    card = gpu.Gpu("CUDA0", "a card", free=int((file.n_bytes + stock.bytes(n)) / gpu.MEMORY_SHARE) + 1024, total=1 << 40)
    assert check_memory(file, stock, n, 1.0, [card]).n_bytes
    with pytest.raises(OutOfMemoryError, match="more than a card"):
        check_memory(file, sketch, n, 1.0, [card])
    assert check_memory(file, sketch, n, 1.0, [card], force=True).n_bytes is None


def test_k_and_v_in_the_host_take_nothing_of_the_card(tiny, available):
    file, n = read_gguf(tiny), 1 << 17
    sketch = cost(file, SfiParams())
    card = gpu.Gpu("CUDA0", "a card", free=int(file.n_bytes / gpu.MEMORY_SHARE) + 1024, total=1 << 40)
    available(1 << 40)
    with pytest.raises(OutOfMemoryError, match="leave K and V in the host's memory with kv_host"):
        check_memory(file, sketch, n, 1.0, [card])
    assert check_memory(file, sketch, n, 1.0, [card], kv_host=True).n_bytes == int(memory.MEMORY_SHARE * (1 << 40))
    available(sketch.bytes(n))
    with pytest.raises(OutOfMemoryError, match="more than can be used here"):
        check_memory(file, sketch, n, 1.0, [card], kv_host=True)
    tight = replace(card, free=file.n_bytes // 2)
    with pytest.raises(OutOfMemoryError, match="on the GPU") as refusal:
        check_memory(file, sketch, 512, 1.0, [tight], kv_host=True)
    assert "lower" not in str(refusal.value) and "--gpu-layers" in refusal.value.told(spelled)
    assert check_memory(file, sketch, 512, 0.2, [tight], kv_host=True).n_bytes


# ---- the host's memory -----------------------------------------------------------------------------------------------

def test_a_context_that_does_not_fit_is_refused_with_what_would(tiny, available):
    file, n = read_gguf(tiny), 1 << 17
    stock = cost(file)
    available(stock.bytes(n // 2))
    with pytest.raises(OutOfMemoryError, match="more than can be used here") as refusal:
        check_memory(file, stock, n, 0, [])
    ctx, quantised = (int(cells) for cells in re.findall(r"--ctx (\d+)", refusal.value.told(spelled)))
    assert "go on anyway with force=True" in str(refusal.value) and "with K and V as q8_0" in str(refusal.value)
    assert "--ctx" in refusal.value.told(spelled) and "--force" in refusal.value.told(spelled)
    assert check_memory(file, stock, ctx, 0, []).n_bytes
    assert check_memory(file, cost(file, kv_type="q8_0"), quantised, 0, []).n_bytes and quantised > ctx
    forced = check_memory(file, stock, n, 0, [], force=True)
    assert forced.n_bytes is None and "more than can be used" in forced.notes[0]


def test_where_not_even_the_smallest_context_fits_another_model_is_named(tiny, available):
    available(1000)
    with pytest.raises(OutOfMemoryError, match="take a smaller model"):
        check_memory(read_gguf(tiny), cost(read_gguf(tiny)), 512, 0, [])


def test_weights_that_do_not_fit_are_read_again_instead_of_refused(tiny, available):
    file = read_gguf(tiny)
    stock = cost(file)
    available(int((stock.bytes(512) + file.n_bytes // 2) / memory.MEMORY_SHARE))
    room = check_memory(file, stock, 512, 0, [])
    assert room.mapped_only and "do not fit beside the context" in room.notes[0] and room.n_bytes >= stock.bytes(512)
    available(int((stock.bytes(512) + file.n_bytes) / memory.MEMORY_SHARE) + 1)
    assert check_memory(file, stock, 512, 0, []) == Room(int(memory.MEMORY_SHARE * memory.available_memory()) - file.n_bytes)


def test_llama_cpp_is_asked_only_where_it_may_decide(native, tiny, available, monkeypatch):
    file, asked = read_gguf(tiny), []
    monkeypatch.setattr(memory, "by_llama", lambda *args: asked.append(args))
    available(1 << 40)
    assert exact_cost(file, cost(file), 4096, 0, [], None).bytes(512) and not asked
    available(file.n_bytes)
    assert exact_cost(file, cost(file), 4096, 0, [], None).bytes(512) and asked


def test_a_loaded_model_knows_the_largest_context(tiny, available):
    size, n = tiny.stat().st_size, 1024
    file = read_gguf(tiny)
    exact = ContextCost(memory.by_llama(file, "f16", "f16", file.n_ctx_train), layers(file), "f16", "f16", None)
    available(int((size + exact.bytes(n)) / memory.MEMORY_SHARE) + 1)
    with load(tiny, mode="stock", n_threads=1) as model:
        assert n <= model.n_ctx_limit < n + memory.PAD_CTX
    with load(tiny, n_threads=1) as model:  # what a sketch holds has to fit too
        assert 512 <= model.n_ctx_limit < n
    available(size // 10)
    with pytest.raises(OutOfMemoryError, match="force=True"):
        load(tiny, n_ctx=4096)
    with load(tiny, n_ctx=512, n_threads=1, mode="stock", force=True) as model:
        assert "Going on, as asked" in model.notes[0]
        assert next(model.generate("x", n=1)).text is not None


def test_what_fits_is_known_before_a_model_is_loaded(tiny, available):
    file = read_gguf(tiny)
    available(1 << 40)
    assert memory.fitting_context(file) == file.n_ctx_train
    available(1000)
    assert memory.fitting_context(file) == 0
    available(int((file.n_bytes + cost(file, SfiParams()).bytes(2048)) / memory.MEMORY_SHARE) + 1)
    assert 2048 - memory.PAD_CTX <= memory.fitting_context(file) <= 2048
    available(None)
    assert memory.fitting_context(file) is None


def test_layers_for_a_gpu_that_is_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(gpu, "gpus", lambda: [])
    monkeypatch.setattr(gpu, "backends", lambda: [])
    with pytest.raises(ArgumentError, match="this build has no backend for one"):
        gpu.usable(5)
    assert gpu.usable(None) == ([], "") == gpu.usable(0)
    monkeypatch.setattr(gpu, "backends", lambda: ["cuda"])
    with pytest.raises(ArgumentError, match="new enough"):
        gpu.usable(5)
    assert "decoding on the CPU" in gpu.usable(None)[1]


def test_the_command_line_says_it_in_a_sentence(cli, tiny):
    from sfi_local.binding.gpu import gpus

    if gpus():
        pytest.skip("there is a GPU")
    done = cli("run", tiny, "-p", "x", "-n", 1, "--gpu-layers", 3)
    assert done.returncode == 1 and done.stdout == b""
    assert b"There is no GPU for 3 layers" in done.stderr and b"Traceback" not in done.stderr
