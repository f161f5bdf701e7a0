"""sfi-local models and sfi-local pull: what is known, what is fetched, and fetching it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sfi_local import catalogue
from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import resolve_noted
from sfi_local.errors import ModelFileError
from sfi_local.machine import cache_dir, human_bytes
from sfi_local.store.gguf_file import read_gguf


@click.command("models", short_help="List the known models and where they are.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def models_command(as_json: bool) -> None:
    """List the models of the catalogue and those fetched from the Hugging Face hub.

    \b
    sfi-local models
    sfi-local models --json
    """
    rows = known_models()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        where = row["path"] or f"not fetched (sfi-local pull {row['name']})"
        click.echo(f"{row['name']:24} {human_bytes(row['size']):>9}  context {row['context']:<7} "
                   f"{row['license'] or 'licence unknown':12} {where}")


@click.command("pull", short_help="Fetch a model into the cache.")
@click.argument("name")
def pull_command(name: str) -> None:
    """Fetch a model by its catalogue name, or from the Hugging Face hub, and print its path.

    \b
    sfi-local pull smollm2-135m
    sfi-local pull hf:Qwen/Qwen3-0.6B-GGUF:Q8_0

    The file's sha256 is checked before it gets its name; an interrupted pull resumes. The cache is the user's cache
    directory, or SFI_LOCAL_CACHE.
    """
    if not name.startswith(catalogue.HF_PREFIX):
        catalogue.find(name)  # a path is not a name here
    with Progress("fetching", "bytes") as fetching:
        path = resolve_noted(name, fetching)
    click.echo(path)


def known_models() -> list[dict[str, Any]]:
    """Rows of ``models``: name, title, path (None if not fetched), size in bytes, context in tokens, license."""
    rows = [{"name": e.name, "title": e.title, "path": str(e.path) if e.fetched else None, "size": e.size,
             "context": e.context, "license": e.license} for e in catalogue.entries()]
    return rows + [row for path in sorted((cache_dir() / "hf").rglob("*.gguf")) if (row := _hub_row(path))]


def _hub_row(path: Path) -> dict[str, Any] | None:
    """The row of a file fetched from the hub; None for the later parts of a split model and for damaged files."""
    repo = "/".join(path.relative_to(cache_dir() / "hf").parts[:2])
    if catalogue.split_parts(path.name)[0] != path.name:
        return None
    try:
        file = read_gguf(path)
    except ModelFileError:
        return None
    return {"name": f"hf:{repo}:{path.stem}", "title": str(file.metadata.get("general.name", path.stem)),
            "path": str(path), "size": file.n_bytes, "context": file.n_ctx_train,
            "license": file.metadata.get("general.license")}
