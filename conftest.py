"""Tests run on the installed package, not on the unbuilt sources beside them, unless `make dev` has linked a build."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def installed_package_first() -> None:
    """`python -m pytest` and this file put ROOT on sys.path, where sfi_local has no native library."""
    if any((ROOT / "sfi_local").glob("_sfi.*")):
        return
    before = list(sys.path)
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    if importlib.util.find_spec("sfi_local") is None:
        sys.path[:] = before  # not installed either: what is pure Python can still be tested
    else:
        os.environ["PYTHONSAFEPATH"] = "1"  # and for what tests start


installed_package_first()
