"""The models known by name, and where each of them is (or would be) in the cache. Pure: nothing is fetched here."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Iterable

from sfi_local.errors import CatalogueError
from sfi_local.machine import cache_dir

HF_PREFIX = "hf:"
_HF_NAME = re.compile(r"hf:([\w.-]+)/([\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?")

# what is taken where a hub name says nothing, the first that the repository has
DEFAULT_QUANTS = ("Q4_K_M", "Q4_0", "Q8_0", "MXFP4", "IQ4_XS", "Q5_K_M", "Q6_K", "BF16", "F16", "F32")

# words in the names of files that lie beside models: never a model, or one that only helps another
_NO_MODEL = re.compile(r"(^|[-_./])(mmproj|imatrix|lora|adapter|control[-_]vector|vocab)([-_./]|$)", re.I)
_HELPER = re.compile(r"(^|[-_./])(mtp|draft|eagle\d?)([-_./]|$)", re.I)
_QUANT = re.compile(r"[-._](?:UD-)?((?:I?Q|TQ)\d[A-Z0-9_]*|BF16|FP?16|FP?32|MXFP4[A-Z0-9_]*|NVFP4)$", re.I)


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue; sizes in bytes, context in tokens. The fields are those of models/catalogue.json.

    metadata: of the file, what the cost of a context follows from
    sources:  where it can be had, in the order in which they are tried
    """

    name: str
    title: str
    file: str
    size: int
    sha256: str
    context: int
    license: str
    metadata: dict = field(repr=False)
    sources: list = field(repr=False)

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
    """A model on the Hugging Face hub, written ``hf:user/repo@revision:quant``.

    revision: branch, tag or commit; quant: a quantisation, or the name of a .gguf file; "": see pick_gguf
    """

    repo: str
    quant: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repo}{revision}" + (f":{self.quant}" if self.quant else "")


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
    """Parse ``hf:user/repo@revision:quant``; revision and quant may be left out. Raises CatalogueError."""
    match = _HF_NAME.fullmatch(name)
    if not match or ".." in name:
        raise CatalogueError(f"{name!r} is not a hub name: write hf:USER/REPO:QUANT, e.g. hf:Qwen/Qwen3-0.6B-GGUF:Q8_0, or with a "
                             f"branch, tag or commit hf:USER/REPO@REVISION:QUANT.")
    return HfName(f"{match[1]}/{match[2]}", match[4] or "", match[3] or "main")


def is_path(name: str) -> bool:
    """Whether a model argument means a file rather than a catalogue name."""
    return name.endswith(".gguf") or os.sep in name or os.path.exists(name)


def pick_gguf(names: Iterable[str], quant: str) -> str | None:
    """The (first) GGUF file that a quantisation means among the file names of a repository; None if that is not one model.

    A name that ends in the quantisation wins over longer ones that contain it; the files of one model in the same quantisation
    (with and without ``UD-``, at the top and in a folder) are one choice, of which the top and the shortest name is taken. Projectors,
    adapters, importance matrices and vocabularies are no candidates, draft and MTP models only where there is nothing else.
    Without a quantisation: the only one, or the first of DEFAULT_QUANTS.
    """
    models = candidates(names)
    if quant.lower().endswith(".gguf"):
        return next((n for n in models if quant.lower() in (n.lower(), n.lower().rpartition("/")[2])), None)
    if not quant:
        has = {quant_of(n) for n in models}
        return _one_model(models) or next((pick_gguf(models, q) for q in DEFAULT_QUANTS if q in has), None)
    exact = [n for n in models if re.search(rf"(^|[-._/]){re.escape(quant)}$", _stem(n), re.I)]
    return _one_model(exact or [n for n in models if re.search(rf"(^|[-._/]){re.escape(quant)}([-._/]|$)", _stem(n), re.I)])


def candidates(names: Iterable[str]) -> list[str]:
    """The GGUF files that may be models, of split ones the first part."""
    models = [n for n in names if n.endswith(".gguf") and n == split_parts(n)[0] and not _NO_MODEL.search(_stem(n))]
    return [n for n in models if not _HELPER.search(_stem(n))] or models


def quant_of(name: str) -> str:
    """The quantisation that a file name ends in, in capitals; "" if it ends in none."""
    match = _QUANT.search(_stem(name))
    return match[1].upper() if match else ""


def _one_model(names: list[str]) -> str | None:
    """The file to take if all are the same model in the same quantisation."""
    same = {(_QUANT.sub("", _stem(n).rpartition("/")[2]).lower(), quant_of(n)) for n in names}
    return min(names, key=lambda n: (n.count("/"), len(n), n)) if len(same) == 1 else None


def _stem(name: str) -> str:
    """A file name without ending and part number."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name)


def split_parts(name: str) -> list[str]:
    """The names of all parts of a split model, from the name of one; of any other model its own name."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", name)
    if not match:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]
