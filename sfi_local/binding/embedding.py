"""libsfi, the library that C and C++ programs link, as it lies in this installation: include/, lib/, lib/cmake/sfi, lib/pkgconfig."""

from __future__ import annotations

from pathlib import Path

from sfi_local.binding.library import LIB_DIR, REBUILD
from sfi_local.errors import LibraryError


def prefix() -> Path:
    """The folder that has include/ and lib/; raises LibraryError with the remedy where there is none."""
    tree = LIB_DIR.resolve().parent / "embed"
    real = next(iter(sorted((tree / "lib").glob("libsfi.so.?"))), None)
    if real is None:
        raise LibraryError(f"There is no libsfi in {tree}, which is built on Linux and for the CPU: {REBUILD}.")
    _link(real)
    return tree


def _link(real: Path) -> None:
    """libsfi.so, the name that linkers look for: a wheel carries no links, so it is made when somebody asks where the library is."""
    link = real.with_suffix("")
    if not link.exists():
        try:
            link.symlink_to(real.name)
        except OSError:  # nobody may write there: link_flags() does without
            pass


def compile_flags(tree: Path) -> str:
    return f"-I{tree / 'include'}"


def link_flags(tree: Path) -> str:
    """A program finds the library there when it runs, too."""
    lib = tree / "lib"
    name = "-lsfi" if (lib / "libsfi.so").exists() else f"-l:{next(lib.glob('libsfi.so.?')).name}"
    return f"-L{lib} -Wl,-rpath,{lib} {name}"


def cmake_folder(tree: Path) -> Path:
    """For -Dsfi_DIR=."""
    return tree / "lib" / "cmake" / "sfi"
