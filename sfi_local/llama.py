"""SlowFastLlama: llama-cpp-python's Llama, decoding slow-fast. One changed import:

    from sfi_local import SlowFastLlama as Llama

Chat completion, streaming, grammars, tools and caches are llama-cpp-python's own and unchanged.
"""

from __future__ import annotations

import os
from typing import Any, Sequence

from sfi_local.binding.library import open_library

open_library()  # before llama_cpp is imported: it must run on our library

from llama_cpp import Llama  # noqa: E402

from sfi_local.binding.context import GGML_TYPES  # noqa: E402
from sfi_local.binding.engine import Engine, Stats, StepInfo  # noqa: E402
from sfi_local.binding.library import log  # noqa: E402
from sfi_local.errors import ArgumentError, BackendError, ContextError, KvTypeError, ModelError  # noqa: E402
from sfi_local.loading import params_for_mode  # noqa: E402
from sfi_local.machine import physical_cores  # noqa: E402
from sfi_local.params import PORTABLE_POLICY, SfiParams, auto_depth  # noqa: E402
from sfi_local.runtime.model import Model  # noqa: E402
from sfi_local.runtime.slot import MODES as SESSION_MODES  # noqa: E402
from sfi_local.store.gguf_file import GgufFile, read_gguf  # noqa: E402
from sfi_local.tuning.auto_depth import auto_depth_of  # noqa: E402

ALL_LAYERS = 0x7FFFFFFF  # how llama-cpp-python writes n_gpu_layers=-1
MODES = tuple(mode for mode in SESSION_MODES if mode != "exact")


