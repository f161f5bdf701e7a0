"""Load a model: what ``sfi_local.load`` does. Found, checked to fit, its tolerance chosen, and told how ``auto`` is measured."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

from sfi_local.binding import gpu
from sfi_local.binding.context import N_BATCH, SMALL_BATCH, load_weights
from sfi_local.binding.devices import all_native
from sfi_local.binding.library import log, open_library, source_id
from sfi_local.errors import ModelFileError
from sfi_local.machine import physical_cores, reads_mapped_weights
from sfi_local.params import SfiParams
from sfi_local.runtime.memory import MIN_CTX, by_metadata, check_memory, cost_of, exact_cost
from sfi_local.runtime.settings import Lora, Quality, Settings, Yarn
from sfi_local.store import layout, stretch
from sfi_local.store.fingerprint import fingerprint, parts_of
from sfi_local.store.gguf_file import GgufFile, read_gguf
from sfi_local.store.prefixes import folder
from sfi_local.store.pull import resolve
from sfi_local.tuning.quality import Taken, take
from sfi_local.tuning.tolerance import expired, recall

if TYPE_CHECKING:
    from sfi_local.runtime.model import Model

Progress = Callable[[float, float], None]


def load(model: str | os.PathLike, *, mode: str = "auto", n_ctx: int | None = None, n_threads: int | None = None,
         type_k: str | None = None, type_v: str | None = None, params: SfiParams | Mapping[str, Any] | None = None,
         quality: Quality | None = None, gpu_layers: int | None = None, yarn: Yarn | None = None,
         lora: Lora = (), force: bool = False, cache: bool = True, low_memory: bool = False, kv_host: bool = False,
         verbose: bool = False, progress: Progress | None = None) -> Model:
    """Load a model given by path, catalogue name (fetched on first use) or ``hf:user/repo:quant``.

    mode:      ``auto``, ``sfi``, ``dense``, ``exact`` or ``stock``, see runtime/modes.py
    n_ctx:     cells of the context; None: grows as needed, up to what the model was trained on and memory allows
    n_threads: None: one per physical core
    type_k, type_v: f16, bf16, q8_0, q4_0 or f32; None: f16, with low_memory q8_0
    params:    budget, schedule and selector: an SfiParams is taken as it is; of a mapping of its fields these are kept, and the
               others adapted: the budget to a small context, the policy to a device that lacks its operations
    quality:   how close to dense. ``close``, the default: within the noise of the model's own rounding where it is calibrated, else
               by the tolerance of SfiParams; ``fast``: five times that; ``same``: mode exact, where the model can have it; nats
    gpu_layers: layers that a GPU holds and computes, the output being one more; None: all, where the build has a GPU backend
    yarn:      stretch the trained context by YaRN: so many times, or (times, tokens that the model was trained on)
    lora:      a LoRA adapter as GGUF, or several with their scales
    force:     go on, with a note, where the memory is too small
    cache:     keep the K and V of long texts on the disk, and take from there what was read before: docs/cache.md
    low_memory: for 2 to 4 GB: K and V as q8_0, weights that stay in their file, smaller batches, nothing kept in memory; prompts are
               read more slowly: docs/edge.md
    kv_host:   K and V stay in the host's memory, where the CPU attends to them: for contexts that a GPU does not hold
    progress:  called with (done, total) while the weights are read; what it raises ends the loading
    Raises ModelFileError, CatalogueError, PullError, OutOfMemoryError, LibraryError, ArgumentError, InputError.
    """
    return load_as(model, Settings(str(mode), n_ctx, n_threads, type_k, type_v, gpu_layers, kv_host, params, quality, yarn, lora, force, cache,
                                   low_memory), verbose, progress)


def load_as(model: str | os.PathLike, asked: Settings, verbose: bool = False, progress: Progress | None = None) -> Model:
    """Load a model with settings; see load()."""
    asked.check()
    file, stretched = read_gguf(resolve(os.fspath(model))), None
    if asked.yarn is not None:
        file, stretched = stretch.yarn(file, *(asked.yarn if isinstance(asked.yarn, tuple) else (asked.yarn,)))
    gpus, no_gpu = gpu.usable(asked.gpu_layers)
    layers, kv_on_gpus = layout.layers(file), bool(gpus) and not asked.kv_host
    taken = taken_for(file, asked, any(layer.sparse for layer in layers) and all_native(asked.asked_params, kv_on_gpus))
    _check_generates(file)
    share = gpu.share_of(len(layers), asked.gpu_layers, gpus)
    n_ubatch = SMALL_BATCH if asked.low_memory else N_BATCH
    cost = cost_of(by_metadata(file, layers, asked.type_k, asked.type_v, n_ubatch), layers, taken.mode, asked.type_k, asked.type_v,
                   taken.params, taken.portable or taken.params, kv_on_gpus)
    cost = exact_cost(file, cost, asked.n_ctx or file.n_ctx_train or MIN_CTX, share, gpus, asked.gpu_layers, n_ubatch)
    room = check_memory(file, cost, asked.n_ctx or MIN_CTX, share, gpus, asked.force, asked.kv_host)
    native = open_library()
    log.verbose = verbose
    mapped = room.mapped_only or asked.low_memory or (taken.mode != "stock" and not gpus and reads_mapped_weights())
    meanwhile = _prepare(file)
    weights = load_weights(native.llama_cpp, file.path, asked.gpu_layers, progress, mapped, stretched)
    meanwhile.join()
    from sfi_local.runtime.model import Model
    from sfi_local.tuning.auto_depth import auto_depth_of

    loaded = Model(file, weights, room.n_bytes and cost.cells(room.n_bytes), mode=taken.mode, n_ctx=asked.n_ctx,
                   n_threads=asked.n_threads or physical_cores(), type_k=asked.type_k, type_v=asked.type_v, params=taken.params,
                   fit_budget=taken.fits_budget, gpu_layers=asked.gpu_layers, kv_host=asked.kv_host, portable_params=taken.portable,
                   quality=taken.quality, adapters=_adapters(asked.lora), find_auto_depth=auto_depth_of, n_ubatch=n_ubatch,
                   roomy=sys.platform == "linux" and not kv_on_gpus and not asked.low_memory)
    if asked.cache:
        loaded.keep_prefixes(fingerprint_of(file, asked, stretched), told_settings(asked), in_memory=not asked.low_memory)
    for sentence in filter(None, (*taken.notes, no_gpu, *room.notes)):
        loaded._note(sentence)
    return loaded


def taken_for(file: GgufFile, asked: Settings, exact_works: bool = True) -> Taken:
    """What settings come to for a model file, with what was measured for it; see quality.take."""
    if not asked.chooses_tolerance:
        return take(asked, file.path, None, exact_works)
    known = file.path, asked.type_k, asked.type_v, asked.asked_params
    found = recall(*known)
    taken = take(asked, file.path, found, exact_works)
    old = "" if found else expired(*known)
    return replace(taken, notes=(*taken.notes, old)) if old else taken


def fingerprint_of(file: GgufFile, asked: Settings, stretched: Mapping[str, Any] | None) -> Callable[[], str]:
    """The name of all that K and V depend on. stretched: metadata in the place of the file's"""
    adapters = _adapters(asked.lora)
    files = [*parts_of(file.path), *(Path(path) for path, _ in adapters)]
    return partial(fingerprint, files, folder(), types=[asked.type_k, asked.type_v], scales=[scale for _, scale in adapters],
                   metadata=dict(stretched or {}), llama=source_id().partition("+")[0], **asked.asked_params.reading)


def told_settings(asked: Settings) -> str:
    """What K and V depend on beside the model, for people."""
    adapters = [f"adapter {Path(path).name}" for path, _ in _adapters(asked.lora)]
    return ", ".join([f"K as {asked.type_k} and V as {asked.type_v}", *adapters, *(["YaRN"] if asked.yarn is not None else []),
                      *(["sparse prefill"] if asked.asked_params.reading else [])])


def _prepare(file: GgufFile) -> threading.Thread:
    """While weights are loaded, which is not Python's work, import what uses them, and compile the chat template."""
    def run() -> None:
        from sfi_local.runtime.template import prepare
        from sfi_local.tuning import auto_depth  # noqa: F401  # and Model with it

        prepare(str(file.metadata.get("tokenizer.chat_template") or ""))

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    return thread


def _adapters(lora: Lora) -> list[tuple[str, float]]:
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
