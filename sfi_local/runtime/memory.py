"""What a context costs in memory, and whether the machine has it beside a model's weights."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from sfi_local.binding import gpu
from sfi_local.binding.context import N_BATCH
from sfi_local.binding.devices import all_native
from sfi_local.errors import OutOfMemoryError
from sfi_local.machine import available_memory, human_bytes
from sfi_local.params import SfiParams
from sfi_local.store import layout
from sfi_local.store.gguf_file import GgufFile
from sfi_local.store.layout import Layer

MEMORY_SHARE = 0.9     # of the available memory, what weights and context may take
LONGEST_CTX = 1 << 24  # cells


@dataclass(frozen=True)
class ContextCost:
    """Of contexts of one model.

    params:   None: nothing is attached (mode stock)
    portable: a device has the support by a compact copy of its cells
    """

    layers: list[Layer]
    type_k: str
    type_v: str
    params: SfiParams | None
    portable: bool = False

    def bytes(self, n_ctx: int) -> int:
        """Of n_ctx cells: the KV cache, a prefill batch's mask in F32 and F16, and what sfi adds."""
        size = layout.kv_bytes(self.layers, n_ctx, self.type_k, self.type_v) + 6 * N_BATCH * n_ctx
        if self.params:
            size += layout.sfi_bytes(self.layers, self.params, n_ctx)
            size += layout.compact_bytes(self.layers, self.params, n_ctx, self.type_k, self.type_v) if self.portable else 0
        return size

    def cells(self, room: int) -> int:
        """The largest context that ``room`` bytes hold; cells."""
        return max(0, bisect_right(range(LONGEST_CTX), room, key=self.bytes) - 1)


def cost_of(layers: list[Layer], mode: str, type_k: str, type_v: str, params: SfiParams, portable_params: SfiParams,
            on_gpus: bool) -> ContextCost:
    """With the policy that the devices leave, see Model._fall_back(). on_gpus: they hold layers"""
    if mode == "stock":
        return ContextCost(layers, type_k, type_v, None)
    if all_native(params, on_gpus):
        return ContextCost(layers, type_k, type_v, params)
    return ContextCost(layers, type_k, type_v, portable_params, portable=True)


def check_memory(file: GgufFile, cost: ContextCost, n_ctx: int, share: float, gpus: list[gpu.Gpu]) -> int | None:
    """Bytes left for a context beside the weights; None if the system does not tell. Raises OutOfMemoryError where n_ctx cells do not fit.

    share: of the layers that the GPUs hold
    """
    size = cost.bytes(n_ctx)
    rooms = []
    if share > 0:
        rooms.append(gpu.room_for_context(gpu.Need(str(file.path), file.n_bytes, size, share), gpus, len(cost.layers)))
    if share < 1:
        rooms.append(_check_host_memory(file, size, n_ctx, 1 - share))
    return min((room for room in rooms if room is not None), default=None)


def _check_host_memory(file: GgufFile, size: int, n_ctx: int, share: float) -> int | None:
    """Bytes that a context may have beside the weights, of which the host's memory holds a share; None: not known."""
    available = available_memory()
    if available is None:
        return None
    usable = int(MEMORY_SHARE * available)
    if share * (file.n_bytes + size) > usable:
        raise OutOfMemoryError(
            f"{file.path} needs {human_bytes(file.n_bytes + size)} (weights {human_bytes(file.n_bytes)}, context of {n_ctx} "
            f"tokens {human_bytes(size)}), {human_bytes(int(share * (file.n_bytes + size)) - usable)} more than can be used here: "
            f"close programs, lower --ctx, use --kv-type q8_0, or take a smaller quantisation of the model.")
    return int(usable / share) - file.n_bytes
