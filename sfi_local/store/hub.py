"""Models of the Hugging Face hub, in the cache that its own tools use: what they have fetched is found, and they find what we fetch.

The layout of that cache is documented: models--USER--REPO/ holds refs/REVISION (a commit), snapshots/COMMIT/FILE (links) and blobs/.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from sfi_local.catalogue import HfName, candidates, pick_gguf, quant_of, split_parts
from sfi_local.errors import PullError
from sfi_local.machine import human_bytes
from sfi_local.store.disk import Report, Unavailable, alone, check_room, compare_sha256, disk_errors, is_full, sha256_of, watched

LARGEST_BY_HTTP = 50_000_000_000  # bytes; larger files the hub gives in pieces of its own alone


def find(name: HfName) -> Path | None:
    """The model's (first) file if all of it is in the hub's cache, else None."""
    folder = _snapshot(name)
    names = _gguf_files(folder)
    first = pick_gguf(names, name.quant)
    return folder / first if first and set(split_parts(first)) <= set(names) else None


def cached() -> list[tuple[HfName, Path]]:
    """Every whole model in the hub's cache, with the name that finds it."""
    found = []
    for ref in sorted(_cache().glob("models--*/refs/*")):
        user, _, repo = ref.parent.parent.name.removeprefix("models--").partition("--")
        where = HfName(f"{user}/{repo}", "", ref.name)
        folder = _snapshot(where)
        names = _gguf_files(folder)
        for first in candidates(names):
            if set(split_parts(first)) <= set(names):
                quant = quant_of(first)
                name = HfName(where.repo, quant if pick_gguf(names, quant) == first else first.rpartition("/")[2], where.revision)
                found.append((name, folder / first))
    return found


def find_blob(sha256: str) -> Path | None:
    """A file of any repository in the hub's cache by its SHA-256, which is its name there."""
    return next((blob for blob in _cache().glob(f"models--*/blobs/{sha256}") if blob.is_file()), None)


def fetch(name: HfName, report: Report | None = None, note: Callable[[str], None] | None = None) -> Path:
    """Fetch a model and return the path of its (first) file; huggingface_hub goes on with an interrupted download."""
    files = _files(name)
    first = pick_gguf(files, name.quant)
    if first is None:
        raise PullError(_no_such_quant(name, list(files)))
    missing = [part for part in split_parts(first) if part not in files]
    if missing:
        raise PullError(f"{name.repo} lacks {missing[0]}, a part of {first}: choose another quantisation.")
    parts = [files[part] for part in split_parts(first)]
    if note:
        note(f"Fetching {name.repo} {Path(first).name} ({human_bytes(sum(part.size or 0 for part in parts))}) into {_cache()}.")
    return _fetch(name, parts, report)[0]


def fetch_sha256(name: HfName, sha256: str, report: Report | None = None) -> Path:
    """Fetch the file with a SHA-256 from a repository, whatever its name is there. Raises Unavailable."""
    for info in _files(name).values():
        if info.lfs and info.lfs.sha256 == sha256:
            return _fetch(name, [info], report)[0]
    raise Unavailable(f"{name.repo} has no file with sha256 {sha256} any more.")


def remove(name: HfName) -> list[Path]:
    """Remove a model's files from the hub's cache; returns those that are gone."""
    first = find(name)
    gone = [first.with_name(Path(part).name) for part in split_parts(first.name)] if first else []
    for path in gone:
        blob = path.resolve()
        path.unlink()
        if blob != path and not any(other.resolve() == blob for other in _folder(name).glob("snapshots/**/*") if other.is_symlink()):
            blob.unlink(missing_ok=True)
    return gone


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(name: HfName) -> Path:
    return _cache() / f"models--{name.repo.replace('/', '--')}"


def _snapshot(name: HfName) -> Path:
    """The folder of a revision in the cache; it may not be there."""
    ref = _folder(name) / "refs" / name.revision
    commit = ref.read_text().strip() if ref.is_file() else name.revision
    return _folder(name) / "snapshots" / commit


def _gguf_files(folder: Path) -> list[str]:
    """Names below a snapshot's folder, if it is there; a link whose blob is gone does not count."""
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.gguf")) if p.is_file()]


