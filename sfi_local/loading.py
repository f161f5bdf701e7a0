"""Load a model: what ``sfi_local.load`` does. Found, checked to fit, its tolerance chosen, and told how ``auto`` is measured."""

from __future__ import annotations

import os
from typing import Callable, Sequence

from sfi_local.binding import gpu
from sfi_local.binding.context import load_weights
from sfi_local.binding.library import log, open_library
from sfi_local.errors import ArgumentError, ModelFileError
from sfi_local.machine import physical_cores
from sfi_local.params import PORTABLE_POLICY, SfiParams
from sfi_local.runtime.memory import MIN_CTX, by_metadata, check_memory, cost_of, exact_cost
from sfi_local.runtime.model import Model
from sfi_local.runtime.modes import Mode, mode_of
from sfi_local.store import layout, stretch
from sfi_local.store.gguf_file import GgufFile, read_gguf
from sfi_local.store.pull import resolve
from sfi_local.tuning.auto_depth import auto_depth_of
from sfi_local.tuning.tolerance import DEFAULT, params_for

MAX_THREADS = 512    # of ggml
MAX_LAYERS = 9999    # more than any model has: all of them


def load(model: str | os.PathLike, *, mode: str = "auto", n_ctx: int | None = None, n_threads: int | None = None,
         type_k: str = "f16", type_v: str = "f16", params: SfiParams | None = None, fit_budget: bool = False,
         portable_params: SfiParams | None = None, fidelity: float | str | None = None, gpu_layers: int | None = None,
         yarn: float | tuple[float, int] | None = None,
         lora: str | os.PathLike | Sequence[tuple[str | os.PathLike, float]] = (), force: bool = False, verbose: bool = False,
         progress: Callable[[float, float], None] | None = None) -> "Model":
    """Load a model given by path, catalogue name (fetched on first use) or ``hf:user/repo:quant``.

    mode:      ``auto``, ``sfi``, ``dense``, ``exact`` or ``stock``, see runtime/modes.py
    n_ctx:     cells of the context; None: grows as needed, up to what the model was trained on and memory allows
    n_threads: None: one per physical core
    type_k, type_v: f16, bf16, q8_0, q4_0 or f32
    params:    budget, schedule and selector; None: the defaults, with fit_budget, and of policy frozen as portable_params
    fit_budget: make the budget smaller where the context is, instead of refusing it
    portable_params: take these instead where a device of the model lacks the operations of the params' policy
    fidelity:  nats from dense, or ``floor``: takes the place of the params' tolerance in modes ``auto`` and ``sfi``, see
               tuning/tolerance.py; None without params: ``floor``, if the model is calibrated
    gpu_layers: layers that a GPU holds and computes, the output being one more; None: all, where the build has a GPU backend
    yarn:      stretch the trained context by YaRN: so many times, or (times, tokens that the model was trained on)
    lora:      a LoRA adapter as GGUF, or several with their scales
    force:     go on, with a note, where the memory is too small
    progress:  called with (done, total) while the weights are read; what it raises ends the loading
    Raises ModelFileError, CatalogueError, PullError, OutOfMemoryError, LibraryError, ArgumentError, InputError.
    """
    mode = mode_of(mode)
    _check_options(n_ctx, n_threads, type_k, type_v, params, gpu_layers)
    file, stretched = read_gguf(resolve(os.fspath(model))), None
    if yarn is not None:
        file, stretched = stretch.yarn(file, *(yarn if isinstance(yarn, tuple) else (yarn,)))
    gpus, no_gpu = gpu.usable(gpu_layers)
    layers = layout.layers(file)
    settled, note = params_for_mode(file, mode, type_k, type_v, params, fidelity)
    portable = portable_params if params else SfiParams.of(PORTABLE_POLICY)
    _check_generates(file)
    share = gpu.share_of(len(layers), gpu_layers, gpus)
    cost = cost_of(by_metadata(file, layers, type_k, type_v), layers, mode.name, type_k, type_v, settled, portable or settled, bool(gpus))
    cost = exact_cost(file, cost, n_ctx or file.n_ctx_train or MIN_CTX, share, gpus, gpu_layers)
    room = check_memory(file, cost, n_ctx or MIN_CTX, share, gpus, force)
    native = open_library()
    log.verbose = verbose
    weights = load_weights(native.llama_cpp, file.path, gpu_layers, progress, room.mapped_only, stretched)
    model = Model(file, weights, room.n_bytes and cost.cells(room.n_bytes), mode=mode, n_ctx=n_ctx, n_threads=n_threads or physical_cores(), type_k=type_k,
                  type_v=type_v, params=settled, fit_budget=fit_budget or params is None, gpu_layers=gpu_layers,
                  portable_params=portable, adapters=_adapters(lora), find_auto_depth=auto_depth_of)
    for sentence in filter(None, (note, no_gpu, *room.notes)):
        model._note(sentence)
    return model


def params_for_mode(file: GgufFile, mode: Mode, type_k: str, type_v: str, params: SfiParams | None,
           fidelity: float | str | None) -> tuple[SfiParams, str]:
    """(parameters, note), see tolerance.params_for; without fast steps there is nothing to settle."""
    if not mode.fast or mode.verifies:
        return params or SfiParams(), ""
    if fidelity is None and params is None:
        fidelity = DEFAULT
    return params_for(params or SfiParams(), file.path, type_k, type_v, fidelity)


def _check_options(n_ctx: int | None, n_threads: int | None, type_k: str, type_v: str,
                   params: SfiParams | None, gpu_layers: int | None) -> None:
    for name, value, least, most in (("n_ctx", n_ctx, 1, 1 << 30), ("n_threads", n_threads, 1, MAX_THREADS),
                                     ("gpu_layers", gpu_layers, 0, MAX_LAYERS)):
        if value is not None and not least <= value <= most:
            raise ArgumentError(f"{name} is {value}: give a number from {least} to {most}.")
    for kv_type in (type_k, type_v):
        if kv_type not in layout.KV_TYPES:
            raise ArgumentError(f"The KV type is {kv_type!r}: choose one of {', '.join(layout.KV_TYPES)}.")
    if params:
        params.validate()


def _adapters(lora: str | os.PathLike | Sequence[tuple[str | os.PathLike, float]]) -> list[tuple[str, float]]:
    """(path, scale) of each. Raises ModelFileError where there is no file."""
    several = [(lora, 1.0)] if isinstance(lora, (str, os.PathLike)) else lora
    for path, _ in several:
        if not os.path.isfile(path):
            raise ModelFileError(f"There is no LoRA adapter {os.fspath(path)}: check the path.")
    return [(os.fspath(path), float(scale)) for path, scale in several]


def _check_generates(file: GgufFile) -> None:
    """Refuse what llama.cpp cannot be given, and what it would load and then abort on."""
    try:
        str(file.path).encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFileError(f"The name of {file.path} is not UTF-8, which llama.cpp needs: rename the file.") from None
    what = layout.kind_of_file(file)
    if what:
        raise ModelFileError(f"{file.path} is {what}, not a model that generates text: give the model itself.")
    if file.architecture in layout.NO_CACHE or file.get("pooling_type"):
        raise ModelFileError(f"{file.path} is a {file.architecture} model for embeddings, or another that does not generate text token "
                             f"by token: give a decoder model.")
    if file.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ModelFileError(f"{file.path} has no tokenizer in it: convert the model again with its tokenizer files.")
