"""Read the header of a GGUF file and check that the file holds what the header promises. Pure, weights untouched.

llama.cpp reports a damaged file late or aborts; here every way a file can be wrong has its sentence. The format is
described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfi_local.catalogue import split_parts
from sfi_local.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY_KEPT = 1024  # longer arrays are vocabularies: only their length is kept
MAX_NAME_BYTES = 1 << 16
MAX_DIMS = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# (weights per block, bytes per block) by ggml type number
TYPE_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}


@dataclass(frozen=True)
class GgufFile:
    """What the header of a model says.

    path:         the file given; the first part of a split model
    n_bytes:      bytes of all parts on disk
    metadata:     key -> value; an array longer than MAX_ARRAY_KEPT is represented by its length (int)
    tensors:      tensor name -> dimensions, innermost first; of the first part
    """

    path: Path
    n_bytes: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own namespace, e.g. ``get("block_count")``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def n_ctx_train(self) -> int:
        return int(self.get("context_length", 0))


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Read and check a model file, all parts of it if it is split.

    Raises ModelFileError: missing, a directory, unreadable, empty, not GGUF, another version, damaged, truncated.
    """
    path = Path(path)
    metadata, tensors, n_bytes = _read_part(path)
    for part in _other_parts(path, metadata):
        n_bytes += _read_part(part)[2]
    return GgufFile(path, n_bytes, metadata, tensors)


def _read_part(path: Path) -> tuple[dict, dict, int]:
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a directory: give the .gguf file inside it.")
        with open(path, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes == 0:
                raise ModelFileError(f"{path} is empty: fetch the model again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return (*_Header(path, data).read(), n_bytes)
    except FileNotFoundError:
        raise ModelFileError(
            f"There is no file {path}: check the path, or give a name that `sfi-local models` lists.") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}): check that it is a readable file.") from None


def _other_parts(path: Path, metadata: dict) -> list[Path]:
    """The other files of a split model, which llama.cpp loads together with the first."""
    count = int(metadata.get("split.count", 0))
    if count < 2:
        return []
    if metadata.get("split.no", 0) != 0:
        raise ModelFileError(f"{path} is not the first part of a model of {count} parts: give the first one.")
    parts = split_parts(path.name)
    if len(parts) != count:
        raise ModelFileError(
            f"{path} is the first of {count} parts but is not named NAME-00001-of-{count:05}.gguf: "
            f"give the parts back their names.")
    return [path.with_name(part) for part in parts[1:]]


class _Header:
    """A cursor over the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def read(self) -> tuple[dict, dict]:
        if self.data[:4] != MAGIC:
            raise ModelFileError(
                f"{self.path} is not a GGUF model (it starts with {bytes(self.data[:4])!r}): "
                f"give a .gguf file, or convert the model with llama.cpp's convert_hf_to_gguf.py.")
        self.at = 4
        self._check_version(self._scalar("<I"))
        n_tensors, n_keys = self._scalar("<Q"), self._scalar("<Q")
        self._check_room(n_keys * 12 + n_tensors * 24)
        metadata = dict(self._key_value() for _ in range(n_keys))
        infos = [self._tensor() for _ in range(n_tensors)]
        self._check_extents(infos, int(metadata.get("general.alignment", 32)))
        return metadata, {name: dims for name, dims, _, _ in infos}

    def _check_version(self, version: int) -> None:
        if version not in VERSIONS:
            raise ModelFileError(
                f"{self.path} is GGUF version {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} of little-endian "
                f"GGUF are read: convert the model again with a current llama.cpp.")

    def _check_room(self, n: int) -> None:
        if n > len(self.data) - self.at:
            raise ModelFileError(
                f"{self.path} ends inside its header, at byte {len(self.data)}: it is truncated or damaged, "
                f"fetch the model again.")

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is damaged at byte {self.at} ({what}): fetch the model again.")

    def _scalar(self, fmt: str) -> Any:
        n = struct.calcsize(fmt)
        self._check_room(n)
        value = struct.unpack_from(fmt, self.data, self.at)[0]
        self.at += n
        return value

    def _skip_string(self) -> None:
        n = self._scalar("<Q")
        self._check_room(n)
        self.at += n

    def _skip_strings(self, n: int) -> None:
        """As so many times _skip_string(); a vocabulary has a hundred thousand."""
        data, at, last, length = self.data, self.at, len(self.data) - 8, struct.Struct("<Q").unpack_from
        for _ in range(n):
            if at > last:
                break
            at += 8 + length(data, at)[0]
        else:
            if at <= len(data):
                self.at = at
                return
        self._check_room(len(data) + 1)

    def _string(self) -> str:
        start = self.at + 8
        self._skip_string()
        return self.data[start:self.at].decode("utf-8", errors="replace")

    def _name(self) -> str:
        start, name = self.at, self._string()
        if self.at - start > MAX_NAME_BYTES:
            raise self._damaged("a name of more than 64 KiB")
        return name

    def _key_value(self) -> tuple[str, Any]:
        return self._name(), self._value(self._scalar("<I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"unknown value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, n = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            self._check_room(8 * n)
            self._skip_strings(n)
            return n
        if kind not in _SCALARS:
            raise self._damaged(f"array of unknown type {kind}")
        size = struct.calcsize(_SCALARS[kind])
        self._check_room(n * size)
        values = n if n > MAX_ARRAY_KEPT else list(
            struct.unpack_from(f"<{n}{_SCALARS[kind][1]}", self.data, self.at))
        self.at += n * size
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, dimensions innermost first, ggml type, offset from the start of the data)"""
        name, n_dims = self._name(), self._scalar("<I")
        if n_dims > MAX_DIMS:
            raise self._damaged(f"tensor {name!r} of {n_dims} dimensions")
        dims = tuple(self._scalar("<Q") for _ in range(n_dims))
        return name, dims, self._scalar("<I"), self._scalar("<Q")

    def _check_extents(self, infos: list, alignment: int) -> None:
        """Every tensor must end inside the file."""
        start = -(-self.at // max(1, alignment)) * max(1, alignment)
        need = start
        for name, dims, kind, offset in infos:
            need = max(need, start + offset + _tensor_bytes(dims, kind))
        if infos and need > len(self.data):
            raise ModelFileError(
                f"{self.path} is truncated: it has {len(self.data)} bytes and its tensors need {need}; "
                f"fetch the model again.")


def _tensor_bytes(dims: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor; 1 for a type this table does not know, which leaves the offset checked."""
    n = 1
    for dim in dims:
        n *= dim
    weights, n_bytes = TYPE_BLOCKS.get(kind, (max(1, n), 1))
    return -(-n // weights) * n_bytes
