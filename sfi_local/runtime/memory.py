"""What a context costs in memory, and whether the machine has it beside a model's weights.

llama.cpp's part is reckoned from the metadata, no less than it takes; where that might not fit, or says too little, llama.cpp is
asked (binding/simulate.py). What sfi adds is reckoned from its parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Callable, Iterable, Sequence

from sfi_local.binding import gpu
from sfi_local.binding.context import N_BATCH, most_outputs
from sfi_local.binding.devices import all_native
from sfi_local.binding.simulate import Simulated, simulated
from sfi_local.errors import OutOfMemoryError, Remedy
from sfi_local.machine import available_memory, human_bytes
from sfi_local.params import SfiParams
from sfi_local.store import layout
from sfi_local.store.gguf_file import GgufFile
from sfi_local.store.layout import Layer

ANYWAY = Remedy("go on anyway with {}", "force", True)
MIN_CTX = 512          # a context smaller than this is of no use
MEMORY_SHARE = 0.9     # of the available memory, what weights and context may take
MOST_MAPPED = 4        # times that memory: weights of more are not worth waiting for
LONGEST_CTX = 1 << 24  # cells
PAD_CTX = 256          # llama.cpp makes contexts of multiples of this

OfLlama = Callable[[int], int]  # cells of a context -> bytes of its cache and of the buffers for computing


@dataclass(frozen=True)
class ContextCost:
    """Of contexts of one model.

    of_llama: llama.cpp's part
    params:   None: nothing is attached (mode stock)
    portable: a device has the support by a compact copy of its cells
    """

    of_llama: OfLlama
    layers: list[Layer]
    type_k: str
    type_v: str
    params: SfiParams | None
    portable: bool = False

    def bytes(self, n_ctx: int) -> int:
        """Of n_ctx cells: the KV cache, the buffers for computing, and what sfi adds."""
        size = self.of_llama(n_ctx)
        if self.params:
            size += layout.sfi_bytes(self.layers, self.params, n_ctx)
            size += layout.compact_bytes(self.layers, self.params, n_ctx, self.type_k, self.type_v) if self.portable else 0
        return size

    def cells(self, room: int) -> int:
        """The largest context that ``room`` bytes hold; cells."""
        return max(0, bisect_right(range(LONGEST_CTX), room, key=self.bytes) - 1)

    def of_type(self, kind: str) -> "ContextCost":
        """With another type of K and V."""
        def of_llama(n_ctx: int) -> int:
            now, then = (layout.kv_bytes(self.layers, _padded(n_ctx), k, v) for k, v in ((self.type_k, self.type_v), (kind, kind)))
            return self.of_llama(n_ctx) - now + then
        return replace(self, of_llama=of_llama, type_k=kind, type_v=kind)


def by_metadata(file: GgufFile, layers: list[Layer], type_k: str, type_v: str, n_ubatch: int = N_BATCH) -> OfLlama:
    """llama.cpp's part as the metadata says, and rather more than less: each layer holds every cell."""
    return lambda n_ctx: (layout.kv_bytes(layers, _padded(n_ctx), type_k, type_v)
                          + layout.compute_bytes(file, layers, _padded(n_ctx), n_ubatch, most_outputs(n_ubatch)))


def by_llama(file: GgufFile, type_k: str, type_v: str, n_most: int, gpu_layers: int | None = None, n_ubatch: int = N_BATCH) -> OfLlama | None:
    """llama.cpp's part as it says itself for a small context and one of n_most cells, a straight line between them (the true
    curve is bent downwards in between); None where it does not load the model."""
    n_most = max(_padded(n_most), 2 * MIN_CTX)
    with simulated(file.path, file.architecture, layout.n_vocab(file), gpu_layers) as model:
        ends = _ends(model, (MIN_CTX, n_most), type_k, type_v, n_ubatch)
    if not ends:
        return None
    least, most = map(sum, ends)
    return lambda n_ctx: least + (most - least) * (_padded(n_ctx) - MIN_CTX) // (n_most - MIN_CTX)


