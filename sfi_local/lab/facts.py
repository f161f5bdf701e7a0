"""What bench and eval have in common: the model, the tokens of a text, and the facts that belong to every number."""

from __future__ import annotations

import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from sfi_local.binding.library import source_id
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted, say
from sfi_local.cli.text_input import from_file
from sfi_local.errors import InputError
from sfi_local.machine import cpu_name, physical_cores
from sfi_local.params import SfiParams
from sfi_local.runtime.settings import Settings
from sfi_local.store.gguf_file import read_gguf
from sfi_local.tuning.quality import with_quality
from sfi_local.tuning.tolerance import recall

DEFAULT_TEXT = "pydoc_data.topics"  # English prose that every Python carries
BUFFER_BYTES = 320 << 20  # larger than the caches of most machines


def fetch(name: str) -> Any:
    """The file of a model, fetched on first use, with progress on stderr."""
    with Progress("fetching", "bytes") as fetching:
        return resolve_noted(name, fetching)


def params_with_quality(params: SfiParams, path: Any, kv_type: str, asked: Settings | None) -> SfiParams:
    """The parameters with the tolerance for the quality that was asked for, see quality.with_quality; notes go to stderr."""
    if asked is None or not asked.chooses_tolerance:
        return params
    params, _, note = with_quality(params, asked.quality, path, kv_type, recall(path, kv_type, kv_type, params))
    if note:
        say(note)
    return params


def check_depth(path: Any, depth: int, n: int) -> None:
    """Refuse n steps from a depth that the model was not made for, before its weights are read. Raises InputError."""
    trained = read_gguf(path).n_ctx_train
    if 0 < trained < depth + n:
        raise InputError(f"--depth {depth} and -n {n} need a context of {depth + n} tokens, and this "
                         f"model was trained on {trained}: lower --depth, or measure a model with random weights of the "
                         f"same shape (`sfi-local make-model`).")


def text_tokens(model: Any, text: str, source: str, need: int, taker: str, remedy: str) -> list[int]:
    """The first ``need`` tokens of a text, after the token that begins one. Raises InputError where it is shorter.

    taker, remedy: clauses of the refusal, e.g. "--depth 100 takes" and "lower --depth"
    """
    bos = model.tokenize("", add_bos=model.vocabulary.add_bos)
    tokens = bos + model.tokenize(text[:16 * need])
    if len(tokens) < need:
        tokens = bos + model.tokenize(text)
    if len(tokens) < need:
        raise InputError(f"The text ({source}) has {len(tokens)} tokens, and {taker} {need}: give a longer one with --text, "
                         f"{remedy}.")
    return tokens[:need]


def facts(name: str, model: Any) -> dict[str, Any]:
    """Model, machine, source, date and command of a measurement."""
    from datetime import datetime, timezone

    return {
        "model": name, "threads": model.n_threads, "machine": ", ".join([cpu_name(), f"{physical_cores()} cores", *model.gpus]),
        "source_id": source_id(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["sfi-local", *sys.argv[1:]]),
    }


def params_facts(p: SfiParams) -> dict[str, Any]:
    """The budget in its three parts, and everything else that was set."""
    return {"budget": {"n_sink": p.n_sink, "n_recent": p.n_recent, "n_selected": p.n_selected},
            "params": {**asdict(p), "support": p.policy}}  # support: what policy was called in earlier versions


def measured_text(path: str | None) -> tuple[str, str]:
    """(text, its name) that bench and eval decode: a file, or Python's help topics."""
    if path is not None:
        return from_file(path), path
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()), "Python's help topics"


def read_bandwidth(n_threads: int, n_bytes: int = BUFFER_BYTES, rounds: int = 5) -> float:
    """Bytes per second that n_threads read together from a buffer of n_bytes; the best of several rounds: the yardstick
    for kernels that can do no better than read everything once.

    Each thread takes the maximum of its own part, which numpy does without the GIL and faster than memory delivers.
    """
    import numpy as np

    parts = np.array_split(np.ones(n_bytes // 4, dtype=np.int32), n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, n_bytes / (time.perf_counter() - start))
    return best
