"""Weights and contexts of llama.cpp, by llama-cpp-python's own objects: made here, and their logits seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

from sfi_local.binding.interrupt import InterruptFlag
from sfi_local.binding.library import last_log_lines, log
from sfi_local.errors import ModelFileError, OutOfMemoryError

GGML_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
N_BATCH = 512
MAX_OUTPUTS = 64  # tokens of a batch whose logits are wanted, a verified span being the most; more are possible, but not reserved for


def load_weights(llama: Any, path: Path, gpu_layers: int | None, progress: Callable[[float, float], None] | None,
                 mapped_only: bool = False, metadata: Mapping[str, int | float | str] | None = None) -> Any:
    """llama_cpp._internals.LlamaModel; Ctrl-C stops between two tensors.

    metadata: in the place of the file's
    mapped_only: every weight stays in the mapped file, none is copied into an order that the CPU reads faster
    """
    from llama_cpp._internals import LlamaModel

    with InterruptFlag() as flag:
        def on_progress(done: float, user: Any) -> bool:
            if progress:
                progress(done, 1.0)
            return not flag.requested

        params = llama.llama_model_default_params()
        params.progress_callback = llama.llama_progress_callback(on_progress)
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        if mapped_only:
            params.use_extra_bufts = False
        overrides = kv_overrides(llama, metadata or {})  # kept until the weights are loaded
        params.kv_overrides = overrides
        log.errors.clear()
        try:
            return LlamaModel(path_model=str(path), params=params, verbose=True)
        except ValueError:
            raise ModelFileError(f"llama.cpp cannot load {path} ({last_log_lines() or 'no message'}): check that this "
                                 f"version supports the model, or fetch the file again.") from None


def new_context(llama: Any, weights: Any, n_ctx: int, n_threads: int, type_k: str, type_v: str) -> Any:
    """llama_cpp._internals.LlamaContext of one sequence and n_ctx cells. Raises OutOfMemoryError."""
    from llama_cpp import _internals

    params = context_params(llama, n_ctx, n_threads, type_k, type_v)
    try:
        return _internals.LlamaContext(model=weights, params=params, verbose=True)
    except ValueError:
        raise OutOfMemoryError(f"A context of {n_ctx} tokens cannot be created ({last_log_lines() or 'no message'}): "
                               f"lower --ctx, or change --kv-type.") from None


def kv_overrides(llama: Any, metadata: Mapping[str, int | float | str]) -> Any:
    """An array of struct llama_model_kv_override, which an empty one ends."""
    found = (llama.llama_model_kv_override * (len(metadata) + 1))()
    for override, (key, value) in zip(found, metadata.items()):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag, override.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        elif isinstance(value, float):
            override.tag, override.value.val_f64 = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            override.tag, override.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return found


def context_params(llama: Any, n_ctx: int, n_threads: int, type_k: str, type_v: str) -> Any:
    """struct llama_context_params of every context we make."""
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_BATCH, N_BATCH, 1
    params.n_outputs_max = MAX_OUTPUTS
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = GGML_TYPES[type_k], GGML_TYPES[type_v]
    params.no_perf = True
    return params


def logits(context: Any, row: int) -> Any:
    """A view of a row of the context's logits, float32 [n_vocab]."""
    import numpy as np

    return np.ctypeslib.as_array(context.get_logits_ith(row), shape=(context.model.n_vocab(),))
