"""Slow-fast steps on a llama_context: the only file that touches cffi.

One thread at a time may be inside a context. A second one gets BusyError and nothing happens; different contexts may
be used by different threads. Objects may be freed in any order: the library notices a context that is gone
(DetachedError), and an Engine keeps alive what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Callable, Mapping, Sequence

from sfi_local.binding.library import open_library
from sfi_local.errors import SfiError, from_status
from sfi_local.params import POLICIES, PREFILLS, SELECTORS, SfiParams

PREFILL = 0  # enum sfi_phase
KINDS = {"auto": 0, "slow": 1, "fast": 2, "dense": 3}


@dataclass(frozen=True)
class StepInfo:
    """What one step did; the fields of ``struct sfi_step_info``, t_ms in milliseconds.

    tail_mass: of a fast step of policy sketch, the attention mass that the sketch stood in for, mean over all heads
    """

    kind: str
    reason: str
    pos: int
    depth: int
    n_cells: int
    t_ms: float
    tail_mass: float = 0.0


@dataclass(frozen=True)
class LayerInfo:
    """One layer as the library sees it; kv_cell_bytes are the bytes of K and V of one cell, all KV heads.

    path: ``native`` (our operations), ``portable`` (ggml's own) or ``none``, if the layer is not sparse
    """

    sparse: bool
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    kv_cell_bytes: int
    why: str
    path: str


@dataclass(frozen=True)
class Stability:
    """The last refresh of one layer and KV head; NaN where there was no set before.

    evidence: attention mass on all candidates; mass, mass_prev: shares of it that the new and the previous
    ``selected`` captured; jaccard: overlap of the two
    """

    n_selected: int
    evidence: float
    mass: float
    mass_prev: float
    jaccard: float


@dataclass(frozen=True)
class Tail:
    """What the last fast step of policy sketch left to the sketch in one layer, for one query head.

    mass: share of its attention outside of the support; logit_error: root mean square error of a sketched logit, by the fit
    """

    mass: float
    logit_error: float


@dataclass(frozen=True)
class Stats:
    """Counts since attach or reset; times in milliseconds, kv_read and kv_dense in bytes."""

    n_slow: int
    n_fast: int
    n_dense: int
    n_prefill: int
    reasons: dict[str, int]
    ms_slow: float
    ms_fast: float
    ms_dense: float
    ms_prefill: float
    kv_read: int
    kv_dense: int
    n_verify: int = 0
    n_verified: int = 0
    ms_verify: float = 0.0

    @property
    def kv_read_share(self) -> float:
        """Bytes of K and V that the steps read, over those that dense steps would have read; 1.0 before any step."""
        return self.kv_read / self.kv_dense if self.kv_dense else 1.0


class Engine:
    """Slow-fast decoding attached to a llama_context.

    llama_context: address of the context (``Llama.ctx``, an int)
    owner:         any object that must live as long as the engine, e.g. the one that owns the context
    Raises ModelError, ContextError, KvTypeError, BackendError, ArgumentError, OutOfMemoryError.
    """

    def __init__(self, llama_context: int, params: SfiParams = SfiParams(), owner: Any = None):
        native = open_library()
        _define_callbacks()
        self._ffi, self._lib, self._owner = native.ffi, native.lib, owner
        out = self._ffi.new("struct sfi **")
        context = self._ffi.cast("struct llama_context *", llama_context)
        self._sfi = self._ffi.NULL
        structs = _to_native(params.validate())  # one points to the other
        self._check(self._lib.sfi_attach(context, structs[0], out))
        self._sfi = self._ffi.gc(out[0], self._lib.sfi_free)

    def close(self) -> None:
        """Detach; the context stays usable. May be called twice."""
        if self._sfi != self._ffi.NULL:
            self._ffi.release(self._sfi)
            self._sfi = self._ffi.NULL

    def prefill(self, tokens: Sequence[int], seq: int = 0, progress: Callable[[int, int], bool | None] | None = None,
                more: bool = False) -> None:
        """Dense prefill after what the sequence holds; the last queries choose the first support.

        more: the text goes on with another call, so nothing is chosen and no logits are kept
        progress: called with (tokens done, tokens in all) between batches; False stops with AbortedError, the tokens
        done so far stay in the cache.
        """
        guarded = _Guarded(progress or (lambda n_done, n_total: True))
        array, user = self._ffi.new("llama_token[]", tokens), self._ffi.new_handle(guarded)
        prefill = self._lib.sfi_prefill_part if more else self._lib.sfi_prefill
        status = prefill(self._handle(), seq, array, len(tokens), self._lib.sfi_progress_py, user)
        if guarded.error:
            raise guarded.error
        self._check(status)

    def step(self, token: int, kind: str = "auto", seq: int = 0) -> StepInfo:
        """One token through the model; the logits of the next are then ready in the context."""
        info = _sized("struct sfi_step_info")
        self._check(self._lib.sfi_step(self._handle(), seq, token, KINDS[kind], info))
        return self._step_info(info)

    def step_many(self, tokens: Mapping[int, int], kind: str = "auto") -> list[StepInfo]:
        """One token each of several sequences, {sequence: token}, in one pass over the weights.

        The logits after the i-th of them are then row i of the context; each step takes its share of the time.
        """
        ffi, n = self._ffi, len(tokens)
        infos = ffi.new("struct sfi_step_info[]", n)
        if n:
            infos[0].struct_size = ffi.sizeof("struct sfi_step_info")
        self._check(self._lib.sfi_step_many(self._handle(), ffi.new("struct sfi_next[]", list(tokens.items())), n, KINDS[kind], infos))
        return [self._step_info(info) for info in infos]

    def step_fast(self, tokens: Sequence[int], seq: int = 0) -> list[StepInfo]:
        """The next tokens of a sequence by fast steps in one pass over the weights: as many as come before the window moves, one at least.

        The logits after the i-th are row i of the context. Raises NoSupportError where the next step must be slow or dense.
        """
        ffi, n = self._ffi, len(tokens)
        infos = ffi.new("struct sfi_step_info[]", max(1, n))
        infos[0].struct_size = ffi.sizeof("struct sfi_step_info")
        done = self._check(self._lib.sfi_step_fast(self._handle(), seq, ffi.new("llama_token[]", tokens), n, infos))
        return [self._step_info(info) for info in infos[0:done]]

    def verify(self, tokens: Sequence[int], n_replaced: int, refresh: bool = True, seq: int = 0) -> StepInfo:
        """Dense attention for tokens in one batch, in place of the last n_replaced of the sequence.

        The logits after token i are then row i of the context. With refresh the pass ends with a new support.
        """
        info, array = _sized("struct sfi_step_info"), self._ffi.new("llama_token[]", tokens)
        self._check(self._lib.sfi_verify(self._handle(), seq, array, len(tokens), n_replaced, refresh, info))
        return self._step_info(info)

    def rollback(self, n: int, seq: int = 0) -> None:
        """Take back the last n tokens; the support stays valid where it does not list them."""
        self._check(self._lib.sfi_rollback(self._handle(), seq, n))

    def peek(self, token: int, seq: int = 0) -> tuple[str, str]:
        """(kind, reason) that the schedule would choose for this token now; nothing is computed."""
        kind, reason = self._ffi.new("enum sfi_step_kind *"), self._ffi.new("enum sfi_reason *")
        self._check(self._lib.sfi_peek(self._handle(), seq, token, kind, reason))
        return self._kind_name(kind[0]), self._reason_name(reason[0])

    def invalidate(self, seq: int = 0) -> None:
        """Drop the support of a sequence: its next step is slow."""
        self._check(self._lib.sfi_invalidate(self._handle(), seq))

    def cancel(self) -> None:
        """From any thread: the call that is inside ends with AbortedError, after the operation that computes now."""
        self._lib.sfi_cancel(self._handle())

    @property
    def params(self) -> SfiParams:
        out = _sized("struct sfi_params")
        self._check(self._lib.sfi_get_params(self._handle(), out))
        return _from_native(out, out.research)

    @params.setter
    def params(self, params: SfiParams) -> None:
        """Supports are dropped, so the next step is slow."""
        structs = _to_native(params.validate())  # one points to the other
        self._check(self._lib.sfi_set_params(self._handle(), structs[0]))

    def layers(self) -> list[LayerInfo]:
        """Every layer, and why it stays dense if it does."""
        out = _sized("struct sfi_layer")
        return [self._layer(il, out) for il in range(self._lib.sfi_n_layer(self._handle()))]

    @property
    def path(self) -> str:
        """Whose operations make the support: ``native``, ``portable``, or ``mixed`` where layers differ."""
        paths = {layer.path for layer in self.layers() if layer.sparse}
        return paths.pop() if len(paths) == 1 else "mixed"

    def memory(self) -> int:
        """Bytes that sfi adds to the context."""
        return self._lib.sfi_memory(self._handle())

    def selected(self, layer: int, head_kv: int, seq: int = 0) -> tuple[list[int], list[int]]:
        """(cells, positions) selected for one layer and KV head, in no particular order."""
        handle = self._handle()
        n = self._check(self._lib.sfi_get_selected(handle, seq, layer, head_kv, self._ffi.NULL, self._ffi.NULL, 0))
        n = max(n, self.params.n_selected)
        cells, positions = self._ffi.new("int32_t[]", n), self._ffi.new("int32_t[]", n)
        n = self._check(self._lib.sfi_get_selected(handle, seq, layer, head_kv, cells, positions, n))
        return list(cells[0:n]), list(positions[0:n])

    def stability(self, layer: int, head_kv: int, seq: int = 0) -> Stability:
        """How the last refresh of one layer and KV head compares with the one before."""
        out = _sized("struct sfi_stability")
        self._check(self._lib.sfi_get_stability(self._handle(), seq, layer, head_kv, out))
        return Stability(out.n_selected, out.evidence, out.mass, out.mass_prev, out.jaccard)

    def tail(self, layer: int, head: int, seq: int = 0) -> Tail:
        """What the last fast step left to the sketch; raises NoSupportError where there is no sketch."""
        out = _sized("struct sfi_tail")
        self._check(self._lib.sfi_get_tail(self._handle(), seq, layer, head, out))
        return Tail(out.mass, out.logit_error)

    def stats(self) -> Stats:
        """Counts of steps, reasons, times and bytes since attach or the last reset."""
        s = _sized("struct sfi_stats")
        self._check(self._lib.sfi_get_stats(self._handle(), s))
        reasons = {self._reason_name(i): n for i, n in enumerate(s.n_reason) if i and n}
        return Stats(s.n_slow, s.n_fast, s.n_dense, s.n_prefill, reasons, s.us_slow / 1000, s.us_fast / 1000,
                     s.us_dense / 1000, s.us_prefill / 1000, s.kv_read, s.kv_dense, s.n_verify, s.n_verified,
                     s.us_verify / 1000)

    def reset_stats(self) -> None:
        self._check(self._lib.sfi_reset_stats(self._handle()))

    def _handle(self) -> Any:
        if self._sfi == self._ffi.NULL:
            raise from_status("SFI_ERR_DETACHED", "This engine was closed: attach a new one to the context.")
        return self._sfi

    def _layer(self, il: int, out: Any) -> LayerInfo:
        self._check(self._lib.sfi_get_layer(self._handle(), il, out))
        return LayerInfo(out.sparse, out.n_head, out.n_head_kv, out.n_embd_head_k, out.n_embd_head_v,
                         out.kv_cell_bytes, self._ffi.string(out.why).decode(), _path_name(out.path))

    def _step_info(self, info: Any) -> StepInfo:
        return StepInfo(self._kind_name(info.kind), self._reason_name(info.reason), info.pos, info.depth,
                        info.n_cells, info.t_us / 1000, info.tail_mass)

    def _kind_name(self, kind: int) -> str:
        return self._ffi.string(self._lib.sfi_kind_name(kind)).decode()

    def _reason_name(self, reason: int) -> str:
        """The name of a reason; "" for a fast step, which needs none."""
        return self._ffi.string(self._lib.sfi_reason_name(reason)).decode() if reason else ""

    def _check(self, status: int) -> int:
        """Pass a count or SFI_OK on; turn a negative status into its exception."""
        if status >= 0:
            return status
        raise status_error(status)


def status_error(status: int) -> SfiError:
    """The exception of a negative status, with the library's own sentence."""
    native = open_library()
    name = native.ffi.string(native.lib.sfi_status_name(status)).decode()
    return from_status(name, native.ffi.string(native.lib.sfi_last_error()).decode("utf-8", errors="replace"))


def device_path(device: int, params: SfiParams) -> tuple[str, str]:
    """(path of layers on this device of ggml, what it lacks if that is ``none``), see ``sfi_device_path()``."""
    native = open_library()
    lacks = native.ffi.new("const char **")
    structs = _to_native(params.validate())  # one points to the other
    path = _path_name(native.lib.sfi_device_path(device, structs[0], lacks))
    return path, native.ffi.string(lacks[0]).decode()


def device_operations(device: int) -> tuple[str, ...]:
    """Our operations that this device of ggml computes itself, by name."""
    native = open_library()
    return tuple(native.ffi.string(native.lib.sfi_device_operations(device)).decode().split())


def _path_name(path: int) -> str:
    native = open_library()
    return native.ffi.string(native.lib.sfi_path_name(path)).decode()


def default_params() -> SfiParams:
    """The library's defaults."""
    return policy_params("sketch")


def policy_params(policy: str) -> SfiParams:
    """The library's defaults of a policy (``sfi_default_params()``, ``sfi_default_research()``)."""
    params, research = _default_structs(policy)
    return _from_native(params, research)


def _sized(struct: str) -> Any:
    """A new struct that knows its size, as the library wants it."""
    ffi = open_library().ffi
    return ffi.new(f"{struct} *", {"struct_size": ffi.sizeof(struct)})


def _default_structs(policy: str) -> tuple[Any, Any]:
    native = open_library()
    params, research = _sized("struct sfi_params"), _sized("struct sfi_research")
    if native.lib.sfi_default_params(params, POLICIES[policy]) or native.lib.sfi_default_research(research):
        raise SfiError(native.ffi.string(native.lib.sfi_last_error()).decode())
    return params, research


def _struct_of(name: str, params: Any, research: Any) -> Any:
    """Which of the two structs has a field of SfiParams: to its user they are one."""
    return params if name in dir(params) else research


_NUMBERS = [f.name for f in fields(SfiParams) if f.name not in ("policy", "selector", "prefill")]


def _to_native(params: SfiParams) -> tuple[Any, Any]:
    """A ``struct sfi_params *`` with the values of params, and the ``struct sfi_research *`` that it points to."""
    out, research = _default_structs(params.policy)
    research.selector = SELECTORS[params.selector]
    out.prefill = PREFILLS[params.prefill]
    for name in _NUMBERS:
        setattr(_struct_of(name, out, research), name, getattr(params, name))
    out.research = research
    return out, research


def _from_native(params: Any, research: Any) -> SfiParams:
    numbers = {name: getattr(_struct_of(name, params, research), name) for name in _NUMBERS}
    numbers = {n: round(v, 6) if isinstance(v, float) else v for n, v in numbers.items()}  # float is 32 bits in C
    return SfiParams(policy=_name_of(POLICIES, params.policy), selector=_name_of(SELECTORS, research.selector),
                     prefill=_name_of(PREFILLS, params.prefill), **numbers)


def _name_of(names: dict[str, int], number: int) -> str:
    return next(name for name, n in names.items() if n == number)


@lru_cache
def _define_callbacks() -> None:
    """Give the library its way back into Python; once per process."""
    native = open_library()

    @native.ffi.def_extern()
    def sfi_progress_py(user: Any, phase: int, done: int, total: int) -> bool:
        return native.ffi.from_handle(user)(phase, done, total)


class _Guarded:
    """A progress callback whose exception survives the native code between it and its caller."""

    def __init__(self, function: Callable[[int, int], bool | None]):
        self.function, self._last = function, (0, 1)
        self.error: BaseException | None = None

    def __call__(self, phase: int, done: int, total: int) -> bool:
        if phase == PREFILL:
            self._last = done, total
        try:
            return self.function(*self._last) is not False  # while a sketch is fitted nothing more is read
        except BaseException as error:
            self.error = error
            return False
