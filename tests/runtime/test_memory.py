"""What is said where a GPU has too little memory, or is not there: without one."""

import pytest

from sfi_local.binding import gpu
from sfi_local.errors import ArgumentError, OutOfMemoryError

CARD = gpu.Gpu("CUDA0", "a small card", free=8 << 30, total=12 << 30)


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
    text = str(refusal.value)
    assert "2.6 GB more than a small card (8.6 GB free)" in text and "--kv-type q8_0" in text
    layers = int(text.rstrip(".").rsplit(" ", 1)[1])
    assert gpu.room_for_context(need(6, 4, gpu.share_of(32, layers, [CARD])), [CARD], 32)
    with pytest.raises(OutOfMemoryError):
        gpu.room_for_context(need(6, 4, gpu.share_of(32, layers + 1, [CARD])), [CARD], 32)


def test_a_context_costs_its_sketch_too(tiny):
    from sfi_local import SfiParams
    from sfi_local.runtime.memory import ContextCost, check_memory
    from sfi_local.store.gguf_file import read_gguf
    from sfi_local.store.layout import layers, sfi_bytes

    file = read_gguf(tiny)
    stock, sketch = (ContextCost(layers(file), "f16", "f16", params) for params in (None, SfiParams()))
    n = 1 << 20
    assert sketch.bytes(n) == stock.bytes(n) + sfi_bytes(layers(file), SfiParams(), n)
    for cost in (stock, sketch):
        cells = cost.cells(1 << 28)
        assert cost.bytes(cells) <= 1 << 28 < cost.bytes(cells + 1)
    assert stock.cells(0) == 0
    card = gpu.Gpu("CUDA0", "a card", free=int((file.n_bytes + stock.bytes(n)) / gpu.MEMORY_SHARE) + 1024, total=1 << 40)
    assert check_memory(file, stock, n, 1.0, [card])
    with pytest.raises(OutOfMemoryError, match="more than a card"):
        check_memory(file, sketch, n, 1.0, [card])


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
    assert b"There is no GPU for --gpu-layers 3" in done.stderr and b"Traceback" not in done.stderr
