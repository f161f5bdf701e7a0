"""sfi-local: slow-fast decoding of GGUF models.

    import sfi_local

    with sfi_local.load("smollm2-135m", mode="sfi") as model:
        for step in model.generate([{"role": "user", "content": "Name three rivers."}]):
            print(step.text, end="", flush=True)     # step.kind: slow, fast, dense ...; step.reason: why

    from sfi_local import SlowFastLlama as Llama     # llama-cpp-python's Llama, decoding slow-fast

Nothing native is loaded before the first use. Programs that use llama_cpp as well import from sfi_local first, so
that both run on one library.
"""

from __future__ import annotations

import importlib
from pkgutil import extend_path
from typing import Any

# Imported from a source tree, the package lacks what the build made: that lies in the installed one.
__path__ = extend_path(__path__, __name__)

_WHERE = {
    "load": "loading", "Model": "runtime.model", "Step": "runtime.step", "Tally": "runtime.step", "SfiParams": "params",
    "Sampling": "runtime.sampling", "Engine": "binding.engine", "Message": "runtime.template",
    "Conversation": "runtime.conversation", "Look": "runtime.look", "SlowFastLlama": "llama", "SfiError": "errors",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'sfi_local' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sfi_local.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sfi-local")
    except PackageNotFoundError:
        return "0 (not installed)"
