"""Files that hold a vocabulary and no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_model import add_byte_vocabulary

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = "\u2581abcdefghijklmnopqrstuvwxyzTHEW.,?[]/INS"


def write_bytes(path: Path, pre: str = "default") -> Path:
    """A vocabulary of bytes, with a pre-tokenizer of llama.cpp by its name."""
    writer = _writer(path)
    add_byte_vocabulary(writer, pre=pre)
    return _written(writer, path)


def write_sentencepiece(path: Path) -> Path:
    """A SentencePiece vocabulary, which begins a text with a space, with a few words in it."""
    tokens = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)] + [(f"<0x{i:02X}>", 0, 6) for i in range(256)]
    tokens += [(c, -10.0, 1) for c in LETTERS] + [("\u2581The", -1.0, 1), ("\u2581re", -1.5, 1), ("\u2581report", -1.0, 1)]
    writer = _writer(path)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([float(score) for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return _written(writer, path)


def vocabulary_of(path: Path) -> Any:
    """The Vocabulary of a file, its weights left out."""
    from sfi_local.binding.library import open_library
    from sfi_local.runtime.vocabulary import Vocabulary

    llama = open_library().llama_cpp
    from llama_cpp._internals import LlamaModel

    params = llama.llama_model_default_params()
    params.vocab_only = True
    return Vocabulary(LlamaModel(path_model=str(path), params=params, verbose=False))


def _writer(path: Path) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, 512), (writer.add_embedding_length, 32), (writer.add_feed_forward_length, 32),
                       (writer.add_block_count, 1), (writer.add_head_count, 1), (writer.add_layer_norm_rms_eps, 1e-5)):
        add(value)
    return writer


def _written(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
