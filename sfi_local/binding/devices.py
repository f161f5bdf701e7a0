"""The devices that ggml sees, which of our operations each computes itself, and how each can have a support."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

from sfi_local.binding.engine import device_path
from sfi_local.binding.library import open_library
from sfi_local.params import POLICIES, SfiParams

_F32, _F16, _I8, _I32 = 0, 1, 24, 26  # enum ggml_type
_CPU = 0  # enum ggml_backend_dev_type
_ARENA = 1 << 16  # bytes of tensor descriptions; nothing is computed, so no data is allocated


@dataclass(frozen=True)
class Device:
    """name and description are ggml's; native: operations of ggml-sfi.h that the device supports (F16 K and V).

    paths: of each policy, ``native`` (our operations), ``portable`` (ggml's own) or ``refused (LACKS ...)``
    proof: where our kernels for such a device, or the portable path, have run so far
    """

    name: str
    description: str
    native: tuple[str, ...]
    paths: dict[str, str]
    proof: str


# by the beginning of ggml's names; what comes after is the number of the device
_PROOFS = {"CPU": "tested on every build", "CUDA": "an earlier version ran on an H100, these kernels have run in tests on a CPU only",
           "MTL": "unproven on hardware: no Mac has run these kernels"}
_PORTABLE_PROOF = "tried on a Vulkan driver in software only"


def proof_of(name: str, native: bool) -> str:
    """What is known of our kernels on a device of this name."""
    known = [proof for start, proof in _PROOFS.items() if name.startswith(start)]
    return known[0] if native and known else _PORTABLE_PROOF


def devices() -> list[Device]:
    """All devices of the loaded library."""
    ggml = Ggml()
    context = ggml.init(_InitParams(_ARENA, None, True))
    try:
        nodes = _nodes(ggml, context)
        return [_device(ggml, i, nodes) for i in range(ggml.backend_dev_count())]
    finally:
        ggml.free(context)


def all_native(params: SfiParams, on_gpus: bool) -> bool:
    """Whether every device that may hold layers computes the operations of a policy itself. on_gpus: not CPUs alone"""
    ggml = Ggml()
    used = (i for i in range(ggml.backend_dev_count()) if on_gpus or ggml.backend_dev_type(ggml.backend_dev_get(i)) == _CPU)
    return all(device_path(i, params)[0] == "native" for i in used)


def _device(ggml: "Ggml", number: int, nodes: dict[str, int]) -> Device:
    device, paths = ggml.backend_dev_get(number), {policy: _path(number, policy) for policy in POLICIES}
    native = tuple(name for name, node in nodes.items() if ggml.backend_dev_supports_op(device, node))
    name = ggml.backend_dev_name(device).decode()
    return Device(name, ggml.backend_dev_description(device).decode().strip(), native, paths, proof_of(name, bool(native)))


def _path(number: int, policy: str) -> str:
    path, lacks = device_path(number, SfiParams.of(policy))
    return path if path != "none" else f"refused ({lacks})" if lacks else "refused"


def _nodes(ggml: "Ggml", context: int) -> dict[str, int]:
    """One small instance of each operation: 2 query heads of size 64 on 1 KV head, 64 cells, lists of 16."""
    def tensor(kind: int, *ne: int) -> int:
        return ggml.new_tensor_4d(context, kind, *ne, *[1] * (4 - len(ne)))

    k, v = tensor(_F16, 64, 64, 1), tensor(_F16, 64, 64, 1)
    always, selected, plan = tensor(_I32, 16), tensor(_I32, 16, 1), tensor(_I32, 3)
    cells, evidence = tensor(_I32, 64), tensor(_F32, 64, 1)
    q, queries = tensor(_F32, 64, 1, 2), tensor(_F32, 64, 2, 1)
    sketch = ctypes.byref(_SketchFormat(8, 48, 0, 0, 16, 2))  # the default
    codes = tensor(_I8, 16 * ggml.sketch_cell_bytes(sketch), 4, 1)
    basis, used = tensor(_F32, ggml.sketch_basis_size(sketch, 64, 64), 1), tensor(_I32, 1)
    selector = ctypes.byref(_Selector(0, 16, 2, 16, *[0.5] * 9))
    return {
        "sparse_attn": ggml.sparse_attn(context, q, k, v, always, selected, None, None, 0.125, 0.0),
        "support_evidence": ggml.support_evidence(context, queries, k, cells, plan, 0.125, 0.0, 1.0, 0),
        "support_select": ggml.support_select(context, evidence, cells, plan, None, 16, selector),
        "support_stability": ggml.support_stability(context, evidence, cells, plan, selected, selected),
        "sketch_encode": ggml.sketch_encode(context, codes, basis, k, v, cells, sketch),
        "sketch_scan": ggml.sketch_scan(context, tensor(_F32, 64, 2), codes, basis, always, used, None, selected, tensor(_I32, 2, 1), 64, 64,
                                        0.125, 0.0, 0.5, sketch),
    }


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Selector(ctypes.Structure):  # struct ggml_support_selector
    _fields_ = [(n, c_int32) for n in ("kind", "pool_after", "pool_before", "nms_radius")] + [
        (n, c_float) for n in ("alpha", "gamma", "beta", "p", "eta", "lambda_clip", "a_soft", "a_cross", "temperature")]


class _SketchFormat(ctypes.Structure):  # struct ggml_sketch_format
    _fields_ = [(n, c_int32) for n in ("n_k4", "n_k2", "n_k1", "n_v4", "n_v2", "n_first")]


_P, _F = c_void_p, c_float
_SIGNATURES: dict[str, tuple[Any, list]] = {
    "init": (_P, [_InitParams]),
    "free": (None, [_P]),
    "new_tensor_4d": (_P, [_P, c_int] + [c_int64] * 4),
    "backend_dev_count": (c_size_t, []),
    "backend_dev_get": (_P, [c_size_t]),
    "backend_dev_name": (c_char_p, [_P]),
    "backend_dev_description": (c_char_p, [_P]),
    "backend_dev_type": (c_int, [_P]),
    "backend_dev_memory": (None, [_P, POINTER(c_size_t), POINTER(c_size_t)]),
    "backend_dev_supports_op": (c_bool, [_P, _P]),
    "sparse_attn": (_P, [_P] * 8 + [_F, _F]),
    "support_evidence": (_P, [_P] * 5 + [_F, _F, _F, c_int]),
    "support_select": (_P, [_P] * 5 + [c_int32, POINTER(_Selector)]),
    "support_stability": (_P, [_P] * 6),
    "sketch_cell_bytes": (c_int64, [_P]),
    "sketch_basis_size": (c_int64, [_P, c_int64, c_int64]),
    "sketch_encode": (_P, [_P] * 7),
    "sketch_scan": (_P, [_P] * 9 + [c_int64, c_int64, _F, _F, _F, _P]),
}


class Ggml:
    """The ggml functions above, without their prefix."""

    def __init__(self) -> None:
        lib = open_library().llama_cpp.llama_cpp._lib
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)((f"ggml_{name}", lib)))
