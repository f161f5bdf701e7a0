"""One context that is measured in several modes: all of them decode from the same state of the same cache."""

from __future__ import annotations

from typing import Any, Sequence

from sfi_local.binding.context import logits, maker
from sfi_local.errors import ModelError
from sfi_local.params import MAX_QUERIES, SfiParams
from sfi_local.runtime.slot import Progress, Slot


class SwitchSession(Slot):
    """A session whose mode can be changed; what is in the cache stays.

    The trunk is the text that every mode begins with. It is prefilled once, in mode ``dense``, as ``prefill`` of the parameters says;
    its last tokens are computed again in each mode, because the end of a prefill is what gives sfi its first support.
    """

    def __init__(self, model: Any, n_ctx: int, params: SfiParams, kv_type: str):
        super().__init__(maker(model.weights, model.n_threads, kv_type, kv_type, n_ubatch=model.n_ubatch), n_ctx, "stock", params)
        self.kv_type, self.trunk, self.read_by = kv_type, [], params.fit_context(n_ctx)

    def __enter__(self) -> "SwitchSession":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def n_tail(self) -> int:
        """Tokens of the trunk that each mode computes again."""
        return min(MAX_QUERIES, len(self.trunk))

    def use(self, mode: str, params: SfiParams | None = None) -> None:
        """Attach or detach sfi. Raises ModelError where the model cannot be sparse, in every mode but stock."""
        self.set_mode(mode, params)
        if self.why_stock:
            raise ModelError(self.why_stock)

    def set_trunk(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Prefill a trunk; what it has in common with the last one is not computed again."""
        self.use("dense", self.read_by)
        n = 0
        while n < min(len(self.trunk) - self.n_tail, len(tokens)) and self.trunk[n] == tokens[n]:
            n += 1
        self.cut(n)
        self.trunk = self.trunk[:n]
        if len(tokens) > n:
            self.prefill(tokens[n:], progress)
        self.trunk = list(tokens)

    def cut_back(self, mode: str, params: SfiParams | None = None) -> list[int]:
        """Begin a mode: the cache holds the trunk but for its tail, which is returned."""
        self.use(mode, params)
        self.cut(len(self.trunk) - self.n_tail)
        return self.trunk[len(self.tokens):]

    def begin(self, mode: str, params: SfiParams | None = None) -> None:
        """Begin a mode: the cache holds the trunk, and the logits are those after it."""
        tail = self.cut_back(mode, params)
        if tail:
            self.prefill(tail)

    def last_logits(self) -> Any:
        """The logits of the last prefill or step, float32 [n_vocab]: a view, valid until the next."""
        return logits(self.context, -1)


class Sessions:
    """A SwitchSession per KV type and way of reading, made when first asked for and freed together. kv_type: where none is named."""

    def __init__(self, model: Any, n_ctx: int, params: SfiParams, kv_type: str):
        self._model, self._n_ctx, self._params, self._kv_type = model, n_ctx, params, kv_type
        self._sessions: dict[tuple[Any, ...], SwitchSession] = {}

    def __enter__(self) -> "Sessions":
        return self

    def __exit__(self, *_: Any) -> None:
        for session in self._sessions.values():
            session.close()

    def at(self, kv_type: str | None, params: SfiParams, trunk: Sequence[int], progress: Progress | None = None) -> SwitchSession:
        """The session of a KV type with a trunk in its cache, prefilled as these parameters say if it was another."""
        kind = (kv_type or self._kv_type, *params.reading.values())
        if kind not in self._sessions:
            read_by = self._params.replace(**{"prefill": "exact", **params.reading})
            self._sessions[kind] = SwitchSession(self._model, self._n_ctx, read_by, kind[0])
        session = self._sessions[kind]
        if session.trunk != list(trunk):
            session.set_trunk(trunk, progress)
        return session
