"""The GPUs that the loaded library can use, and what of a model they hold."""

from __future__ import annotations

from ctypes import byref, c_size_t
from dataclasses import dataclass

from sfi_local.binding.devices import GPU_TYPES, Ggml
from sfi_local.binding.library import LIB_DIR
from sfi_local.errors import ArgumentError, OutOfMemoryError, Remedy
from sfi_local.machine import human_bytes

MEMORY_SHARE = 0.95  # of the free memory, what weights and KV cache may take; the rest is for what kernels need


@dataclass(frozen=True)
class Gpu:
    """free, total: bytes of its memory."""

    name: str
    description: str
    free: int
    total: int


@dataclass(frozen=True)
class Need:
    """Bytes of a model: its weights and its context, and the share of the layers that GPUs hold."""

    what: str
    weights: int
    context: int
    share: float


def gpus() -> list[Gpu]:
    """GPUs of the loaded library; none of a build without a GPU backend."""
    ggml, found = Ggml(), []
    for device in ggml.devices(*GPU_TYPES):
        free, total = c_size_t(), c_size_t()
        ggml.backend_dev_memory(device, byref(free), byref(total))
        name, description = (text(device).decode(errors="replace").strip()
                             for text in (ggml.backend_dev_name, ggml.backend_dev_description))
        found.append(Gpu(name, description, free.value, total.value))
    return found


def backends() -> list[str]:
    """The GPU backends that this build has, e.g. ``cuda``."""
    known = ("cuda", "hip", "metal", "musa", "opencl", "sycl", "vulkan")
    return [name for name in known if any(LIB_DIR.glob(f"*ggml-{name}*"))]


def usable(gpu_layers: int | None) -> tuple[list[Gpu], str]:
    """(the GPUs for so many layers, a note where none can be used though the build has a backend for them).

    Raises ArgumentError where layers were asked for and there is no GPU for them.
    """
    found = [] if gpu_layers == 0 else gpus()
    if found or gpu_layers == 0:
        return found, ""
    built = backends()
    if gpu_layers:
        why = (f"the {', '.join(built)} backend of this build finds none: is the driver there, and new enough" if built else
               "this build has no backend for one: build with e.g. CMAKE_ARGS=\"-DLLAMA_BUILD=OFF -DGGML_CUDA=ON\"")
        raise ArgumentError(f"There is no GPU for {gpu_layers} layers; {why}", Remedy("leave {} out to decode on the CPU", "gpu_layers"))
    return [], (f"The {', '.join(built)} backend of this build finds no GPU (is the driver there, and new enough?): decoding on the "
                f"CPU. With no layers for a GPU this is not said." if built else "")


def share_of(n_layer: int, gpu_layers: int | None, found: list[Gpu]) -> float:
    """The share of a model that GPUs hold; gpu_layers as llama.cpp counts them, the output being one more layer."""
    if not found:
        return 0.0
    return 1.0 if gpu_layers is None else min(1.0, gpu_layers / (n_layer + 1))


def room_for_context(need: Need, found: list[Gpu], n_layer: int) -> int:
    """Bytes that a context may have beside the weights. Raises OutOfMemoryError if the needed one does not fit."""
    usable = int(MEMORY_SHARE * sum(g.free for g in found))
    wanted = int(need.share * (need.weights + need.context))
    if wanted > usable:
        whole = max(1, need.weights + need.context)
        fit = max(0, int(usable * (n_layer + 1) / whole))
        names = " and ".join(f"{g.description} ({human_bytes(g.free)} free)" for g in found)
        raise OutOfMemoryError(
            f"{need.what} needs {human_bytes(wanted)} on the GPU (weights {human_bytes(int(need.share * need.weights))}, context "
            f"{human_bytes(int(need.share * need.context))}), {human_bytes(wanted - usable)} more than {names} can give",
            *_smaller_contexts(need), Remedy("keep layers on the CPU with {}", "gpu_layers", fit))
    return int((usable - need.share * need.weights) / need.share)


def _smaller_contexts(need: Need) -> list[Remedy]:
    """What makes a context take less of a GPU; nothing where it is not there."""
    if not need.context:
        return []
    return [Remedy("use {}", "type_k", "q8_0"), Remedy("lower {}", "n_ctx"), Remedy("leave K and V in the host's memory with {}", "kv_host", True)]
