"""sfi-local cache: the prefix store, where texts that were read are kept: list, rm, clear, verify, and warm to read ahead."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from sfi_local.binding.state import checksum
from sfi_local.cli.options import BriefCommand, model_options, take_settings
from sfi_local.cli.progress import Progress
from sfi_local.cli.request import PromptRequest
from sfi_local.cli.terminal import say, tell_notes
from sfi_local.cli.text_input import open_text
from sfi_local.cli.thinking import Thinking
from sfi_local.errors import InputError, SfiError
from sfi_local.machine import human_bytes
from sfi_local.store import prefixes
from sfi_local.store.prefixes import common

QUESTIONS = ("What is this?", "Name it.")  # a prompt about a file is known as far as these two have it alike


@click.group("cache", short_help="Show, check, empty or fill the store of texts that were read.")
def command() -> None:
    """The K and V of texts that were read are kept on the disk, so that a second question about a text begins at once.

    \b
    sfi-local cache list
    sfi-local cache warm smollm2-135m -f report.txt
    sfi-local cache rm 1c0ffee2
    sfi-local cache clear

    It lies in the folder of SFI_LOCAL_CACHE, takes a fifth of the free disk at most (SFI_LOCAL_PREFIX_BUDGET), and may be deleted at
    any time. What was not used for longest goes first. `run --no-cache` keeps and takes nothing.
    """


@command.command("list", short_help="List the texts that are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(as_json: bool) -> None:
    """List the texts that are kept, the last used first: id, model, tokens, bytes, last use, and how each begins.

    \b
    sfi-local cache list
    sfi-local cache list --json
    """
    rows = prefixes.rows(checksum)
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["last_used"]))
        text = " ".join(row["text"].split())
        click.echo(f"{row['id']}  {row['n_tokens']:>7} tokens {human_bytes(row['bytes']):>9}  {used}  {row['model'][:24]:24}  {text[:40]}")
    total = prefixes.size_of(prefixes.folder())
    say(f"{human_bytes(total)} in {prefixes.folder()}, of {human_bytes(prefixes.budget())} at most." if rows else
        f"Nothing is kept in {prefixes.folder()}.")


@command.command("rm", short_help="Remove texts by their ids.")
@click.argument("ids", nargs=-1, required=True)
def rm_command(ids: tuple[str, ...]) -> None:
    """Remove the texts of these IDS, as `sfi-local cache list` shows them, or of how they begin.

    \b
    sfi-local cache rm 1c0ffee2
    """
    gone = prefixes.remove(ids, checksum)
    missing = [one for one in ids if not any(name.startswith(one) for name in gone)]
    say(f"Removed {len(gone)} text{'' if len(gone) == 1 else 's'}.")
    if missing:
        raise SfiError(f"There is no text {missing[0]}: `sfi-local cache list` shows what is kept.")


@command.command("clear", short_help="Remove everything that is kept.")
def clear_command() -> None:
    """Remove everything that is kept of texts; models stay.

    \b
    sfi-local cache clear
    """
    say(f"Removed {human_bytes(prefixes.clear())}.")


@command.command("verify", short_help="Check everything that is kept, and remove what is damaged.")
def verify_command() -> None:
    """Read every file of the store and compare its checksums. Damaged ones are removed; exit code 1 if there were any.

    \b
    sfi-local cache verify
    """
    good, bad = prefixes.verify(checksum)
    for path, why in bad:
        say(f"{path.name}: {why}.")
    say(f"{good} file{'' if good == 1 else 's'} whole, {len(bad)} not.")
    if bad:
        raise SystemExit(1)


@command.command("warm", cls=BriefCommand, short_help="Read files now that will be asked about later.")
@click.argument("model")
@click.option("-f", "--file", "files", multiple=True, required=True, metavar="FILE", help="A text; may be repeated.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@model_options
def warm_command(model: str, files: tuple[str, ...], system: str | None, **options: Any) -> None:
    """Read files with MODEL now, as `sfi-local run MODEL -f FILE` will; what is read so far is kept after Ctrl-C, too.

    \b
    sfi-local cache warm smollm2-135m -f report.txt -f notes.txt
    """
    verbose = options.pop("verbose")
    options.update(mode="auto", set_fields={})
    if options["no_cache"]:
        raise InputError("warm keeps what it reads: leave out --no-cache.")
    request = PromptRequest(model, take_settings(options), files[0], None, 1, samplers={}, seed=None, temp=0.0, stop=(), system=system, raw=False,
                            max_prompt_tokens=None, truncate=False, verbose=verbose, thinking=Thinking(), **options)
    if prefixes.budget() == 0:
        raise InputError("Nothing is kept: SFI_LOCAL_PREFIX_BUDGET is 0, or the disk is full.")
    with request.load() as loaded:
        for file in files:
            _warm(loaded, request, file)


def _warm(model: Any, request: PromptRequest, file: str) -> None:
    """Read one file, as far as every prompt about it has the same tokens."""
    document = open_text(file)
    first, second = (request.prompt_tokens(model, document, question) for question in QUESTIONS)
    tokens = first[:common(first, second)]
    slot = model.open_session(len(tokens), 1)
    tell_notes(model)
    n = slot.reuse(tokens)
    try:
        with Progress("reading", "tokens", "preparing") as reading:
            slot.prefill(tokens[n:], reading)
    finally:
        slot.keep(wait=True)
        tell_notes(model)
    say(f"{file}: {len(tokens)} tokens, of which {len(tokens) - n} were read now.")
