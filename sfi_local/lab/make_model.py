"""sfi-local make-model: a GGUF file of a known shape with random weights, to measure speed without a download."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import click

from sfi_local.cli.progress import Progress
from sfi_local.errors import SfiError, UsageError
from sfi_local.machine import human_bytes

# Spreads for inputs of spread 1. Chosen so that bench can compare kernels at depth 32k: with flat attention, sums that
# cancel, or layers that amplify rounding, the half precision sums of stock's kernel (F16 K and V) would be far off
SPREAD = 1.5      # of a matrix' outputs
SPREAD_QK = 2.0   # of queries and keys: attention is on some cells of many
LAYER_GAIN = 0.1  # of what a layer adds to the residual, over the square root of the number of additions


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; head_size is that of K and V, tied: the output matrix is the token embedding."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_vocab: int
    tied: bool
    rope_base: float


SHAPES = {
    "smollm2-135m": Shape("llama", 30, 576, 1536, 9, 3, 64, 49152, True, 1e5),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, True, 5e5),
    "llama-3.2-3b": Shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, True, 5e5),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5),
    "mistral-7b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 32768, False, 1e6),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, 1e6),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True, 1e6),
    "qwen3-4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 1e6),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False, 1e6),
}
TYPES = ("q4_0", "q8_0", "f16")
CONTEXT = 1 << 18  # speed has no trained length


def _known_shape(ctx: click.Context, option: click.Parameter, name: str) -> str:
    if name not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.3)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"There is no shape {name!r}: {meant}There are {', '.join(SHAPES)}.")
    return name


@click.command("make-model", short_help="Write a model of a known shape with random weights, to measure speed.")
@click.option("--shape", required=True, callback=_known_shape, metavar="NAME", help=f"One of {', '.join(SHAPES)}.")
@click.option("--type", "kind", type=click.Choice(TYPES), default="q4_0", show_default=True, help="Type of the weights.")
@click.option("-o", "--output", required=True, metavar="FILE", help="The file to write, FILE.gguf.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
def command(shape: str, kind: str, output: str, seed: int, force: bool) -> None:
    """Write a GGUF model of a known shape with random weights.

    \b
    sfi-local make-model --shape qwen3-0.6b -o qwen3-0.6b-random.gguf
    sfi-local bench qwen3-0.6b-random.gguf --depth 32k --fill state --slow-every 24

    It is for measuring speed, which does not depend on the weights. It has one token per byte, and what it generates is
    noise.
    """
    path = Path(output)
    if path.exists() and not force:
        raise UsageError(f"{path} is there already: give another name, or --force to replace it.")
    with Progress("writing", "bytes") as progress:
        n_bytes = write_model(path, SHAPES[shape], kind, seed, f"{shape} with random weights", progress)
    click.echo(f"{path}: {human_bytes(n_bytes)}, {shape} in {kind} with random weights, for speed only; its text is noise.")


def write_model(path: Path, shape: Shape, kind: str = "q4_0", seed: int = 0, name: str = "random weights",
                progress: Callable[[int, int], None] | None = None) -> int:
    """Write a model of a shape, tensor by tensor; returns its bytes. The file is there whole or not at all.

    Raises SfiError where the disk is full or the directory cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = tensors_of(shape, kind)
    try:
        _check_disk(path, sum(t.n_bytes for t in tensors))
        _write(part, shape, tensors, seed, name, progress or (lambda done, total: None))
        os.replace(part, path)
        return path.stat().st_size
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: rows of cols weights, of a ggml type.

    scale: of the weights' spread; of an ``f32`` vector, whose elements are all the same, their value
    """

    name: str
    rows: int
    cols: int
    kind: str
    scale: float = 1.0

    @property
    def row_bytes(self) -> int:
        weights, n_bytes = BLOCKS[self.kind]
        return self.cols // weights * n_bytes

    @property
    def n_bytes(self) -> int:
        return self.rows * self.row_bytes


def tensors_of(s: Shape, kind: str) -> list[Tensor]:
    """All tensors of a shape.

    As llama-quantize does it, the output of a Q4_0 model is Q6_K, or Q8_0 where that needs another number of columns.
    """
    head_kind = kind if kind != "q4_0" else "q6_k" if s.n_embd % 256 == 0 else "q8_0"
    out = [Tensor("token_embd.weight", s.n_vocab, s.n_embd, head_kind if s.tied else kind),
           Tensor("output_norm.weight", 1, s.n_embd, "f32")]
    if not s.tied:
        out.append(Tensor("output.weight", s.n_vocab, s.n_embd, head_kind))
    q, kv = s.n_head * s.head_size, s.n_head_kv * s.head_size
    small, normed = LAYER_GAIN * (2 * s.n_layer) ** -0.5, s.architecture == "qwen3"
    sharp = 1.0 if normed else SPREAD_QK / SPREAD
    matrices = {"attn_q": (q, s.n_embd, sharp), "attn_k": (kv, s.n_embd, sharp), "attn_v": (kv, s.n_embd, 1.0),
                "attn_output": (s.n_embd, q, small), "ffn_gate": (s.n_ff, s.n_embd, 1.0), "ffn_up": (s.n_ff, s.n_embd, 1.0),
                "ffn_down": (s.n_embd, s.n_ff, small)}
    norms = {"attn_norm": (1, s.n_embd, 1.0), "ffn_norm": (1, s.n_embd, 1.0)}
    if normed:
        norms |= {"attn_q_norm": (1, s.head_size, SPREAD_QK), "attn_k_norm": (1, s.head_size, SPREAD_QK)}
    for il in range(s.n_layer):
        for tensors, its_kind in ((norms, "f32"), (matrices, kind)):
            out += [Tensor(f"blk.{il}.{name}.weight", rows, cols, its_kind, scale)
                    for name, (rows, cols, scale) in tensors.items()]
    return out


# ---- the bits of random weights --------------------------------------------------------------------------------------

# (weights per block, bytes per block); how a block is laid out: ggml-common.h
BLOCKS = {"f32": (1, 4), "f16": (1, 2), "q4_0": (32, 18), "q8_0": (32, 34), "q6_k": (256, 210)}


def random_rows(t: Tensor, rng: Any) -> Any:
    """The bytes of a tensor, uint8 [rows, row_bytes]: random bits where a weight's bits are, one scale for all."""
    import numpy as np

    if t.kind == "f32":
        return np.full((t.rows, t.cols), t.scale, dtype=np.float32).view(np.uint8)
    weights, n_bytes = BLOCKS[t.kind]
    blocks = rng.integers(0, 256, size=(t.rows * t.cols // weights, n_bytes), dtype=np.uint8)
    _FILL[t.kind](blocks, t.scale * SPREAD / t.cols ** 0.5)
    return blocks.reshape(t.rows, t.row_bytes)


def _set_scale(scales: Any, value: float) -> None:
    """Write a half float into pairs of bytes; its sign stays the random one that is there.

    Codes mean one value more below zero than above, and a mean that all rows share would drown everything else.
    """
    import numpy as np

    low, high = np.float16(value).tobytes()
    scales[:, 0] = low
    scales[:, 1] = scales[:, 1] & 0x80 | high


def _fill_f16(blocks: Any, spread: float) -> None:
    """Random sign and mantissa, one exponent: 1 to 2 times a power of two, whose root mean square is 1.53 times it."""
    import math

    import numpy as np

    exponent = max(1, 15 + round(math.log2(spread / 1.53)))
    bits = blocks.reshape(-1).view("<u2")
    bits &= np.uint16(0x83FF)
    bits |= np.uint16(exponent << 10)


def _fill_q4_0(blocks: Any, spread: float) -> None:
    """d, then 32 nibbles that mean d * (nibble - 8): spread 4.6 d."""
    _set_scale(blocks[:, :2], spread / 4.6)


def _fill_q8_0(blocks: Any, spread: float) -> None:
    """d, then 32 signed bytes: spread 74 d."""
    _set_scale(blocks[:, :2], spread / 74)


def _fill_q6_k(blocks: Any, spread: float) -> None:
    """192 bytes of 6 bit values that mean value - 32 (spread 18.5), 16 scales of one byte, d."""
    blocks[:, 192:208] = 64
    _set_scale(blocks[:, 208:], spread / (64 * 18.5))


_FILL = {"f16": _fill_f16, "q4_0": _fill_q4_0, "q8_0": _fill_q8_0, "q6_k": _fill_q6_k}


# ---- the file --------------------------------------------------------------------------------------------------------

def _write(path: Path, shape: Shape, tensors: list[Tensor], seed: int, name: str, progress: Callable) -> None:
    """Header, keys, tensors; one tensor at a time is in memory."""
    import gguf
    import numpy as np

    rng, total, done = np.random.default_rng(seed), sum(t.n_bytes for t in tensors), 0
    writer = gguf.GGUFWriter(path, shape.architecture)
    try:
        _add_keys(writer, shape, name)
        for t in tensors:
            _add_info(writer, t)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            writer.write_tensor_data(random_rows(t, rng))
            done += t.n_bytes
            progress(done, total)
    finally:
        writer.close()


def _add_info(writer: Any, t: Tensor) -> None:
    import gguf
    import numpy as np

    if t.kind == "f32":
        writer.add_tensor_info(t.name, (t.cols,), np.dtype(np.float32), t.n_bytes)
    else:
        kind = gguf.GGMLQuantizationType[t.kind.upper()]
        writer.add_tensor_info(t.name, (t.rows, t.row_bytes), np.dtype(np.uint8), t.n_bytes, raw_dtype=kind)


def _add_keys(writer: Any, s: Shape, name: str) -> None:
    writer.add_name(name)
    writer.add_description("random weights, for measuring speed")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(s.n_embd)
    writer.add_block_count(s.n_layer)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_key_length(s.head_size)
    writer.add_value_length(s.head_size)
    writer.add_rope_dimension_count(s.head_size)
    writer.add_rope_freq_base(s.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(s.n_vocab)
    _add_byte_vocabulary(writer, s.n_vocab)


def _add_byte_vocabulary(writer: Any, n_vocab: int) -> None:
    """One token per byte in GPT-2's spelling, an end token, and unused ones up to n_vocab."""
    import gguf

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    n_unused = n_vocab - 258
    tokens = [*(spelling[b] for b in range(256)), "er", "<|end|>", *(f"<|unused{i}|>" for i in range(n_unused))]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * n_unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["e r"])  # an empty list of merges is not valid
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)


def _check_disk(path: Path, n_bytes: int) -> None:
    """Refuse before anything is written."""
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise SfiError(f"{path} would take {human_bytes(n_bytes)}, and {path.parent} has {human_bytes(free)} left: free some "
                       f"space or give a path on another disk.")


def _cannot_write(path: Path, error: OSError) -> SfiError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SfiError(f"The disk is full before {path} was whole, and nothing of it was left there: free some space or "
                        f"give a path on another disk.")
    return SfiError(f"{path} cannot be written ({error.strerror}): give a path in a directory that you may write to.")
