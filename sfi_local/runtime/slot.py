"""One sequence in one context: the KV cache, the tokens in it, and how a step is done in each mode.

modes: ``stock`` plain llama_decode, sfi never attached; ``dense`` every step dense with our kernel; ``sfi`` slow-fast
at every depth; ``auto`` slow-fast from the depth where it pays, below it dense with what is faster (on a GPU llama.cpp's
own attention), stock (with the reason in ``why_stock``) where the model cannot be sparse; ``exact`` fast steps whose
tokens a dense pass verifies (exact.py), below the depth where that can pay the steps of ``dense``.
"""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Sequence

from sfi_local.binding.context import N_BATCH, new_context
from sfi_local.binding.engine import Engine, StepInfo
from sfi_local.binding.interrupt import InterruptFlag
from sfi_local.binding.library import last_log_lines, open_library
from sfi_local.errors import (AbortedError, BackendError, BusyError, ContextError, ContextFullError, DecodeError, DetachedError,
                              KvTypeError, ModelError, SfiError)
from sfi_local.params import SfiParams, auto_depth
from sfi_local.runtime.ties import Noise

MODES = ("auto", "sfi", "dense", "exact", "stock")

# (position, token, proposed kind, its reason) -> kind of the step: "slow", "fast", "dense" or "auto"
Schedule = Callable[[int, int, str, str], str]
Progress = Callable[[int, int], None]