def caches_by_llama(file: GgufFile, kv_types: Iterable[str], contexts: Sequence[int]) -> dict[str, dict[int, int]] | None:
    """Bytes of the KV cache alone by type and cells, as llama.cpp says them; None where it does not load the model."""
    found = {}
    with simulated(file.path, file.architecture, layout.n_vocab(file)) as model:
        for kv_type in kv_types:
            ends = _ends(model, contexts, kv_type, kv_type)
            if not ends:
                return None
            (least, _), (most, _) = ends
            found[kv_type] = {n: least + (most - least) * (n - contexts[0]) // (contexts[-1] - contexts[0]) for n in contexts}
    return found


def _ends(model: Simulated | None, contexts: Sequence[int], type_k: str, type_v: str, n_ubatch: int = N_BATCH) -> list[tuple[int, int]]:
    """(cache, buffers) in bytes of the first context and of the last; [] where llama.cpp does not make them."""
    asked = [model.context_bytes(n, type_k, type_v, n_ubatch) for n in (contexts[0], contexts[-1])] if model else []
    return [size for size in asked if size] if None not in asked else []


def cost_of(of_llama: OfLlama, layers: list[Layer], mode: str, type_k: str, type_v: str, params: SfiParams, portable_params: SfiParams,
            on_gpus: bool) -> ContextCost:
    """With the policy that the devices leave, see Model._fall_back(). on_gpus: they hold layers"""
    if mode == "stock":
        return ContextCost(of_llama, layers, type_k, type_v, None)
    if all_native(params, on_gpus):
        return ContextCost(of_llama, layers, type_k, type_v, params)
    return ContextCost(of_llama, layers, type_k, type_v, portable_params, portable=True)


def exact_cost(file: GgufFile, cost: ContextCost, n_most: int, share: float, gpus: list[gpu.Gpu], gpu_layers: int | None,
               n_ubatch: int = N_BATCH) -> ContextCost:
    """The cost as llama.cpp says it, where it may decide what fits: contexts of up to n_most cells are to be judged."""
    if not layout.why_dense(cost.layers) and _surely_fits(file, cost.bytes(n_most), share, gpus):
        return cost
    of_llama = by_llama(file, cost.type_k, cost.type_v, n_most, gpu_layers, n_ubatch)
    return replace(cost, of_llama=of_llama) if of_llama else cost


@dataclass(frozen=True)
class Room:
    """What check_memory found.

    n_bytes:     for a context beside the weights; None: not known, or not to be looked at
    mapped_only: the weights must stay in the mapped file, of which the system can drop parts
    notes:       for the user, in sentences
    """

    n_bytes: int | None
    mapped_only: bool = False
    notes: list[str] = field(default_factory=list)


def check_memory(file: GgufFile, cost: ContextCost, n_ctx: int, share: float, gpus: list[gpu.Gpu], force: bool = False,
                 kv_host: bool = False) -> Room:
    """The room for a context beside the weights. Raises OutOfMemoryError where n_ctx cells do not fit.

    share: of the layers that the GPUs hold; kv_host: the host has K and V of all layers; force: go on with a note instead
    """
    rooms = []
    try:
        if share > 0:
            need = gpu.Need(str(file.path), file.n_bytes, 0 if kv_host else cost.bytes(n_ctx), share)
            on_gpus = gpu.room_for_context(need, gpus, len(cost.layers))
            rooms.append(Room(None if kv_host else on_gpus))
        if share < 1 or kv_host:
            rooms.append(_host_room(file, cost, n_ctx, 1 - share, 1 if kv_host else 1 - share))
    except OutOfMemoryError as error:
        if not force:
            raise
        return Room(None, mapped_only=True, notes=[f"Going on, as asked, though {error.sentence}."])
    return Room(min((room.n_bytes for room in rooms if room.n_bytes is not None), default=None),
                any(room.mapped_only for room in rooms), [note for room in rooms for note in room.notes])


def fitting_context(file: GgufFile) -> int | None:
    """Cells of the largest context that the free memory holds beside a model, up to what it was trained on; 0: not even the
    smallest; None: the system does not tell."""
    available, layers = available_memory(), layout.layers(file)
    if available is None:
        return None
    cost = ContextCost(by_metadata(file, layers, "f16", "f16"), layers, "f16", "f16", SfiParams())
    n_fit = cost.cells(max(0, int(MEMORY_SHARE * available) - file.n_bytes))
    return min(n_fit, file.n_ctx_train) if n_fit >= MIN_CTX else 0


def _surely_fits(file: GgufFile, size: int, share: float, gpus: list[gpu.Gpu]) -> bool:
    available = available_memory()
    whole = file.n_bytes + size
    on_gpus = not share or share * whole <= gpu.MEMORY_SHARE * sum(g.free for g in gpus)
    return on_gpus and (share == 1 or available is None or (1 - share) * whole <= MEMORY_SHARE * available)


def _host_room(file: GgufFile, cost: ContextCost, n_ctx: int, of_weights: float, of_context: float) -> Room:
    """The weights are mapped, so the system can drop parts of them and read them again; a context must fit.

    of_weights, of_context: shares of them that the host holds
    """
    available = available_memory()
    if available is None:
        return Room(None)
    usable, size, weights = int(MEMORY_SHARE * available), int(of_context * cost.bytes(n_ctx)), int(of_weights * file.n_bytes)
    if size > usable:
        raise OutOfMemoryError(
            f"{file.path} needs {human_bytes(size)} for a context of {n_ctx} tokens, {human_bytes(size - usable)} more "
            f"than can be used here", *_what_fits(cost, n_ctx, int(usable / of_context)), Remedy("close programs"), ANYWAY)
    if weights > MOST_MAPPED * usable:
        raise OutOfMemoryError(
            f"{file.path} needs {human_bytes(weights)} for its weights, {human_bytes(weights - usable)} more "
            f"than can be used here", Remedy("take a smaller quantisation"), Remedy("take a smaller model"), ANYWAY)
    room = Room(int(max(usable - weights, usable // 2, size) / of_context))
    if weights + size <= usable:
        return room
    return replace(room, mapped_only=True, notes=[
        f"The weights ({human_bytes(weights)}) do not fit beside the context ({human_bytes(size)}) into the "
        f"{human_bytes(available)} of free memory: what is missing is read from the disk again at each step, which is slow. A smaller "
        f"quantisation of the model is faster here."])


def _what_fits(cost: ContextCost, n_ctx: int, room: int) -> list[Remedy]:
    """What to do where n_ctx cells do not fit."""
    ways = []
    for kind, of_type in (("", cost), ("q8_0", cost.of_type("q8_0"))):
        cells = min(n_ctx, of_type.cells(room)) // PAD_CTX * PAD_CTX
        if cells >= MIN_CTX and (not kind or kind not in (cost.type_k, cost.type_v)):
            ways.append(Remedy(f"use {{}} with K and V as {kind}" if kind else "use {}", "n_ctx", cells))
    return ways or [Remedy("take a smaller model")]


def _padded(n_ctx: int) -> int:
    return -(-n_ctx // PAD_CTX) * PAD_CTX
