"""The memory that a context is reckoned to take is what it takes, for caches with and without sliding windows."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from support.command_line import cli_env
from support.shapes import SHAPES, write_shape

from sfi_local.binding.context import MAX_OUTPUTS, N_BATCH, new_context
from sfi_local.binding.library import log
from sfi_local.runtime import memory
from sfi_local.store.gguf_file import read_gguf
from sfi_local.store.layout import KV_TYPES, compute_bytes, kv_bytes, layers

DEPTHS = (4096, 32768, 131072)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, native, tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shape") / f"{request.param}.gguf", request.param)


@contextmanager
def loaded(native, path):
    from llama_cpp._internals import LlamaModel

    model = LlamaModel(path_model=str(path), params=native.llama_cpp.llama_model_default_params(), verbose=True)
    yield model
    model.close()


def taken(native, weights, n_ctx, kv_type="f16"):
    """(KV cache, buffers for computing) that llama.cpp has allocated for a real context, in bytes."""
    with log.collected() as lines:
        context = new_context(native.llama_cpp, weights, n_ctx, 1, kv_type, kv_type)
    context.close()
    text = "".join(lines)
    return [sum(map(float, re.findall(pattern, text))) * 2**20
            for pattern in (r"KV buffer size = +([\d.]+) MiB", r"(?:compute|output) buffer size = +([\d.]+) MiB")]


def test_what_llama_cpp_says_without_taking_memory_is_what_it_takes(native, shape):
    file = read_gguf(shape)
    with loaded(native, shape) as weights:
        for n_ctx in DEPTHS:
            reckoned = memory.by_llama(file, "f16", "f16", n_ctx)
            cache, buffers = taken(native, weights, n_ctx)
            assert cache > 0 and buffers > 0
            assert reckoned(n_ctx) == pytest.approx(cache + buffers, rel=0.03)


def test_the_cache_follows_from_the_metadata_too_and_the_rest_is_no_less(native, shape):
    file = read_gguf(shape)
    all_layers = layers(file)
    with loaded(native, shape) as weights:
        for n_ctx, kv_type in ((4096, "q8_0"), (32768, "f16"), (131072, "q4_0")):
            cache, buffers = taken(native, weights, n_ctx, kv_type)
            assert kv_bytes(all_layers, n_ctx, kv_type, kv_type) == pytest.approx(cache, rel=0.03)
            bound = compute_bytes(file, all_layers, n_ctx, N_BATCH, MAX_OUTPUTS)
            assert buffers <= bound
            assert memory.by_metadata(file, all_layers, kv_type, kv_type)(n_ctx) >= cache + buffers


def test_between_the_two_contexts_asked_for_the_line_lies_above(native, shape):
    file = read_gguf(shape)
    line, exact = memory.by_llama(file, "f16", "f16", 131072), memory.by_llama(file, "f16", "f16", 20000)
    assert exact(20000) <= line(20000) * 1.001


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_type_can_be_asked_for(native, shape, kv_type):
    assert memory.by_llama(read_gguf(shape), kv_type, kv_type, 4096)(4096) > 0


GROWTH = """
import sys
from llama_cpp._internals import LlamaModel
from sfi_local.binding.context import MAX_OUTPUTS, N_BATCH, new_context
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
weights = LlamaModel(path_model=sys.argv[1], params=native.llama_cpp.llama_model_default_params(), verbose=True)
before = anonymous()
context = new_context(native.llama_cpp, weights, int(sys.argv[2]), 1, "f16", "f16")
native.llama_cpp.llama_memory_clear(native.llama_cpp.llama_get_memory(context.ctx), True)  # writes to all of it
print(anonymous() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_what_the_system_counts(native, tmp_path):
    """A cache that was written to everywhere. Beside it there are 52 bytes for each cell of each of two caches: much for these narrow
    models, nothing for real ones."""
    path, n_ctx = write_shape(tmp_path / "m.gguf", "gemma3"), 1 << 17
    code = "from sfi_local.binding.library import open_library\nnative = open_library()\n" + GROWTH
    done = subprocess.run([sys.executable, "-c", code, path, str(n_ctx)], capture_output=True, text=True, env=cli_env(), check=True)
    assert int(done.stdout) == pytest.approx(kv_bytes(layers(read_gguf(path)), n_ctx) + 2 * 52 * n_ctx, rel=0.03)
