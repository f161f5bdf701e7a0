"""The header of a model file: what is right is read, and every way to be wrong has its sentence."""

import os
import struct

import pytest

gguf = pytest.importorskip("gguf")

from support.tiny_model import write_tiny  # noqa: E402

from sfi_local.errors import ModelFileError  # noqa: E402
from sfi_local.store.gguf_file import TYPE_BLOCKS, read_gguf  # noqa: E402


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_header_agrees_with_gguf_py(tiny_file):
    ours, theirs = read_gguf(tiny_file), gguf.GGUFReader(tiny_file)
    assert ours.architecture == "llama" and ours.n_ctx_train == 4096
    assert ours.n_bytes == tiny_file.stat().st_size
    assert {name: list(dims) for name, dims in ours.tensors.items()} == {t.name: t.shape.tolist() for t in theirs.tensors}
    assert ours.metadata["tokenizer.chat_template"] == theirs.get_field("tokenizer.chat_template").contents()


def test_block_sizes_agree_with_gguf_py():
    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    assert {kind: sizes for kind, sizes in TYPE_BLOCKS.items() if kind in theirs} == {
        kind: sizes for kind, sizes in theirs.items() if kind in TYPE_BLOCKS}


@pytest.mark.parametrize("data, word", [
    (b"", "empty"),
    (b"PK\x03\x04" + b"\0" * 60, "not a GGUF model"),
    (b"GG", "not a GGUF model"),
    (b"GGUF" + struct.pack("<I", 1) + b"\0" * 60, "version 1"),
    (b"GGUF" + struct.pack(">I", 3) + b"\0" * 60, "little-endian"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "truncated"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"\0" * 60, "truncated"),
    (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99) + b"\0" * 60, "damaged"),
])
def test_bad_files_have_a_sentence(tmp_path, data, word):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=word) as refusal:
        read_gguf(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("keep", [0.0001, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_wherever_it_ends(tiny_file, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_file.read_bytes()[:int(keep * tiny_file.stat().st_size)])
    with pytest.raises(ModelFileError, match="truncated"):
        read_gguf(path)


def test_missing_and_directory_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="There is no file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        read_gguf(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tiny_file, tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(tiny_file.read_bytes())
    path.chmod(0)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_gguf(path)


def test_a_split_model_needs_all_its_parts(tmp_path):
    first = tmp_path / "m-00001-of-00002.gguf"
    write_split(first, 0)
    with pytest.raises(ModelFileError, match="m-00002-of-00002.gguf"):
        read_gguf(first)
    write_split(tmp_path / "m-00002-of-00002.gguf", 1)
    assert read_gguf(first).n_bytes == 2 * first.stat().st_size
    with pytest.raises(ModelFileError, match="not the first part"):
        read_gguf(tmp_path / "m-00002-of-00002.gguf")


def write_split(path, number):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.add_uint16("split.no", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
