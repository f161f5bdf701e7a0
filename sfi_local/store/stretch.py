"""A longer context than a model was trained on, by YaRN (arXiv 2309.00071): metadata that takes the place of the file's."""

from __future__ import annotations

from dataclasses import replace

from sfi_local.errors import ArgumentError
from sfi_local.store.gguf_file import GgufFile

MOST = 64  # times; published models go up to 32


def yarn(file: GgufFile, factor: float, n_trained: int | None = None) -> tuple[GgufFile, dict[str, int | float | str]]:
    """(the file as if it were stretched, what llama.cpp must take instead of its metadata).

    factor:    how many times the trained context
    n_trained: tokens that the model was trained on before it was stretched; None: as the file says
    Raises ArgumentError.
    """
    if not 1 < factor <= MOST:
        raise ArgumentError(f"yarn is {factor:g}: give a factor above 1, up to {MOST}, by which the trained context becomes longer.")
    done = str(file.get("rope.scaling.type") or "none")
    if done != "none":
        raise ArgumentError(f"{file.path} is stretched by itself ({done}, to {file.n_ctx_train} tokens): leave yarn out.")
    n_trained = n_trained or file.n_ctx_train
    if not 0 < n_trained <= 1 << 24:
        raise ArgumentError(f"{file.path} does not say on how many tokens it was trained: give them after the factor, as in 4:32768.")
    keys: dict[str, int | float | str] = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": float(factor), "rope.scaling.original_context_length": n_trained,
        "context_length": int(factor * n_trained)}
    changed = {f"{file.architecture}.{key}": value for key, value in keys.items()}
    return replace(file, metadata={**file.metadata, **changed}), changed