class SlowFastLlama(Llama):
    """``llama_cpp.Llama`` whose single tokens are slow, fast or dense steps.

    mode:       ``auto`` (slow-fast from the depth where it pays), ``sfi``, ``dense`` or ``stock``. Where n_ctx is larger than the
                budget, that depth is measured here, once per model and machine (seconds), and remembered, as by sfi_local.load;
                params with an auto_depth of their own keep it
    sfi_params: budget, schedule and selector; None: the defaults, made smaller where n_ctx is, and of policy frozen where a
                device of the model lacks the operations of the default one
    fidelity:   as in sfi_local.load: nats from dense, or ``floor``, for the tolerance in modes ``auto`` and ``sfi``; None without
                sfi_params: ``floor``, if the model is calibrated
    Everything else is as in llama_cpp.Llama, except that flash attention is always on and that n_threads is one per
    physical core unless given, and n_threads_batch as many.

    last_step:  StepInfo of the latest decode step, None before it
    steps:      Stats since the model was loaded or ``reset_steps()``; None where sfi is not attached
    auto_found: how the depth of mode ``auto`` was found; "": it was given, or n_ctx is no larger than the budget
    notes:      what was decided on the caller's behalf, in sentences
    why_stock:  why decoding is llama.cpp's own, "" if it is not: mode ``stock``, a model that cannot be sparse (in mode
                ``auto``), or ``logits_all`` / a draft model, which need the logits of every token
    Raises ArgumentError (embedding, fidelity), InputError (no calibration for a fidelity), ModelFileError, and in modes ``sfi``
    and ``dense`` ModelError, KvTypeError, BackendError. One thread at a time: a second gets BusyError.
    """

    def __init__(self, model_path: str, *, mode: str = "auto", sfi_params: SfiParams | None = None,
                 fidelity: float | str | None = None, **kwargs: Any):
        if mode == "exact":
            raise ArgumentError("SlowFastLlama has no mode exact, which must see the sampler draw several tokens at once: use "
                                "sfi_local.load(..., mode=\"exact\"), or mode dense.")
        if mode not in MODES:
            raise ArgumentError(f"mode is {mode!r}: choose one of {', '.join(MODES)}.")
        if kwargs.get("embedding"):
            raise ArgumentError("SlowFastLlama decodes text and makes no embeddings: use llama_cpp.Llama for them.")
        file = read_gguf(model_path)
        self.mode, self._given_params, self._given_fidelity = mode, sfi_params, fidelity
        self._types = _type_name(kwargs.get("type_k")), _type_name(kwargs.get("type_v"))
        params, note = params_for_mode(file, mode, *self._types, sfi_params, fidelity)
        self.auto_found, self.notes = "", [note] if note else []
        self.engine: Engine | None = None
        self.last_step: StepInfo | None = None
        kwargs["flash_attn"] = True
        kwargs["n_threads"] = kwargs.get("n_threads") or physical_cores()
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]  # llama-cpp-python's own is all CPUs of the machine
        log.verbose = kwargs.setdefault("verbose", False)
        super().__init__(os.fspath(model_path), **kwargs)
        self.why_stock = self._why_not() or self._attach(file, params)

    @property
    def steps(self) -> Stats | None:
        return self.engine.stats() if self.engine else None

    def reset_steps(self) -> None:
        """Start the counts of ``steps`` anew."""
        if self.engine:
            self.engine.reset_stats()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the first ``n_tokens`` of the cache: one is a step, several are a prefill."""
        if self.engine is None:
            return super().eval(tokens)
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        tokens = list(tokens)
        if len(tokens) == 1 and self.n_tokens > 0:
            self.last_step = self.engine.step(tokens[0], "dense" if self.mode == "dense" else "auto")
        elif tokens:
            self.engine.prefill(tokens)
        self.input_ids[self.n_tokens:self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self._requires_eval = False

    def close(self) -> None:
        """Free engine, context and model. May be called twice, and after a failed load."""
        if getattr(self, "engine", None):
            self.engine.close()
        if hasattr(self, "_stack"):
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mode": self.mode, "sfi_params": self._given_params, "fidelity": self._given_fidelity}

    def _why_not(self) -> str:
        if self.mode == "stock":
            return "mode is stock"
        if self._logits_all:
            return "logits_all and draft models need the logits of every token"
        return ""

    def _attach(self, file: GgufFile, params: SfiParams) -> str:
        """Attach the engine; returns why not, where mode ``auto`` allows that."""
        try:
            if self._given_params:
                self._attach_with(file, params)
            else:
                self._attach_default(file, params)
            return ""
        except (ModelError, ContextError, KvTypeError, BackendError) as error:
            if self.mode != "auto":
                raise
            return str(error)

    def _attach_default(self, file: GgufFile, params: SfiParams) -> None:
        """With the default policy, or with the one that every device has."""
        try:
            self._attach_with(file, params.fit_context(self.n_ctx()))
        except BackendError:
            self._attach_with(file, SfiParams.of(PORTABLE_POLICY).fit_context(self.n_ctx()))

    def _attach_with(self, file: GgufFile, params: SfiParams) -> None:
        params.check_context(self.n_ctx())
        depth = (params.auto_depth or auto_depth(params)) if self.mode == "auto" else 0
        self.engine = Engine(self.ctx, params.replace(auto_depth=depth), owner=self._ctx)
        if self.mode == "auto":
            self._tune_auto(file, params)

    def _tune_auto(self, file: GgufFile, params: SfiParams) -> None:
        """Take the measured depth in place of the rule's."""
        n_ctx, layers = self.n_ctx(), self.model_params.n_gpu_layers
        model = Model(file, self._model, None, mode="auto", n_ctx=n_ctx, n_threads=self.n_threads, type_k=self._types[0],
                      type_v=self._types[1], params=params, fit_budget=False, gpu_layers=None if layers == ALL_LAYERS else layers,
                      find_auto_depth=auto_depth_of)
        depth = model.tune_auto(n_ctx).auto_depth
        self.auto_found, self.notes = model.auto_found, [*self.notes, *model.notes]
        if self.auto_found:
            self.engine.params = params.replace(auto_depth=depth)


def _type_name(ggml_type: int | None) -> str:
    """Of a type of K or V as llama-cpp-python numbers them; the number where sfi has no kernels for it."""
    names = {number: name for name, number in GGML_TYPES.items()}
    return "f16" if ggml_type is None else names.get(ggml_type, str(ggml_type))
