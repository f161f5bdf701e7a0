"""A tiny GGUF model with seeded random weights, made in a moment."""

from __future__ import annotations

from pathlib import Path

SEED = 2603
N_CTX = 4096

CHATML = (r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          r"{{ '<|im_start|>assistant\n' }}")


def write_tiny(path: Path, seed: int = SEED, architecture: str = "llama", n_layer: int = 4, n_embd: int = 128,
               n_head: int = 4, n_head_kv: int = 2, n_ctx: int = N_CTX, template: str = CHATML, pre: str = "default",
               **metadata) -> Path:
    """Write a model with random weights; metadata: further keys of the architecture, e.g. sliding_window=64."""
    import gguf
    import numpy as np

    rng, size, n_ff = np.random.default_rng(seed), n_embd // n_head, 2 * n_embd
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size)
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    n_vocab = add_byte_vocabulary(writer, template, pre)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * np.float32(1.5 / shape[-1] ** 0.5))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, dtype=np.float32))

    tensor("token_embd.weight", n_vocab, n_embd)
    tensor("output.weight", n_vocab, n_embd)
    ones("output_norm.weight")
    for il in range(n_layer):
        ones(f"blk.{il}.attn_norm.weight")
        ones(f"blk.{il}.ffn_norm.weight")
        tensor(f"blk.{il}.attn_q.weight", n_head * size, n_embd)
        tensor(f"blk.{il}.attn_k.weight", n_head_kv * size, n_embd)
        tensor(f"blk.{il}.attn_v.weight", n_head_kv * size, n_embd)
        tensor(f"blk.{il}.attn_output.weight", n_embd, n_head * size)
        tensor(f"blk.{il}.ffn_gate.weight", n_ff, n_embd)
        tensor(f"blk.{il}.ffn_up.weight", n_ff, n_embd)
        tensor(f"blk.{il}.ffn_down.weight", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_vocabulary(writer, template: str = CHATML, pre: str = "default") -> int:
    """One token per byte in GPT-2's spelling, one merge, three special tokens; returns the number of tokens."""
    import gguf

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    tokens = [spelling[b] for b in range(256)] + ["er", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["e r"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(259)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)
    return len(tokens)
