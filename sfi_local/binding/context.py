"""Weights and contexts of llama.cpp: made here, and their logits seen. Those of llama-cpp-python, LlamaModel and LlamaContext, serve as well."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from sfi_local.binding.interrupt import CancelFlag, InterruptFlag
from sfi_local.binding.library import last_log_lines, log, open_library
from sfi_local.errors import ModelFileError, OutOfMemoryError
from sfi_local.machine import new_memory

GGML_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
N_BATCH = 512
SMALL_BATCH = 128  # tokens that are computed at once where memory is short
MAX_OUTPUTS = 64  # tokens of a batch whose logits are wanted, a verified span being the most; more are possible, but not reserved for


class Weights:
    """A llama_model, with as much of LlamaModel as is used of it. model, vocab: addresses; None after close()"""

    def __init__(self, path: Path, params: Any):
        self._llama = open_library().llama_cpp
        self._exit_stack = ExitStack()  # contexts are freed first
        self.model = self._llama.llama_model_load_from_file(str(path).encode("utf-8"), params)
        if not self.model:
            raise ValueError(f"{path} cannot be loaded")
        self.vocab = self._llama.llama_model_get_vocab(self.model)
        self._exit_stack.callback(self._free)

    def close(self) -> None:
        self._exit_stack.close()

    def _free(self) -> None:
        model, self.model = self.model, None
        if model:
            self._llama.llama_model_free(model)

    def __del__(self) -> None:
        if hasattr(self, "_exit_stack"):
            self.close()

    def n_vocab(self) -> int:
        return self._llama.llama_vocab_n_tokens(self.vocab)

    def token_bos(self) -> int:
        return self._llama.llama_vocab_bos(self.vocab)

    def token_eos(self) -> int:
        return self._llama.llama_vocab_eos(self.vocab)

    def add_bos_token(self) -> bool:
        return self._llama.llama_vocab_get_add_bos(self.vocab)

    def token_get_text(self, token: int) -> str:
        return self._llama.llama_vocab_get_text(self.vocab, token).decode("utf-8")


class Context:
    """A llama_context of weights, which it keeps alive and which free it. model: the weights; ctx: its address, None after close()"""

    def __init__(self, weights: Any, params: Any):
        self.model, self._llama = weights, open_library().llama_cpp
        self.ctx = self._llama.llama_init_from_model(weights.model, params)
        if not self.ctx:
            raise ValueError("a context cannot be made")
        weights._exit_stack.callback(self.close)

    def close(self) -> None:
        ctx, self.ctx = self.ctx, None
        if ctx:
            self._llama.llama_free(ctx)

    def __del__(self) -> None:
        if hasattr(self, "ctx"):
            self.close()

    def get_logits_ith(self, row: int) -> Any:
        return self._llama.llama_get_logits_ith(self.ctx, row)


@contextmanager
def mapped_weights(llama: Any, wanted: bool) -> Iterator[None]:
    """Models that llama-cpp-python loads meanwhile keep their weights in the mapped file: its Llama has no argument for that."""
    module, default = llama.llama_cpp, llama.llama_cpp.llama_model_default_params

    def mapped() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    if wanted:
        module.llama_model_default_params = mapped
    try:
        yield
    finally:
        module.llama_model_default_params = default


def load_weights(llama: Any, path: Path, gpu_layers: int | None, progress: Callable[[float, float], None] | None,
                 mapped_only: bool = False, metadata: Mapping[str, int | float | str] | None = None) -> Weights:
    """Load them; Ctrl-C, or an exception of progress, stops between two tensors.

    metadata: in the place of the file's
    mapped_only: every weight stays in the mapped file, none is copied into an order that the CPU reads faster
    """
    errors: list[BaseException] = []
    with InterruptFlag() as flag:
        def on_progress(done: float, user: Any) -> bool:
            try:
                if progress:
                    progress(done, 1.0)
            except BaseException as error:  # would be lost in the library
                errors.append(error)
            return not flag.requested and not errors

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
            weights = Weights(path, params)
        except ValueError:
            if errors:
                raise errors[0] from None
            raise ModelFileError(f"llama.cpp cannot load {path} ({last_log_lines() or 'no message'}): check that this "
                                 f"version supports the model, or fetch the file again.") from None
        if errors:  # raised at the last report, when everything was there
            weights.close()
            raise errors[0]
        return weights


def load_adapter(weights: Any, path: str) -> Any:
    """A LoRA adapter for loaded weights, which free it. Raises ModelFileError."""
    llama = open_library().llama_cpp
    log.errors.clear()
    adapter = llama.llama_adapter_lora_init(weights.model, path.encode("utf-8"))
    if not adapter:
        raise ModelFileError(f"llama.cpp cannot take {path} as a LoRA adapter of this model ({last_log_lines() or 'no message'}): check "
                             f"that it was made for this model, as GGUF.")
    return adapter


def _set_adapters(llama: Any, context: Any, adapters: Sequence[tuple[Any, float]]) -> None:
    handles = (llama.llama_adapter_lora_p_ctypes * len(adapters))(*(adapter for adapter, _ in adapters))
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
    if llama.llama_set_adapters_lora(context.ctx, handles, len(adapters), scales):
        raise ModelFileError("llama.cpp cannot apply this LoRA adapter to the model: check that it was made for it.")


def new_context(llama: Any, weights: Any, n_ctx: int, n_threads: int, type_k: str, type_v: str,
                adapters: Sequence[tuple[Any, float]] = (), n_ubatch: int = N_BATCH, kv_host: bool = False) -> Context:
    """One sequence and n_ctx cells. Raises OutOfMemoryError.

    adapters: (of load_adapter(), scale) of each
    kv_host:  K and V are in the host's memory and attended to there, whoever holds the layers
    """
    params = context_params(llama, n_ctx, n_threads, type_k, type_v, n_ubatch)
    params.offload_kqv = not kv_host
    try:
        context = Context(weights, params)
    except ValueError:
        raise OutOfMemoryError(f"A context of {n_ctx} tokens cannot be created ({last_log_lines() or 'no message'}): "
                               f"make it smaller, or take another type of K and V.") from None
    if adapters:
        _set_adapters(llama, context, adapters)
    return context


def maker(weights: Any, n_threads: int, type_k: str = "f16", type_v: str = "f16",
          adapters: Sequence[tuple[Any, float]] = (), n_ubatch: int = N_BATCH, kv_host: bool = False) -> Callable[[int], Any]:
    """new_context() of loaded weights, which it keeps alive, as a function of n_ctx."""
    return lambda n_ctx: new_context(open_library().llama_cpp, weights, n_ctx, n_threads, type_k, type_v, adapters, n_ubatch, kv_host)


def decode(context: Any, tokens: Sequence[int]) -> int:
    """The status of a plain llama_decode of tokens after what the first sequence holds, waited for."""
    llama = open_library().llama_cpp
    array = (llama.llama_token * len(tokens))(*tokens)
    status = llama.llama_decode(context.ctx, llama.llama_batch_get_one(array, len(tokens)))
    llama.llama_synchronize(context.ctx)
    return status


@contextmanager
def interruptible(context: Any, stop: Callable[[], bool], flag: CancelFlag) -> Iterator[None]:
    """Ask stop() between any two operations, where Python's signal handlers run; afterwards the flag is watched again.

    For prefill: in a step of few milliseconds that costs too much.
    """
    llama = open_library().llama_cpp
    callback = llama.ggml_abort_callback(lambda user: bool(stop()))
    llama.llama_set_abort_callback(context.ctx, callback, None)
    try:
        yield
    finally:
        flag.watch(context)


def sequence_size(context: Any) -> int:
    """Bytes of sequence_state()."""
    return open_library().llama_cpp.llama_state_seq_get_size(context.ctx, 0)


def sequence_state(context: Any) -> Any:
    """The cells of the first sequence, in a buffer of their own."""
    llama, size = open_library().llama_cpp, sequence_size(context)
    buffer = new_memory(size)
    array = (ctypes.c_uint8 * size).from_buffer(buffer)
    if llama.llama_state_seq_get_data(context.ctx, array, size, 0) != size:
        raise OutOfMemoryError("The state of the sequence cannot be read.")
    return array


def set_sequence_state(context: Any, state: Any) -> bool:
    """Put into the first sequence what sequence_state() gave, or its bytes; False if they do not fit the context."""
    llama, size = open_library().llama_cpp, len(state)
    array = (ctypes.c_uint8 * size).from_buffer_copy(state) if isinstance(state, bytes) else state
    return size > 0 and llama.llama_state_seq_set_data(context.ctx, array, size, 0) == size


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


def most_outputs(n_ubatch: int) -> int:
    """Tokens of a batch that logits are reserved for: rows of the vocabulary, which are much of a small model's memory."""
    return MAX_OUTPUTS * n_ubatch // N_BATCH


def context_params(llama: Any, n_ctx: int, n_threads: int, type_k: str, type_v: str, n_ubatch: int = N_BATCH) -> Any:
    """struct llama_context_params of every context we make. n_ubatch: tokens of a batch that are computed at once"""
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_BATCH, n_ubatch, 1
    params.n_outputs_max = most_outputs(n_ubatch)
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = GGML_TYPES[type_k], GGML_TYPES[type_v]
    params.no_perf = True
    return params


def logits(context: Any, row: int) -> Any:
    """A view of a row of the context's logits, float32 [n_vocab]."""
    import numpy as np

    return np.ctypeslib.as_array(context.get_logits_ith(row), shape=(context.model.n_vocab(),))
