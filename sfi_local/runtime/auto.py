"""When mode ``auto`` looks for the depth from which slow-fast pays, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Protocol

from sfi_local.binding.library import log
from sfi_local.params import SfiParams
from sfi_local.runtime.modes import Mode
from sfi_local.store.gguf_file import GgufFile


class Subject(Protocol):
    """A loaded model as it is measured; a Model is one.

    weights: llama_cpp._internals.LlamaModel
    gpus:    descriptions of the GPUs that hold its layers; gpu_layers: how many they hold, None: all
    kv_gpus: of those that hold K and V of these layers
    """

    file: GgufFile
    weights: Any
    n_threads: int
    gpu_layers: int | None

    @property
    def path(self) -> Path: ...

    @property
    def gpus(self) -> list[str]: ...

    @property
    def kv_gpus(self) -> list[str]: ...

    def tokenize(self, text: str) -> list[int]: ...


# (what is measured, parameters, types of K and V) -> (depth in cells, how it was found)
FindDepth = Callable[[Any, SfiParams, str, str], tuple[int, str]]


@dataclass(frozen=True)
class Found:
    """depth: cells; how: as FindDepth says; note: a sentence for the user, or \"\" """

    depth: int
    how: str
    note: str


def find_depth(find: FindDepth | None, subject: Subject, mode: Mode, params: SfiParams, types: tuple[str, str],
               n_tokens: int) -> Found | None:
    """Look, where the mode wants it, nobody gave a depth, and a text of n_tokens gets longer than the budget; else None."""
    if find is None or not mode.measures or params.auto_depth or n_tokens <= params.budget:
        return None
    depth, how = find(subject, params, *types)
    if how == "measured":
        return Found(depth, how, f"Measured once for this model on this machine: slow-fast decoding pays from a depth of {depth} tokens.")
    return Found(depth, how, f"Mode auto is slow-fast from a depth of {depth} tokens ({how})." if log.verbose else "")
