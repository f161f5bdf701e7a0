"""sfi-local inspect: what a model is, which layers can be sparse, and what its KV cache costs."""

from __future__ import annotations

import json
from typing import Any

import click

from sfi_local.cli.options import set_options, take_params
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted
from sfi_local.errors import LibraryError
from sfi_local.machine import human_bytes
from sfi_local.runtime.memory import caches_by_llama
from sfi_local.store.gguf_file import read_gguf
from sfi_local.store.layout import KV_TYPES, kv_bytes, layers, sfi_bytes, why_dense

DEPTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@click.command("inspect", short_help="Show a model's layers and the cost of its KV cache.")
@click.argument("model")
@set_options()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(model: str, as_json: bool, **options: Any) -> None:
    """Describe MODEL (name, hub name or path) from its metadata; the weights are not loaded. What a cache takes is asked of llama.cpp.

    \b
    sfi-local inspect smollm2-135m
    sfi-local inspect ./model.gguf --set n_selected=512 --json
    """
    params = take_params(options).asked_params
    with Progress("fetching", "bytes") as fetching:
        path = resolve_noted(model, fetching)
    facts = describe(read_gguf(path), params)
    click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))


def describe(file: Any, params: Any) -> dict[str, Any]:
    """What the metadata says, and llama.cpp of the cache; sizes in bytes, depths in cells.

    kv_bytes_by: ``llama.cpp``, or ``metadata`` where that does not load the model
    """
    all_layers = layers(file)
    asked = _asked(file)
    return {
        "path": str(file.path),
        "name": file.metadata.get("general.name"),
        "architecture": file.architecture,
        "size": file.n_bytes,
        "context": file.n_ctx_train,
        "license": file.metadata.get("general.license"),
        "n_layer": len(all_layers),
        "n_sparse": sum(layer.sparse for layer in all_layers),
        "why_dense": why_dense(all_layers),
        "layers": [vars(layer) for layer in all_layers],
        "budget": params.budget,
        "kv_bytes_by": "llama.cpp" if asked else "metadata",
        "kv_bytes": {t: {str(d): asked[t][d] if asked else kv_bytes(all_layers, d, t, t) for d in DEPTHS} for t in KV_TYPES},
        "sfi_bytes": sfi_bytes(all_layers, params, file.n_ctx_train or 4096),
    }


def _asked(file: Any) -> dict[str, dict[int, int]] | None:
    try:
        return caches_by_llama(file, KV_TYPES, DEPTHS)
    except LibraryError:
        return None


def as_text(facts: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{facts['name'] or facts['path']}",
        f"architecture  {facts['architecture']}, {human_bytes(facts['size'])}, trained on {facts['context']} tokens",
        *_layer_lines(facts["layers"]),
        f"sparse        {facts['n_sparse']} of {facts['n_layer']} layers"
        + (f" ({facts['why_dense']})" if facts["why_dense"] else f", budget {facts['budget']} cells per KV head"),
        f"sfi adds      {human_bytes(facts['sfi_bytes'])} per sequence of the whole context",
        "",
        "KV cache  " + "".join(f"{d // 1024:>9}k" for d in DEPTHS),
    ]
    for kv_type, by_depth in facts["kv_bytes"].items():
        lines.append(f"{kv_type:10}" + "".join(f"{human_bytes(n):>10}" for n in by_depth.values()))
    return "\n".join(lines)


def _layer_lines(all_layers: list[dict[str, Any]]) -> list[str]:
    """One line per run of equal layers."""
    lines, start = [], 0
    for il in range(1, len(all_layers) + 1):
        if il < len(all_layers) and all_layers[il] == all_layers[start]:
            continue
        layer, name = all_layers[start], f"{start}" if il == start + 1 else f"{start}-{il - 1}"
        state = "sparse" if layer["sparse"] else f"dense: {layer['why']}"
        lines.append(f"layers {name:6} {layer['n_head']} heads, {layer['n_head_kv']} KV heads, head size "
                     f"{layer['k_size']}, {state}")
        start = il
    return lines
