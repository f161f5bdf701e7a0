"""SlowFastLlama: llama-cpp-python's Llama, decoding slow-fast. One changed import:

    from sfi_local import SlowFastLlama as Llama

Chat completion, streaming, grammars, tools and caches are llama-cpp-python's own and unchanged.
"""

from __future__ import annotations

import os
from typing import Any, Sequence

from sfi_local.library import open_library

open_library()  # before llama_cpp is imported: it must run on our library

from llama_cpp import Llama  # noqa: E402

from sfi_local.engine import Engine, Stats, StepInfo  # noqa: E402
from sfi_local.errors import (ArgumentError, BackendError, ContextError, KvTypeError, ModelError)  # noqa: E402
from sfi_local.gguf_file import read_gguf  # noqa: E402
from sfi_local.library import log  # noqa: E402
from sfi_local.machine import physical_cores  # noqa: E402
from sfi_local.params import PORTABLE_POLICY, SfiParams, auto_depth  # noqa: E402
from sfi_local.session import MODES as SESSION_MODES  # noqa: E402

MODES = tuple(mode for mode in SESSION_MODES if mode != "exact")


class SlowFastLlama(Llama):
    """``llama_cpp.Llama`` whose single tokens are slow, fast or dense steps.

    mode:       ``auto`` (slow-fast from the depth where it pays), ``sfi``, ``dense`` or ``stock``
    sfi_params: budget, schedule and selector; None: the defaults, made smaller where n_ctx is, and of policy frozen where a
                device of the model lacks the operations of the default one
    Everything else is as in llama_cpp.Llama, except that flash attention is always on and that n_threads is one per
    physical core unless given.

    last_step:  StepInfo of the latest decode step, None before it
    steps:      Stats since the model was loaded or ``reset_steps()``; None where sfi is not attached
    why_stock:  why decoding is llama.cpp's own, "" if it is not: mode ``stock``, a model that cannot be sparse (in mode
                ``auto``), or ``logits_all`` / a draft model, which need the logits of every token
    Raises ArgumentError (embedding), ModelFileError, and in modes ``sfi`` and ``dense`` ModelError, KvTypeError,
    BackendError. One thread at a time: a second gets BusyError.
    """

    def __init__(self, model_path: str, *, mode: str = "auto", sfi_params: SfiParams | None = None, **kwargs: Any):
        if mode == "exact":
            raise ArgumentError("SlowFastLlama has no mode exact, which must see the sampler draw several tokens at once: use "
                                "sfi_local.load(..., mode=\"exact\"), or mode dense.")
        if mode not in MODES:
            raise ArgumentError(f"mode is {mode!r}: choose one of {', '.join(MODES)}.")
        if kwargs.get("embedding"):
            raise ArgumentError("SlowFastLlama decodes text and makes no embeddings: use llama_cpp.Llama for them.")
        read_gguf(model_path)
        self.mode, self._given_params = mode, sfi_params
        self.engine: Engine | None = None
        self.last_step: StepInfo | None = None
        kwargs["flash_attn"] = True
        kwargs["n_threads"] = kwargs.get("n_threads") or physical_cores()
        log.verbose = kwargs.setdefault("verbose", False)
        super().__init__(os.fspath(model_path), **kwargs)
        self.why_stock = self._why_not() or self._attach()

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
        return {**super().__getstate__(), "mode": self.mode, "sfi_params": self._given_params}

    def _why_not(self) -> str:
        if self.mode == "stock":
            return "mode is stock"
        if self._logits_all:
            return "logits_all and draft models need the logits of every token"
        return ""

    def _attach(self) -> str:
        """Attach the engine; returns why not, where mode ``auto`` allows that."""
        try:
            if self._given_params:
                self._attach_with(self._given_params)
            else:
                self._attach_default()
            return ""
        except (ModelError, ContextError, KvTypeError, BackendError) as error:
            if self.mode != "auto":
                raise
            return str(error)

    def _attach_default(self) -> None:
        """With the default policy, or with the one that every device has."""
        try:
            self._attach_with(SfiParams().fit_context(self.n_ctx()))
        except BackendError:
            self._attach_with(SfiParams.of(PORTABLE_POLICY).fit_context(self.n_ctx()))

    def _attach_with(self, params: SfiParams) -> None:
        params.check_context(self.n_ctx())
        depth = auto_depth(params) if self.mode == "auto" else 0
        self.engine = Engine(self.ctx, params.replace(auto_depth=depth), owner=self._ctx)
