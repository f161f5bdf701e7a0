"""One sequence of one llama_context: its lock, the tokens in its KV cache, its mode, and how a step is done.

The context can be replaced by a larger one: the cells move, nothing is computed again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, Iterator, Sequence, TypeVar

from sfi_local.binding import context as native
from sfi_local.binding.context import N_BATCH
from sfi_local.binding.engine import Engine, StepInfo
from sfi_local.binding.interrupt import InterruptFlag
from sfi_local.binding.library import claim_process, last_log_lines, open_library
from sfi_local.errors import AbortedError, ContextFullError, DecodeError, DetachedError, ModelError, SfiError
from sfi_local.machine import available_memory
from sfi_local.params import SfiParams
from sfi_local.runtime.access import CANCELLED, Access, Turns
from sfi_local.runtime.modes import Attached, Mode, attach, mode_of
from sfi_local.runtime.ties import Noise

# (position, token, proposed kind, its reason) -> kind of the step: "slow", "fast", "dense" or "auto"
Schedule = Callable[[int, int, str, str], str]
Progress = Callable[[int, int], None]
T = TypeVar("T")


class Slot:
    """One sequence.

    make:     makes a llama_cpp._internals.LlamaContext of so many cells, see binding.context.maker()
    n_ctx:    cells of the context; 0: none yet, see grow()
    params:   of sfi, or a function of n_ctx that gives them
    portable: params of another policy, in their place where a device lacks the operations; None: refuse that
    n_limit:  cells to which a full context grows by itself; None: n_ctx
    weights:  the way into the weights, which are freed after it; None: whoever frees them closes the slot before

    tokens:   what the KV cache holds, in order
    engine:   None where sfi is not attached; why_stock: why not, where the mode asks for it
    fell_back: the portable params are in use
    n_prefilled: tokens of the last prefill
    n_drafted: of the last tokens, those that came by fast steps and are not verified (mode ``exact``)
    n_since_refresh: tokens since a support was chosen, where mode ``exact`` counts them
    noise:    how far verified batches lie from dense steps
    access:   one thread at a time, one generation at a time; a second gets BusyError, and after close() DetachedError
    Raises ModelError, KvTypeError, BackendError in modes ``sfi``, ``dense`` and ``exact``; OutOfMemoryError.
    """

    def __init__(self, make: Callable[[int], Any], n_ctx: int, mode: Mode | str, params: SfiParams | Callable[[int], SfiParams], *,
                 portable: SfiParams | None = None, n_limit: int | None = None, weights: Access | None = None):
        self.mode, self.n_ctx, self.n_limit = mode_of(mode), 0, n_limit or n_ctx
        self.tokens: list[int] = []
        self.n_prefilled = self.n_drafted = self.n_since_refresh = 0
        self.noise = Noise()
        self.access = Turns("model", self._drop_context, weights)
        self._llama, self._make = open_library().llama_cpp, make
        self._params_for = params if callable(params) else lambda n_ctx: params
        self._portable = portable
        self._context: Any = None
        self._attached = Attached(None, SfiParams())
        if n_ctx:
            self.grow(n_ctx)

    @property
    def context(self) -> Any:
        """llama_cpp._internals.LlamaContext; its logits are those of the last prefill or step."""
        return self._context

    @property
    def engine(self) -> Engine | None:
        return self._attached.engine

    @property
    def _sfi(self) -> Engine:
        """The engine, for what needs one."""
        if self.engine is None:
            raise ModelError(f"sfi is not attached to this context, which decodes by llama.cpp's own path: {self.why_stock or 'its mode is stock'}")
        return self.engine

    @property
    def params(self) -> SfiParams:
        return self._attached.params

    @property
    def why_stock(self) -> str:
        return self._attached.why_stock

    @property
    def fell_back(self) -> bool:
        return self._attached.fell_back

    def turn(self, items: Iterator[T]) -> Iterator[T]:
        """Pass on what items yields, all of it as one generation, see Turns.turn()."""
        return self.access.turn(items)

    def cancel(self) -> None:
        """End what is running, from any thread; it raises AbortedError, and the slot stays usable."""
        self.access.cancel()

    def close(self) -> None:
        """End what is running, wait for it, free the context. May be called twice."""
        self.access.close()

    def grow(self, n_ctx: int) -> None:
        """Take a context of n_ctx cells; those of the old one move.

        Raises as Slot does; what there was is there still, then.
        """
        with self.access:
            self._grow(n_ctx)

    def set_mode(self, mode: Mode | str, params: SfiParams | None = None) -> None:
        """Attach anew, for another mode or params; what is in the cache stays."""
        with self.access:
            self.mode = mode_of(mode)
            if params:
                self._params_for = lambda n_ctx: params
            self._attach()

    def set_auto_depth(self, depth: int) -> None:
        """Be slow-fast from another depth, in cells."""
        with self.access:
            self._attached = replace(self._attached, params=self.params.replace(auto_depth=depth))
            if self.engine:
                self.engine.params = self.engine.params.replace(auto_depth=depth)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keep the longest common prefix of the cache and tokens, drop the rest; returns its length.

        At least one token is left to be computed, because the logits of the last are needed.
        """
        with self.access:
            self._drop_drafts()
            n = 0
            while n < min(len(self.tokens), len(tokens) - 1) and self.tokens[n] == tokens[n]:
                n += 1
            self._cut(n)
            return len(self.tokens)

    def cut(self, n: int) -> None:
        """Keep the first n tokens; none where the state of the model cannot be cut."""
        with self.access:
            self._cut(n)

    def adopt(self, tokens: Sequence[int]) -> None:
        """The cache was filled from outside with these tokens."""
        with self.access:
            self.tokens = list(tokens)
            self._reconcile()

    def fill(self, compute: Callable[[], None], tokens: Sequence[int]) -> None:
        """Let others compute tokens after what the cache holds."""
        with self.access:
            try:
                compute()
            except BaseException as error:
                self._reconcile()
                if self.access.flag:
                    raise self._why_aborted(AbortedError(str(error))) from None
                raise
            self.tokens += tokens
            self._reconcile()

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None, more: bool = False) -> StepInfo:
        """Dense prefill of tokens after what the cache holds.

        more: another call follows, before any step, see Engine.prefill
        Ctrl-C and cancel() stop between two operations of the graph; the cache then holds what was done.
        Raises ContextFullError, DecodeError, BusyError, AbortedError.
        """
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContextFullError(f"The context has {self.n_ctx} tokens and {len(self.tokens) + len(tokens)} are needed: shorten the "
                                   f"prompt, or make the context larger.")
        start = time.perf_counter()
        self.noise.forget()
        with self.access, InterruptFlag() as interrupt:
            self._reconcile()
            if progress:
                progress(0, len(tokens))  # now it begins: what came before, measuring for mode auto, is over
            self.tokens += tokens
            try:
                with native.interruptible(self._context, lambda: interrupt.requested or bool(self.access.flag), self.access.flag):
                    self._prefill(list(tokens), lambda n, total: self._report(interrupt, progress, n, total), more)
            except AbortedError as error:
                raise self._why_aborted(error) from None
            finally:
                self._reconcile()
        depth, self.n_prefilled, self.n_since_refresh = len(self.tokens), len(tokens), 0
        return StepInfo("prefill", "", depth - 1, depth, depth, 1000 * (time.perf_counter() - start))

    def step(self, token: int, schedule: Schedule | None = None) -> StepInfo:
        """One token through the model. Raises ContextFullError, DecodeError, BusyError, AbortedError."""
        with self.access:
            if len(self.tokens) >= self.n_ctx:
                self._make_room()
            self.tokens.append(token)
            try:
                return self._stock_step(token) if self.engine is None else self._engine_step(token, schedule)
            except AbortedError as error:
                self._reconcile()
                raise self._why_aborted(error) from None
            except BaseException:
                self._reconcile()
                raise

    def can_draft(self, token: int) -> bool:
        """Whether a fast step may be taken now: there is a support, room in its window, and depth enough."""
        kind, reason = self._sfi.peek(token)
        return kind == "fast" or reason == "boundary"

    def draft(self, token: int) -> StepInfo:
        """A fast step whose token is to be verified or taken back."""
        self.n_drafted += 1  # first, so that after an interrupt at any point no draft passes for a sure token
        return replace(self.step(token, lambda *_: "fast"), reason="")

    def verify(self, tokens: Sequence[int], refresh: bool) -> StepInfo:
        """One dense pass over tokens, all but the last of which the cache holds; row i of the logits follows token i.

        refresh: the pass ends with a new support
        """
        with self.access:
            known = len(tokens) - 1
            try:
                info = self._sfi.verify(tokens, known, refresh)
            except AbortedError as error:
                self._drop_drafts()
                raise self._why_aborted(error) from None
            except SfiError:
                self._drop_drafts()
                raise
            self.tokens[len(self.tokens) - known:] = tokens
            self.n_drafted = 0
            return info

    def rollback(self, n: int) -> None:
        """Take back the last n tokens; the support stays."""
        with self.access:
            self._sfi.rollback(n)
            del self.tokens[len(self.tokens) - n:]

    def save(self) -> bytes:
        """The cells of all tokens, for load(); needs no more memory than they have."""
        with self.access:
            return bytes(native.sequence_state(self._context))

    def load(self, tokens: Sequence[int], state: bytes) -> bool:
        """Put back what save() gave when the slot held these tokens; False, and an empty slot, if it does not fit this context.

        The bytes are trusted: those of a stranger must be checked before.
        """
        with self.access:
            return self._put(tokens, state)

    def _grow(self, n_ctx: int) -> None:
        tokens, state, old = self.tokens, self._take(n_ctx), self.n_ctx
        self._drop_context()
        try:
            self._open(n_ctx)
        except SfiError:
            if old:
                self._open(old)
            raise
        finally:
            self.tokens = []
            if state is not None and self._context is not None:
                self._put(tokens, state)

    def _take(self, n_ctx: int) -> Any:
        """The cells of the tokens, to be put into a context of n_ctx cells; None if there are none, or no memory to hold them beside it."""
        self._drop_drafts_if_any()
        if not self.tokens:
            return None
        free, size = available_memory(), native.sequence_size(self._context)
        grown = size * (n_ctx - self.n_ctx) // len(self.tokens)  # by which the new context is larger
        if free is not None and size + grown > free:
            return None
        return native.sequence_state(self._context)

    def _put(self, tokens: Sequence[int], state: Any) -> bool:
        if native.set_sequence_state(self._context, state):
            self.tokens = list(tokens)
            self._reconcile()
            return True
        self._llama.llama_memory_clear(self._memory, True)
        self.tokens = []
        return False

    def _open(self, n_ctx: int) -> None:
        claim_process()
        self._context = self._make(n_ctx)
        self._memory = self._llama.llama_get_memory(self._context.ctx)
        self.access.flag.watch(self._context)
        try:
            self._attach(n_ctx)
        except SfiError:
            self._drop_context()
            raise
        self.n_ctx = n_ctx

    def _attach(self, n_ctx: int = 0) -> None:
        if self.engine:
            self.engine.close()
        self._attached = Attached(None, self.params)
        self._attached = attach(self.mode, self._context, self._params_for(n_ctx or self.n_ctx), self._portable)

    def _drop_context(self) -> None:
        if self.engine:
            self.engine.close()
        self._attached = replace(self._attached, engine=None)
        if self._context is not None:
            self._context.close()
        self._context, self.n_ctx = None, 0

    def _make_room(self) -> None:
        if self.n_ctx >= self.n_limit:
            raise ContextFullError(f"The context of {self.n_ctx} tokens is full: begin anew, or make it larger.")
        self._grow(min(self.n_limit, 2 * self.n_ctx))

    def _cut(self, n: int) -> None:
        if n < len(self.tokens) and not self._llama.llama_memory_seq_rm(self._memory, 0, n, -1):
            n = 0  # recurrent state cannot be cut
            self._llama.llama_memory_clear(self._memory, True)
        del self.tokens[n:]

    def _drop_drafts_if_any(self) -> None:
        if self.n_drafted:
            self._drop_drafts()

    def _drop_drafts(self) -> None:
        if self.n_drafted:
            del self.tokens[max(0, len(self.tokens) - self.n_drafted):]
            self.n_drafted = 0
        self._reconcile()

    def _engine_step(self, token: int, schedule: Schedule | None) -> StepInfo:
        kind = self.mode.kind(self._sfi, token)
        if schedule:
            proposed = (kind, "forced") if kind == "dense" else self._sfi.peek(token)
            kind = schedule(len(self.tokens) - 1, token, *proposed)
        return self._sfi.step(token, kind)

    def _stock_step(self, token: int) -> StepInfo:
        start = time.perf_counter()
        self._decode([token])
        depth = len(self.tokens)
        return StepInfo("stock", "", depth - 1, depth, depth, 1000 * (time.perf_counter() - start))

    def _prefill(self, tokens: list[int], report: Callable[[int, int], bool], more: bool) -> None:
        if self.engine:
            return self.engine.prefill(tokens, progress=report, more=more)
        for i in range(0, len(tokens), N_BATCH):
            if not report(i, len(tokens)):
                raise AbortedError("The prefill was stopped.")
            self._decode(tokens[i:i + N_BATCH])

    def _report(self, interrupt: InterruptFlag, progress: Progress | None, n_done: int, n_total: int) -> bool:
        if progress:
            progress(n_done, n_total)
        return not interrupt.requested and not self.access.flag

    def _decode(self, tokens: list[int]) -> None:
        """Plain llama_decode, waited for."""
        status = native.decode(self._context, tokens)
        if status == 1:
            raise ContextFullError("The KV cache has no free cell: begin anew, or make the context larger.")
        if status == 2:
            raise AbortedError("The step was stopped.")
        if status:
            raise DecodeError(f"llama_decode failed with {status} ({last_log_lines() or 'no message'}).")

    def _why_aborted(self, error: AbortedError) -> SfiError:
        if self.access.closed:
            return DetachedError("This model was closed while it computed: load it again.")
        return AbortedError(CANCELLED) if self.access.flag else error

    def _reconcile(self) -> None:
        """Make cache and token list agree, also after an interrupt at any point."""
        n_cells = self._llama.llama_memory_seq_pos_max(self._memory, 0) + 1
        if n_cells < len(self.tokens):
            del self.tokens[n_cells:]
        elif n_cells > len(self.tokens):
            self._llama.llama_memory_seq_rm(self._memory, 0, len(self.tokens), -1)
