"""The devices that ggml sees, which of our operations each computes itself, and how each can have a support."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

from sfi_local.binding.engine import device_operations, device_path
from sfi_local.binding.library import open_library
from sfi_local.params import POLICIES, SfiParams

CPU = 0             # enum ggml_backend_dev_type
GPU_TYPES = (1, 2)  # GPU, IGPU there


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
    return [_device(ggml, number) for number in range(ggml.backend_dev_count())]


def all_native(params: SfiParams, on_gpus: bool) -> bool:
    """Whether every device that may hold layers computes the operations of a policy itself. on_gpus: not CPUs alone"""
    ggml = Ggml()
    used = (i for i in range(ggml.backend_dev_count()) if on_gpus or ggml.backend_dev_type(ggml.backend_dev_get(i)) == CPU)
    return all(device_path(i, params)[0] == "native" for i in used)


def _device(ggml: "Ggml", number: int) -> Device:
    device, native = ggml.backend_dev_get(number), device_operations(number)
    name = ggml.backend_dev_name(device).decode()
    return Device(name, ggml.backend_dev_description(device).decode().strip(), native, {policy: _path(number, policy) for policy in POLICIES},
                  proof_of(name, bool(native)))


def _path(number: int, policy: str) -> str:
    path, lacks = device_path(number, SfiParams.of(policy))
    return path if path != "none" else f"refused ({lacks})" if lacks else "refused"


_P = c_void_p
_SIGNATURES: dict[str, tuple[Any, list]] = {
    "backend_dev_count": (c_size_t, []),
    "backend_dev_get": (_P, [c_size_t]),
    "backend_dev_name": (c_char_p, [_P]),
    "backend_dev_description": (c_char_p, [_P]),
    "backend_dev_type": (c_int, [_P]),
    "backend_reg_by_name": (_P, [c_char_p]),
    "backend_reg_get_proc_address": (_P, [_P, c_char_p]),
    "backend_register": (None, [_P]),
    "set_abort_callback": (_P, [_P]),
    "backend_dev_memory": (None, [_P, POINTER(c_size_t), POINTER(c_size_t)]),
}


class Ggml:
    """The ggml functions above, without their prefix."""

    def __init__(self) -> None:
        lib = open_library().llama_cpp.llama_cpp._lib
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)((f"ggml_{name}", lib)))

    def devices(self, *types: int) -> list[int]:
        """Addresses of the devices of these types."""
        return [one for one in map(self.backend_dev_get, range(self.backend_dev_count())) if self.backend_dev_type(one) in types]

    def __getattr__(self, name: str) -> Any:  # for type checkers: what __init__ did not set is not there
        raise AttributeError(name)
