"""How the parameters that errors speak of are typed on the command line."""

from __future__ import annotations

from typing import Any

from sfi_local.fields import kinds
from sfi_local.params import SfiParams
from sfi_local.runtime.sampling import Sampling

# parameter of load(), generate() or Sampling: its option
OPTIONS = {"n_ctx": "--ctx", "n_threads": "--threads", "type_k": "--kv-type", "type_v": "--kv-type", "gpu_layers": "--gpu-layers", "kv_host": "--kv-host",
           "mode": "--mode", "quality": "--quality", "n": "-n", "stop": "--stop", "system": "--system", "temp": "--temp", "seed": "--seed",
           "force": "--force", "fill": "--fill"}
OTHERS = {"complete()": "--raw", "the head of the text": "the head of the file with --truncate or --max-prompt-tokens N"}
_SAMPLERS, _PARAMETERS = kinds(Sampling), {**kinds(SfiParams), "draft": int}
KNOWN = {*OPTIONS, *_SAMPLERS, *_PARAMETERS}


def spelled(name: str, value: Any = None) -> str:
    """The option of a parameter, with a value if there is one."""
    if name in OTHERS:
        return OTHERS[name]
    if name in OPTIONS:
        return OPTIONS[name] if value in (None, True) else f"{OPTIONS[name]} {value}"
    option = "-o " if name in _SAMPLERS and name not in _PARAMETERS else "--set " if name in _PARAMETERS else ""
    return f"{option}{name}" + ("" if value is None else f"={value}")
