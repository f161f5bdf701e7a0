"""Files inside the pinned llama.cpp that tests read: chat templates and vocabularies. From a built tree, or from the archive."""

from __future__ import annotations

import os
import tarfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read_pin() -> dict[str, str]:
    lines = (ROOT / "patches" / "upstream").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@cache
def files(folder: str, ending: str) -> dict[str, bytes]:
    """{name: content} of the files in a folder of the pinned llama.cpp; empty where neither a tree nor the archive lies."""
    for tree in sorted(ROOT.glob("build/*/llama.cpp")):
        if found := {path.name: path.read_bytes() for path in sorted((tree / folder).glob(f"*{ending}"))}:
            return found
    cache_dir = Path(os.environ.get("SFI_LOCAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfi-local")
    pin = read_pin()
    for archive in (ROOT / "native" / "vendor" / pin["file"], cache_dir / pin["file"]):
        if archive.is_file():
            return dict(_of_archive(archive, f"/{pin['path']}/{folder}/", ending))
    return {}


def _of_archive(archive: Path, place: str, ending: str):
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if place in member.name and member.name.endswith(ending):
                yield member.name.rpartition("/")[2], tar.extractfile(member).read()


WHY_NOT = "no llama.cpp of the pin lies in build/ or in the cache: run `make dev`, or `python patches/patchset.py fetch`"
