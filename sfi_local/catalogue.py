"""The models known by name, and where each of them is (or would be) in the cache. Pure: nothing is fetched here."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from sfi_local.errors import CatalogueError
from sfi_local.machine import cache_dir

HF_PREFIX = "hf:"
_HF_NAME = re.compile(r"hf:([\w.-]+)/([\w.-]+)(?::([\w.-]+))?")


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue; sizes in bytes, context in tokens. The fields are those of models/catalogue.json."""

    name: str
    title: str
    file: str
    size: int
    sha256: str
    context: int
    license: str
    source: dict = field(repr=False)

    @property
    def path(self) -> Path:
        """Where the model is once it is fetched."""
        return cache_dir() / "models" / self.name / self.file

    @property
    def fetched(self) -> bool:
        """Whether the whole file is in the cache; its sha256 was checked before it got its name."""
        return self.path.is_file() and self.path.stat().st_size == self.size


@dataclass(frozen=True)
class HfName:
    """A model on the Hugging Face hub, written ``hf:user/repo:quant``."""

    repo: str
    quant: str

    @property
    def folder(self) -> Path:
        return cache_dir() / "hf" / self.repo

    def fetched(self) -> Path | None:
        """The model's (first) file if all of it is in the cache, else None."""
        names = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*.gguf")]
        first = pick_gguf(names, self.quant)
        return self.folder / first if first and set(split_parts(first)) <= set(names) else None


def catalogue_file() -> Path:
    """models/catalogue.json of the repository, which the build copies into the package."""
    here = Path(__file__).resolve().parent
    installed, source = here / "models" / "catalogue.json", here.parent / "models" / "catalogue.json"
    return source if source.is_file() and not installed.is_file() else installed


@lru_cache
def entries() -> tuple[Entry, ...]:
    """All models of the catalogue, in its order."""
    with open(catalogue_file(), encoding="utf-8") as file:
        return tuple(Entry(**item) for item in json.load(file)["models"])


def find(name: str) -> Entry:
    """The entry of a name; CatalogueError suggests the nearest names."""
    by_name = {entry.name: entry for entry in entries()}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=0.4) or list(by_name)[:1]
    raise CatalogueError(
        f"There is no model {name!r}: did you mean {near[0]}? `sfi-local models` lists the names; "
        f"a path to a .gguf file and hf:USER/REPO:QUANT work too.")


def parse_hf(name: str) -> HfName:
    """Parse ``hf:user/repo:quant``; the quant may be left out where the repository has one GGUF file."""
    match = _HF_NAME.fullmatch(name)
    if not match:
        raise CatalogueError(f"{name!r} is not a hub name: write hf:USER/REPO:QUANT, e.g. hf:Qwen/Qwen3-0.6B-GGUF:Q8_0.")
    return HfName(f"{match[1]}/{match[2]}", match[3] or "")


def is_path(name: str) -> bool:
    """Whether a model argument means a file rather than a catalogue name."""
    return name.endswith(".gguf") or os.sep in name or os.path.exists(name)


def pick_gguf(names: list[str], quant: str) -> str | None:
    """The (first) GGUF file of a quantisation among file names; None if there is not exactly one model."""
    firsts = [n for n in names if n.endswith(".gguf") and n == split_parts(n)[0] and "mmproj" not in n]
    if quant:
        firsts = [n for n in firsts if re.search(rf"(^|[-._/]){re.escape(quant)}([-._/]|$)", n, re.I)]
    return firsts[0] if len(firsts) == 1 else None


def split_parts(name: str) -> list[str]:
    """The names of all parts of a split model, from the name of one; of any other model its own name."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", name)
    if not match:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]