def _files(name: HfName) -> dict[str, Any]:
    """What the repository holds: file name -> the hub's facts about it."""
    with _hub_errors(name):
        info = _api().model_info(name.repo, revision=name.revision, files_metadata=True)
    return {sibling.rfilename: sibling for sibling in info.siblings}


def _fetch(name: HfName, parts: list[Any], report: Report | None) -> list[Path]:
    cache = _cache()
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        here = sum(path.stat().st_size for part in parts for path in (_blob(name, part), _partial(name, part)) if path.exists())
        check_room(cache, sum(part.size or 0 for part in parts) - here)
        return [_fetch_file(name, parts, i, report) for i in range(len(parts))]


def _fetch_file(name: HfName, parts: list[Any], i: int, report: Report | None) -> Path:
    info, partial = parts[i], _partial(name, parts[i])
    before, total = sum(part.size or 0 for part in parts[:i]), sum(part.size or 0 for part in parts)
    with watched(lambda: before + (partial.stat().st_size if partial.exists() else 0), total, report), _hub_errors(name), _without_bars():
        if info.lfs and info.lfs.size <= LARGEST_BY_HTTP:
            with alone(info.lfs.sha256):
                _fetch_blob(name, info)
        return Path(_api().hf_hub_download(name.repo, info.rfilename, revision=name.revision))


def _fetch_blob(name: HfName, info: Any) -> None:
    """Fetch a file's content to where hf_hub_download finds it. That one begins anew after an interruption; this goes on."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if _blob(name, info).exists():
        return
    partial = _partial(name, info)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        http_get(hf_hub_url(name.repo, info.rfilename, revision=name.revision), file, resume_size=file.tell(), headers=build_hf_headers(),
                 expected_size=info.lfs.size)
    try:
        compare_sha256(info.rfilename, sha256_of(partial), info.lfs.sha256)
        os.replace(partial, _blob(name, info))
    finally:
        partial.unlink(missing_ok=True)


def _blob(name: HfName, info: Any) -> Path:
    """Where the cache keeps the content of a file."""
    return _folder(name) / "blobs" / (info.lfs.sha256 if info.lfs else info.blob_id)


def _partial(name: HfName, info: Any) -> Path:
    return _blob(name, info).with_suffix(".part")


def _no_such_quant(name: HfName, files: list[str]) -> str:
    models = sorted(candidates(files))
    if not models:
        return f"{name.repo} holds no GGUF model: choose a repository whose name ends in GGUF."
    asked = f"no single GGUF file for {name.quant!r}" if name.quant else "several models"
    more = f" and {len(models) - 12} more" if len(models) > 12 else ""
    return (f"{name.repo} has {asked}: write hf:{name.repo}:QUANT with the quantisation of one of these files, or hf:{name.repo}:FILE "
            f"with its name: {', '.join(models[:12])}{more}.")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _without_bars() -> Iterator[None]:
    """The progress shown is ours."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


@contextmanager
def _hub_errors(name: HfName) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub, and of the HTTP library under it, into sentences."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise Unavailable(f"{name.repo} asks for a consent: accept it on the hub and run `hf auth login`.") from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(f"The hub has no repository {name.repo}, or only for those who are let in: check the name after hf: , or run "
                          f"`hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise Unavailable(f"{name.repo} has no branch, tag or commit {name.revision!r}: leave @{name.revision} out for the latest.") from None
    except errors.HFValidationError as error:
        raise Unavailable(f"{name.repo} is no name of a repository ({error}): write hf:USER/REPO:QUANT.") from None
    except errors.OfflineModeIsEnabled:
        raise Unavailable(f"{name.repo} is not in the hub's cache and HF_HUB_OFFLINE forbids to fetch it: unset it.") from None
    except Exception as error:  # what is left comes from the network, in the classes of whatever HTTP library the hub uses today
        if is_full(error) or isinstance(error, PullError):
            raise
        text = (str(error).strip().splitlines() or ["no message"])[0]
        raise Unavailable(f"The hub cannot be reached to fetch {name.repo} ({type(error).__name__}: {text}): check the network, or give "
                          f"a .gguf file by its path.") from None
