"""What every download needs: room on the disk, checksums, progress by what has arrived, and the disk's errors in sentences."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator

from sfi_local.errors import PullError
from sfi_local.machine import cache_dir, human_bytes

if TYPE_CHECKING:
    from filelock import FileLock

Report = Callable[[float, float], None]  # (bytes done, bytes in all)

CHUNK = 1 << 20
POLL_S = 0.1


class Unavailable(PullError):
    """A source that cannot give a model now; another may."""


class Changed(Unavailable):
    """A source that serves something else than what the catalogue means."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_whole(path: Path, n_bytes: int, sha256: str) -> bool:
    """Whether a file is there and is the one meant."""
    return path.is_file() and path.stat().st_size == n_bytes and sha256_of(path) == sha256


def compare_sha256(name: str, actual: str, expected: str) -> None:
    """Raises Changed where they differ."""
    if actual != expected:
        raise Changed(f"{name} has sha256 {actual} instead of {expected}, so it was not kept: pull again, and if it "
                      f"happens again its source serves a changed file.")


def check_room(folder: Path, need: int) -> None:
    """Raises PullError where the disk of a folder has less than ``need`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PullError(f"{folder} has {human_bytes(free)} free and {human_bytes(need)} are needed: free some space, "
                        f"or set SFI_LOCAL_CACHE (HF_HOME for models of the hub) to a folder on another disk.")


def is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def alone(name: str) -> FileLock:
    """Two who fetch the same take turns; the second finds it fetched."""
    from filelock import FileLock

    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into sentences."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise PullError(f"The disk that holds {folder} is full: free some space, or set SFI_LOCAL_CACHE (HF_HOME for models of "
                            f"the hub) to a folder on another disk.") from None
        raise PullError(f"{folder} cannot be written ({error.strerror or error}): set SFI_LOCAL_CACHE (HF_HOME for models of the "
                        f"hub) to a folder that can.") from None


@contextmanager
def watched(arrived: Callable[[], int], total: int, report: Report | None) -> Iterator[None]:
    """Report from a thread how many bytes have arrived, while others download them."""
    if not report:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            report(min(arrived(), total), total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def folder_bytes(folder: str | Path, pattern: str = "") -> int:
    """Bytes of all files below a folder that others write to; pattern: only of names that end so."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(root, name)) if name.endswith(pattern) else 0
            except OSError:
                continue
    return total
