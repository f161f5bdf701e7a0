"""One sequence of one llama_context: its lock, the tokens in its KV cache, its mode, and how a step is done.

The context can be replaced by a larger one: the cells move, nothing is computed again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, Iterator, Sequence, TypeVar

from sfi_local.binding import context as native
from sfi_local.binding import state as kept
from sfi_local.binding.context import N_BATCH
from sfi_local.binding.engine import Engine, StepInfo
from sfi_local.binding.interrupt import InterruptFlag
from sfi_local.binding.library import claim_process, last_log_lines, open_library
from sfi_local.errors import AbortedError, ArgumentError, ContextError, ContextFullError, DecodeError, DetachedError, ModelError, SfiError
from sfi_local.machine import available_memory
from sfi_local.params import SfiParams
from sfi_local.runtime.access import CANCELLED, Access, Turns
from sfi_local.runtime.draft_length import Costs
from sfi_local.runtime.keeper import MIN_GAIN, MIN_KEEP, Keeper, Saving
from sfi_local.runtime.modes import Attached, Mode, attach, mode_of
from sfi_local.runtime.recent import Text
from sfi_local.runtime.ties import Noise
from sfi_local.store.prefix_files import BLOCK
from sfi_local.store.prefixes import common, is_off

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
    keeper:   keeps what is read in the prefix store; None: nothing is kept

    tokens:   what the KV cache holds, in order
    engine:   None where sfi is not attached; why_stock: why not, where the mode asks for it
    fell_back: the portable params are in use
    n_prefilled: tokens of the last prefill
    cached_from: where reuse() found the first tokens: ``memory`` (this context), ``disk`` (the prefix store) or None
    why_read: why it found no more, in a few words; ""
    n_drafted: of the last tokens, those that came by fast steps and are not verified (mode ``exact``)
    n_since_refresh: tokens since a support was chosen, where mode ``exact`` counts them
    noise:    how far verified batches lie from dense steps
    costs:    what steps and batches cost, where mode ``exact`` follows it
    fast_costs: what fast steps cost alone and together, where guesses are tried
    access:   one thread at a time, one generation at a time; a second gets BusyError, and after close() DetachedError
    Raises ModelError, KvTypeError, BackendError in modes ``sfi``, ``dense`` and ``exact``; OutOfMemoryError.
    """

    def __init__(self, make: Callable[[int], Any], n_ctx: int, mode: Mode | str, params: SfiParams | Callable[[int], SfiParams], *,
                 portable: SfiParams | None = None, n_limit: int | None = None, weights: Access | None = None, keeper: Keeper | None = None):
        self.mode, self.n_ctx, self.n_limit = mode_of(mode), 0, n_limit or n_ctx
        self.tokens: list[int] = []
        self.n_prefilled = self.n_drafted = self.n_since_refresh = 0
        self.cached_from: str | None = None
        self.why_read = ""
        self.noise, self.costs, self.fast_costs, self.keeper = Noise(), Costs(), Costs(), keeper
        self._n_kept = 0                    # tokens that the last kept text has in common with these
        self._blocks: list[str] = []        # names of the blocks in the store that hold the first tokens
        self._saving: Saving | None = None
        self.access = Turns("model", self._drop_context, weights)
        self._llama, self._make = open_library().llama_cpp, make
        self._params_for = params if callable(params) else lambda n_ctx: params
        self._portable = portable
        self._context: Any = None
        self._n_threads: int | None = None  # that were set; None: those it was made with
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
        """Pass on what items yields, all of it as one generation, see Turns.turn(); what was read for it is kept."""
        return self.access.turn(self._keeping(items) if self.keeper else items)

    def cancel(self) -> None:
        """End what is running, from any thread; it raises AbortedError, and the slot stays usable."""
        self.access.cancel()

    def set_threads(self, n: int) -> None:
        """Compute with so many threads from now on, until the context grows; by who steps it, between two steps."""
        if self._context is not None and n != self._n_threads:
            self._llama.llama_set_n_threads(self._context.ctx, n, n)
            self._n_threads = n

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

        What the prefix store has more of tokens is put there. At least one token is left to be computed, because the logits of the
        last are needed.
        """
        with self.access:
            self._drop_drafts()
            n = common(self.tokens, tokens[:-1])
            self.cached_from, self.why_read = "memory" if n else None, ""
            if not self._turn_back(tokens[:-1], n) and not self._fetch(tokens[:-1], n):
                self._put_aside(n)
                self._cut(n)
            return len(self.tokens)

    def keep(self, wait: bool = False) -> None:
        """Give the tokens to the prefix store, if there are enough of them and some are new; returns when their rows were taken, and a
        thread writes. Nothing happens without a keeper, or where the memory of the model is no plain KV cache. wait: until all is written"""
        with self.access:
            self._drop_drafts_if_any()
            self._wait_for_saving()
            self._keep()
            if wait:
                self._wait_for_saving()

    def cut(self, n: int) -> None:
        """Keep the first n tokens; none where the state of the model cannot be cut."""
        with self.access:
            self._cut(n)

    def adopt(self, tokens: Sequence[int], state: bytes = b"") -> None:
        """The cache was filled from outside with these tokens. state: of their fast steps, if it is known; see binding.state"""
        with self.access:
            self._forget()
            self.tokens = list(tokens)
            self._reconcile()
            if self.engine and state:
                kept.set_state(self.engine, state)  # where it does not serve, the next step is slow

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
        with self.access:
            kind, reason = self._sfi.peek(token)
            return kind == "fast" or reason == "boundary"

    def can_verify(self, token: int) -> bool:
        """Whether a pass may be taken now: no slow step is due."""
        with self.access:
            kind, reason = self._sfi.peek(token)
            return kind != "slow" or reason == "boundary"

    def draft(self, token: int) -> StepInfo:
        """A fast step whose token is to be verified or taken back."""
        self.n_drafted += 1  # first, so that after an interrupt at any point no draft passes for a sure token
        return replace(self.step(token, lambda *_: "fast"), reason="")

    @property
    def can_try(self) -> bool:
        """Whether several tokens can take their fast steps together."""
        with self.access:
            return (self.engine is not None and self.mode.fast and not self.mode.verifies and self.params.policy == "sketch"
                    and self.engine.path == "native")

    def try_fast(self, tokens: Sequence[int]) -> list[StepInfo]:
        """Fast steps of tokens, of which the first is sure, in one pass: as many as come before the window moves, one at least.

        Row i of the logits follows token i. The guesses among them that are wrong must be taken back.
        """
        with self.access:
            n = len(self.tokens)
            self.n_drafted = len(tokens) - 1  # first, so that after an interrupt at any point no guess passes for a sure token
            self.tokens += tokens
            try:
                infos = self._sfi.step_fast(tokens)
            except AbortedError as error:
                self._drop_drafts()
                raise self._why_aborted(error) from None
            except BaseException:
                self._drop_drafts()
                raise
            del self.tokens[n + len(infos):]
            self.n_drafted = len(infos) - 1
            return infos

    def take_back_guesses(self, n: int) -> None:
        """Of the tokens of try_fast() the last n are wrong, the others are sure."""
        if n:
            self.rollback(n)
        self.n_drafted = 0

    def verify(self, tokens: Sequence[int], n_known: int, refresh: bool) -> StepInfo:
        """One dense pass over tokens, in place of the last n_known that the cache holds; row i of the logits follows token i.

        Those of the tokens that turn out wrong are taken back. refresh: the pass ends with a new support
        """
        with self.access:
            try:
                info = self._sfi.verify(tokens, n_known, refresh)
            except AbortedError as error:
                self._drop_drafts()
                raise self._why_aborted(error) from None
            except SfiError:
                self._drop_drafts()
                raise
            self.tokens[len(self.tokens) - n_known:] = tokens
            self.n_drafted = 0
            return info

    def rollback(self, n: int) -> None:
        """Take back the last n tokens; the support stays."""
        with self.access:
            self._sfi.rollback(n)
            del self.tokens[len(self.tokens) - n:]
            self._trim()

    def save(self) -> bytes:
        """The cells of all tokens, for load(); needs no more memory than they have."""
        with self.access:
            return bytes(native.sequence_state(self._context))  # for a context with or without sfi, of any mode

    def load(self, tokens: Sequence[int], state: bytes) -> bool:
        """Put back what save() gave when the slot held these tokens; False, and an empty slot, if it does not fit this context.

        The bytes are trusted: those of a stranger must be checked before.
        """
        with self.access:
            return self._put(tokens, state)

    def _keeping(self, items: Iterator[T]) -> Iterator[T]:
        """The items of a generation. A long prompt is kept behind the first of them, for the rest may take long, and everything at its end."""
        first = True
        try:
            for item in items:
                yield item
                if first and self.n_prefilled >= MIN_KEEP and not self.access.is_freed:
                    self._keep()
                first = False
        finally:
            items.close()  # type: ignore[attr-defined]  # generators, all of them
            if self._context is not None and not self.access.is_freed:  # by who closed it between two items
                self._drop_drafts_if_any()
                self._keep()

    def _put_aside(self, n: int) -> None:
        """Keep in memory what is going to be cut behind the first n tokens, if it is much and there is room."""
        if self.keeper is None or self._context is None or len(self.tokens) - n < MIN_KEEP or is_off():
            return
        try:
            if self.keeper.recent.room_for(kept.rows_size(self._context, len(self.tokens))):
                state = kept.get_state(self.engine) if self.engine else b""
                rows = kept.all_rows(self._context, len(self.tokens))
                self.keeper.recent.put(Text(list(self.tokens), rows, state, list(self._blocks), self._n_kept))
        except (SfiError, MemoryError, OSError):
            pass  # it is on the disk, or read again

    def _turn_back(self, tokens: Sequence[int], n_have: int) -> bool:
        """Put what this process has of tokens in memory into the context, if that is more than what is there, and as much as is on the disk."""
        if self.keeper is None or len(tokens) < n_have + MIN_GAIN or len(tokens) > self.n_ctx:
            return False
        n, text = self.keeper.recent.find(tokens)
        if text is None or n < n_have + MIN_GAIN:
            return False
        found = self.keeper.find(tokens) if n < len(tokens) - MIN_GAIN else None
        if found and found.n >= n + MIN_GAIN:
            return False
        self._wait_for_saving()
        self._put_aside(n_have)
        self._cut(0)
        kept.add_rows(self._context, text.tokens[:n], text.rows, len(text.tokens))
        self.tokens = text.tokens[:n]
        if text.state and self.engine:
            kept.set_state(self.engine, text.state)
        self._n_kept = min(n, text.n_kept)
        self._blocks = text.blocks[:self._n_kept // BLOCK]
        self.cached_from = "memory"
        return True

    def _fetch(self, tokens: Sequence[int], n_have: int) -> bool:
        """Put what the store has of tokens into the context, if that is more than the n_have that are there."""
        if self.keeper is None or len(tokens) < n_have + MIN_GAIN or len(tokens) > self.n_ctx:
            return False
        self._wait_for_saving()
        found = self.keeper.find(tokens)
        if found is None or found.n < n_have + MIN_GAIN:
            self.why_read = self.keeper.why_not(tokens) if n_have < MIN_GAIN else ""
            return False
        try:
            row_size = kept.rows_size(self._context, 1)
        except (ModelError, ContextError):
            return False  # nothing of it can be kept either
        self._keep()
        self._wait_for_saving()
        self._put_aside(n_have)
        self._cut(0)
        n, state = self.keeper.fetch(found, self._add_rows, row_size)
        if n and state and self.engine:
            kept.set_state(self.engine, state)  # where it does not serve, the end of the prefill makes another
        self._blocks, self._n_kept = list(found.head.blocks[:n // BLOCK]), n
        self.cached_from = "disk" if n else None
        if n < len(tokens):
            self.why_read = self.keeper.why_differs(found, tokens) if n == found.n < len(found.tokens) else ""
        return True

    def _add_rows(self, tokens: Sequence[int], rows: Any, n_rows: int) -> None:
        kept.add_rows(self._context, tokens, rows, n_rows)
        self.tokens += tokens

    def _keep(self) -> None:
        """As keep(), inside a call or a turn."""
        if self.keeper is None or self._context is None or len(self.tokens) < MIN_KEEP or len(self.tokens) <= self._n_kept:
            return
        self._wait_for_saving()
        try:
            size = kept.rows_size(self._context, 1)
            state = kept.get_state(self.engine) if self.engine else b""
            n_new = len(self.tokens) - BLOCK * len(self._blocks)
            self._saving = self.keeper.save(self.tokens, self._blocks, self._rows(len(self._blocks), size), state, n_new * size + len(state))
        except (SfiError, MemoryError):
            return  # what cannot be kept is read again
        self._n_kept = len(self.tokens)

    def _rows(self, n_blocks: int, size: int) -> Iterator[bytearray]:
        """The rows of each block after the first n_blocks, then of the tokens that fill none. size: of a row, in bytes"""
        for first in range(n_blocks * BLOCK, len(self.tokens) + 1, BLOCK):
            rows = bytearray(min(BLOCK, len(self.tokens) - first) * size)
            if rows:
                kept.get_rows(self._context, first, len(rows) // size, rows)
            yield rows

    def _wait_for_saving(self) -> None:
        """Take over what is in the store then; where nothing is, the next time all is given to it."""
        if self._saving:
            names, self._saving = self._saving.names(), None
            self._blocks, self._n_kept = (names[:self._n_kept // BLOCK], self._n_kept) if names is not None else ([], 0)

    def _grow(self, n_ctx: int) -> None:
        self._drop_drafts_if_any()
        tokens, old = self.tokens, self.n_ctx
        if not tokens or not self._fits_beside(n_ctx):
            self._drop_context()
        context, attached = self._context, self._attached
        self._context, self._attached = None, replace(attached, engine=None)
        try:
            self._open(n_ctx)
        except BaseException as error:
            if context is not None:
                self._context, self._attached, self.n_ctx = context, attached, old
                self._watch()
            else:
                self._forget()
                if old and isinstance(error, SfiError):
                    self._open(old)
            raise
        if context is None:
            self._forget()
        else:
            self._move(tokens, context, attached.engine)

    def _fits_beside(self, n_ctx: int) -> bool:
        """Whether there is memory for a context of n_ctx cells while that of now is there."""
        free, size = available_memory(), native.sequence_size(self._context)
        return free is None or size * n_ctx // len(self.tokens) <= free

    def _move(self, tokens: list[int], context: Any, engine: Engine | None) -> None:
        """Take over the cells of another context and what its fast steps need, and free it."""
        self.tokens = []
        try:
            try:
                kept.copy_rows(context, self._context, tokens)
                if engine and self.engine and (state := kept.get_state(engine)):
                    kept.set_state(self.engine, state)
                self.tokens = tokens
                self._reconcile()
            except (ModelError, ContextError):
                self._put(tokens, native.sequence_state(context))
        finally:
            if engine:
                engine.close()
            context.close()
            self._trim()

    def _put(self, tokens: Sequence[int], state: Any) -> bool:
        if not native.set_sequence_state(self._context, state):
            self._llama.llama_memory_clear(self._memory, True)
            self._forget()
            return False
        self.tokens = list(tokens)
        self._reconcile()
        return True

    def _forget(self) -> None:
        """No tokens, and none of these in the store."""
        self.tokens, self._blocks, self._n_kept = [], [], 0

    def _open(self, n_ctx: int) -> None:
        claim_process()
        self._context, self._n_threads = self._make(n_ctx), None
        self._watch()
        try:
            self._attach(n_ctx)
        except SfiError:
            self._drop_context()
            raise
        self.n_ctx = n_ctx

    def _watch(self) -> None:
        self._memory = self._llama.llama_get_memory(self._context.ctx)
        self.access.flag.watch(self._context)

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
        if n < len(self.tokens) and not self._taken_back(len(self.tokens) - n) and not self._llama.llama_memory_seq_rm(self._memory, 0, n, -1):
            n = 0  # recurrent state cannot be cut
            self._llama.llama_memory_clear(self._memory, True)
        del self.tokens[n:]
        self._trim()

    def _taken_back(self, n: int) -> bool:
        """Whether the engine took back the last n tokens, so that a support that does not list them stays."""
        try:
            if self.engine:
                self.engine.rollback(n)
            return self.engine is not None
        except (ArgumentError, ContextError, DecodeError):
            return False

    def _trim(self) -> None:
        """Of what is kept as much as there still is."""
        self._n_kept = min(self._n_kept, len(self.tokens))
        del self._blocks[self._n_kept // BLOCK:]

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
            self._trim()
        elif n_cells > len(self.tokens):
            self._llama.llama_memory_seq_rm(self._memory, 0, len(self.tokens), -1)
