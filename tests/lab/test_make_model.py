"""Models with random weights: every family loads and decodes, the file is whole or not there, mistakes get a sentence."""

import dataclasses
import errno

import numpy as np
import pytest
from support.command_line import sentence

from sfi_local.errors import SfiError
from sfi_local.lab.make_model import BLOCKS, SHAPES, SPREAD, TYPES, Shape, Tensor, random_rows, tensors_of, write_model
from sfi_local.store.gguf_file import read_gguf

TINY = {"n_layer": 2, "n_embd": 256, "n_ff": 512, "n_head": 4, "n_head_kv": 2, "head_size": 64, "n_vocab": 320}


def tiny_of(name: str, **changes) -> Shape:
    return dataclasses.replace(SHAPES[name], **{**TINY, **changes})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b", "qwen3-0.6b", "qwen3-8b"])
def test_every_family_loads_and_decodes_sparsely(native, tmp_path, name, kind):
    from sfi_local import SfiParams, load

    path = tmp_path / "tiny.gguf"
    assert write_model(path, tiny_of(name), kind) == path.stat().st_size
    params = SfiParams.of("frozen", n_recent=32, n_selected=40, max_span=8)
    with load(path, mode="sfi", n_threads=1, params=params) as model:
        assert model.tokenize("a é.") == [*"a é.".encode()]
        steps = list(model.generate("One token per byte. " * 15, n=12))
        assert {"slow", "fast"} >= {s.kind for s in steps[1:]} and any(s.kind == "fast" for s in steps)
        logits = np.ctypeslib.as_array(model.session.context.get_logits_ith(-1), shape=(320,))
        assert np.isfinite(logits).all() and logits.std() > 0.1


def test_sizes_are_those_of_the_shapes_that_are_named():
    billions = {"smollm2-135m": 0.135, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3-8b": 8.03, "mistral-7b": 7.25,
                "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19}
    for name, expected in billions.items():
        weights = sum(t.rows * t.cols for t in tensors_of(SHAPES[name], "q4_0"))
        assert weights / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - {"f32"}))
def test_random_bits_are_weights_of_the_spread_that_was_meant(kind):
    import gguf

    t = Tensor("x", 64, 1024, kind)
    rows = random_rows(t, np.random.default_rng(1))
    assert rows.shape == (64, t.row_bytes)
    weights = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()]).astype(np.float64)
    assert weights.shape == (64, 1024) and weights.std() == pytest.approx(SPREAD / 32, rel=0.3)
    assert abs(weights.mean()) < 0.02 * weights.std() and len(np.unique(weights[:, 0])) > 8


def test_a_seed_gives_the_same_file_and_another_one_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / name, tiny_of("qwen3-0.6b"), "q4_0", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c and len(a) == len(c)


def test_the_command_says_what_it_is_for_and_keeps_a_file_that_is_there(cli, tmp_path, monkeypatch):
    done = cli("make-model", "--shape", "smollm2-135m", "-o", "m.gguf")
    assert done.returncode == 0 and b"for speed only" in done.stdout
    file = read_gguf(tmp_path / "m.gguf")
    assert file.architecture == "llama" and file.get("block_count") == 30 and file.tensors["token_embd.weight"] == (576, 49152)
    before = (tmp_path / "m.gguf").stat()
    assert "--force" in sentence(cli("make-model", "--shape", "smollm2-135m", "-o", "m.gguf"), code=2)
    assert (tmp_path / "m.gguf").stat().st_mtime_ns == before.st_mtime_ns
    assert cli("make-model", "--shape", "smollm2-135m", "--type", "q8_0", "-o", "m.gguf", "--force").returncode == 0
    assert (tmp_path / "m.gguf").stat().st_size > before.st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_mistakes_of_the_command(cli):
    assert "did you mean qwen3-0.6b?" in sentence(cli("make-model", "--shape", "qwen3-0.6", "-o", "x.gguf"), code=2)
    sentence(cli("make-model", "--shape", "qwen3-0.6b", "--type", "q5_0", "-o", "x.gguf"), code=2)
    assert "cannot be written" in sentence(cli("make-model", "--shape", "qwen3-0.6b", "-o", "none/x.gguf"))


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    import shutil

    from sfi_local.lab import make_model

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(make_model, "random_rows", full)
        with pytest.raises(SfiError, match="The disk is full"):
            write_model(tmp_path / "x.gguf", tiny_of("qwen3-0.6b"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(make_model.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SfiError, match="has 1.0 kB left"):
        write_model(tmp_path / "x.gguf", tiny_of("qwen3-0.6b"))
    assert not list(tmp_path.iterdir())
