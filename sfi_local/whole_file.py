"""Files that a command writes after long work: refused before it, and afterwards there whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from sfi_local.errors import SfiError


def check_writable(path: str | os.PathLike) -> None:
    """Before the work: refuse a path that is a directory, or lies in none that may be written to."""
    path = Path(path).resolve()
    if path.is_dir():
        raise SfiError(f"{path} is a directory: give the path of a file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SfiError(f"{path} cannot be written: give a path in a directory that is there and that you may write to.")


def check_matplotlib(option: str) -> None:
    """Before the work: refuse an option that draws where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SfiError(f"{option} needs matplotlib: run `pip install 'sfi-local[plot]'` or `pip install matplotlib`, or leave "
                       f"{option} out.") from None


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path to write to; it gets its name when the block ends well, and is removed when it does not."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise SfiError(f"{path} cannot be written ({error.strerror}): give a path that you may write to.") from None
    finally:
        part.unlink(missing_ok=True)