class Session:
    """A context of n_ctx cells on loaded weights.

    weights: llama_cpp._internals.LlamaModel, kept alive as long as the session
    tokens:  what the KV cache holds, in order
    n_prefilled: tokens of the last prefill
    turn:    number of the current generation; a generator that sees another number has lost the cache
    n_drafted: of the last tokens, those that came by fast steps and are not verified (mode ``exact``)
    n_since_refresh: tokens since a support was chosen, where mode ``exact`` counts them
    noise:   how far verified batches lie from dense steps
    Raises ModelError, KvTypeError, BackendError in modes ``sfi``, ``dense`` and ``exact``; OutOfMemoryError.
    """

    def __init__(self, weights: Any, n_ctx: int, mode: str, params: SfiParams, n_threads: int,
                 type_k: str = "f16", type_v: str = "f16"):
        self.n_ctx, self.mode, self.params = n_ctx, mode, params
        self.tokens: list[int] = []
        self.why_stock, self.n_prefilled, self.turn, self.n_drafted, self.n_since_refresh, self.noise = "", 0, 0, 0, 0, Noise()
        self._llama = open_library().llama_cpp
        self._context = new_context(self._llama, weights, n_ctx, n_threads, type_k, type_v)
        self._memory = self._llama.llama_get_memory(self._context.ctx)
        self._lock = threading.Lock()
        try:
            self.engine = self._attach()
        except SfiError:
            self._context.close()
            raise

    @property
    def context(self) -> Any:
        """llama_cpp._internals.LlamaContext; its logits are those of the last prefill or step."""
        return self._context

    def close(self) -> None:
        """Free the context; what is still generating from it gets DetachedError. May be called twice."""
        if self.engine:
            self.engine.close()
        self._context.close()

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keep the longest common prefix of the cache and tokens, drop the rest; returns its length.

        At least one token is left to be computed, because the logits of the last are needed.
        """
        with self._exclusive():
            return self._reuse(tokens)

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> StepInfo:
        """Dense prefill of tokens after what the cache holds.

        Ctrl-C stops between two operations of the graph; the cache then holds what was done.
        Raises ContextFullError, DecodeError, BusyError.
        """
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContextFullError(f"The context has {self.n_ctx} tokens and {len(self.tokens) + len(tokens)} are "
                                   f"needed: shorten the prompt or raise --ctx.")
        start = time.perf_counter()
        self.noise.forget()
        with self._exclusive(), self._interruptible() as flag:
            self._reconcile()
            self.tokens += tokens
            try:
                self._prefill(list(tokens), lambda n, total: _report(flag, progress, n, total))
            finally:
                self._reconcile()
        depth, self.n_prefilled, self.n_since_refresh = len(self.tokens), len(tokens), 0
        return StepInfo("prefill", "", depth - 1, depth, depth, 1000 * (time.perf_counter() - start))

    def step(self, token: int, schedule: Schedule | None = None) -> StepInfo:
        """One token through the model. Raises ContextFullError, DecodeError, BusyError."""
        with self._exclusive():
            if len(self.tokens) >= self.n_ctx:
                raise ContextFullError(f"The context of {self.n_ctx} tokens is full: raise --ctx or start anew.")
            self.tokens.append(token)
            try:
                return self._stock_step(token) if self.engine is None else self._engine_step(token, schedule)
            except SfiError:
                self._reconcile()
                raise

    def can_draft(self, token: int) -> bool:
        """Whether a fast step may be taken now: there is a support, room in its window, and depth enough."""
        kind, reason = self.engine.peek(token)
        return kind == "fast" or reason == "boundary"

    def draft(self, token: int) -> StepInfo:
        """A fast step whose token is to be verified or taken back."""
        self.n_drafted += 1  # first, so that after an interrupt at any point no draft passes for a sure token
        return replace(self.step(token, lambda *_: "fast"), reason="")

    def verify(self, tokens: Sequence[int], refresh: bool) -> StepInfo:
        """One dense pass over tokens, all but the last of which the cache holds; row i of the logits follows token i.

        refresh: the pass ends with a new support
        """
        with self._exclusive():
            known = len(tokens) - 1
            try:
                info = self.engine.verify(tokens, known, refresh)
            except SfiError:
                self._drop_drafts()
                raise
            self.tokens[len(self.tokens) - known:] = tokens
            self.n_drafted = 0
            return info

    def rollback(self, n: int) -> None:
        """Take back the last n tokens; the support stays."""
        with self._exclusive():
            self.engine.rollback(n)
            del self.tokens[len(self.tokens) - n:]

    def _drop_drafts(self) -> None:
        if self.n_drafted:
            del self.tokens[max(0, len(self.tokens) - self.n_drafted):]
            self.n_drafted = 0
        self._reconcile()

    def _reuse(self, tokens: Sequence[int]) -> int:
        self._drop_drafts()
        self.turn += 1
        n = 0
        while n < min(len(self.tokens), len(tokens) - 1) and self.tokens[n] == tokens[n]:
            n += 1
        if n < len(self.tokens) and not self._llama.llama_memory_seq_rm(self._memory, 0, n, -1):
            n = 0  # recurrent state cannot be cut
            self._llama.llama_memory_clear(self._memory, True)
        del self.tokens[n:]
        return n

    def _attach(self) -> Engine | None:
        if self.mode == "stock":
            return None
        depth = (self.params.auto_depth or auto_depth(self.params)) if self.mode in ("auto", "exact") else 0
        try:
            engine = Engine(self._context.ctx, self.params.replace(auto_depth=depth), owner=self._context)
            self._check_exact(engine)
            return engine
        except (ModelError, ContextError, KvTypeError, BackendError) as error:
            if self.mode != "auto":
                raise type(error)(f"{error} `--mode stock` decodes it with llama.cpp's own path.") from None
            self.why_stock = str(error)
            return None

    def _check_exact(self, engine: Engine) -> None:
        if self.mode == "exact" and engine.path != "native":
            engine.close()
            raise BackendError("Mode exact verifies drafts in batches, which a device of this model computes with other rounding "
                               "than single tokens: use mode dense, or mode sfi with --policy frozen.")

    def _engine_step(self, token: int, schedule: Schedule | None) -> StepInfo:
        # mode exact lets the schedule choose slow steps alone: what it calls dense may be rounded otherwise
        exact = self.mode == "exact" and (self.can_draft(token) or self.engine.peek(token)[0] == "dense")
        kind = "dense" if self.mode == "dense" or exact else "auto"
        if schedule:
            proposed = (kind, "forced") if kind == "dense" else self.engine.peek(token)
            kind = schedule(len(self.tokens) - 1, token, *proposed)
        return self.engine.step(token, kind)

    def _stock_step(self, token: int) -> StepInfo:
        start = time.perf_counter()
        self._decode([token])
        depth = len(self.tokens)
        return StepInfo("stock", "", depth - 1, depth, depth, 1000 * (time.perf_counter() - start))

    def _prefill(self, tokens: list[int], report: Callable[[int, int], bool]) -> None:
        if self.engine:
            return self.engine.prefill(tokens, progress=report)
        for i in range(0, len(tokens), N_BATCH):
            if not report(i, len(tokens)):
                raise AbortedError("The prefill was stopped.")
            self._decode(tokens[i:i + N_BATCH])

    def _decode(self, tokens: list[int]) -> None:
        """Plain llama_decode, waited for."""
        array = (self._llama.llama_token * len(tokens))(*tokens)
        status = self._llama.llama_decode(self._context.ctx, self._llama.llama_batch_get_one(array, len(tokens)))
        if status == 1:
            raise ContextFullError("The KV cache has no free cell: raise --ctx.")
        if status == 2:
            raise AbortedError("The step was stopped.")
        if status:
            raise DecodeError(f"llama_decode failed with {status} ({last_log_lines() or 'no message'}).")
        self._llama.llama_synchronize(self._context.ctx)

    def _reconcile(self) -> None:
        """Make cache and token list agree, also after an interrupt at any point."""
        n_cells = self._llama.llama_memory_seq_pos_max(self._memory, 0) + 1
        if n_cells < len(self.tokens):
            del self.tokens[n_cells:]
        elif n_cells > len(self.tokens):
            self._llama.llama_memory_seq_rm(self._memory, 0, len(self.tokens), -1)

    @contextmanager
    def _exclusive(self):
        """One thread at a time; the second is refused rather than queued behind minutes of work."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("Another thread is using this model: give each thread a model of its own, or take turns.")
        try:
            if self._context.ctx is None:
                raise DetachedError("This context was closed: generate anew.")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _interruptible(self):
        """Ctrl-C ends the running graph. Only in prefill: the callback costs too much in a step of few milliseconds."""
        with InterruptFlag() as flag:
            callback = self._llama.ggml_abort_callback(lambda user: flag.requested)
            self._llama.llama_set_abort_callback(self._context.ctx, callback, None)
            try:
                yield flag
            finally:
                none = ctypes.cast(None, self._llama.ggml_abort_callback)
                self._llama.llama_set_abort_callback(self._context.ctx, none, None)


def _report(flag: InterruptFlag, progress: Progress | None, n_done: int, n_total: int) -> bool:
    if progress:
        progress(n_done, n_total)
    return not flag.requested
