"""What a context takes, asked of llama.cpp: it loads the metadata alone and lays out caches and compute buffers without taking memory."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from sfi_local.binding.context import N_BATCH, context_params, kv_overrides
from sfi_local.binding.library import log, open_library

MIB = 1 << 20
_CACHE = re.compile(r"(?<!buffer )\bsize = +([\d.]+) MiB")
_BUFFER = re.compile(r"(?:compute|output) buffer size = +([\d.]+) MiB")


class Simulated:
    """A model of which only the metadata is loaded."""

    def __init__(self, llama: Any, model: Any):
        self._llama, self._model = llama, model

    def context_bytes(self, n_ctx: int, type_k: str, type_v: str, n_ubatch: int = N_BATCH) -> tuple[int, int] | None:
        """(cache, buffers for computing) of a context of n_ctx cells, in bytes; None where llama.cpp makes none."""
        with log.collected() as lines:
            context = self._llama.llama_init_from_model(self._model, context_params(self._llama, n_ctx, 1, type_k, type_v, n_ubatch))
            if context:
                self._llama.llama_free(context)
        text = "".join(lines)
        cache, buffers = (sum(float(n) for n in pattern.findall(text)) for pattern in (_CACHE, _BUFFER))
        return (int(cache * MIB), int(buffers * MIB)) if context and buffers else None


@contextmanager
def simulated(path: Path, architecture: str, n_vocab: int, gpu_layers: int | None = None) -> Iterator[Simulated | None]:
    """A model for Simulated; None where llama.cpp cannot load it. The vocabulary, which takes most of the time, is left out."""
    llama = open_library().llama_cpp
    overrides = kv_overrides(llama, {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": n_vocab})
    params = llama.llama_model_default_params()
    params.no_alloc, params.load_mode, params.kv_overrides = True, 0, overrides  # 0: no mapping, which asks for memory
    if gpu_layers is not None:
        params.n_gpu_layers = gpu_layers
    with log.collected():
        model = llama.llama_model_load_from_file(str(path).encode("utf-8"), params)
    try:
        yield Simulated(llama, model) if model else None
    finally:
        if model:
            llama.llama_model_free(model)
