"""Tiny models of several architectures with random weights, whose caches are laid out as those of the large ones."""

from __future__ import annotations

from pathlib import Path

from support.tiny_model import SEED, add_byte_vocabulary

SHAPES = ("llama", "qwen2", "gemma3", "cohere2", "gpt-oss")
N_LAYER, WIDTH, N_FF, N_HEAD, N_HEAD_KV, HEAD_SIZE, WINDOW, N_EXPERT = 6, 128, 96, 4, 2, 32, 128, 4


def write_shape(path: Path, architecture: str, n_ctx: int = 131072) -> Path:
    """6 layers of 4 heads of 32 values, 2 KV heads; windows of 128 cells where the architecture has them."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(SEED)
    out = gguf.GGUFWriter(path, architecture)
    for add, value in ((out.add_context_length, n_ctx), (out.add_embedding_length, WIDTH), (out.add_block_count, N_LAYER),
                       (out.add_feed_forward_length, N_FF), (out.add_head_count, N_HEAD), (out.add_head_count_kv, N_HEAD_KV),
                       (out.add_key_length, HEAD_SIZE), (out.add_value_length, HEAD_SIZE), (out.add_rope_dimension_count, HEAD_SIZE)):
        add(value)
    if architecture == "cohere2":
        out.add_layer_norm_eps(1e-5)
        out.add_logit_scale(1.0)
    else:
        out.add_layer_norm_rms_eps(1e-5)
    if architecture in ("gemma3", "cohere2", "gpt-oss"):
        out.add_sliding_window(WINDOW)
    if architecture == "gpt-oss":
        out.add_expert_count(N_EXPERT)
        out.add_expert_used_count(2)
        out.add_expert_feed_forward_length(N_FF)
    n_vocab = add_byte_vocabulary(out)
    for name, shape in _tensors(architecture, n_vocab).items():
        out.add_tensor(name, np.ones(shape, np.float32) if "norm" in name
                       else rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _tensors(architecture: str, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape, outermost first."""
    q, kv = N_HEAD * HEAD_SIZE, N_HEAD_KV * HEAD_SIZE
    all_layers = {"token_embd.weight": (n_vocab, WIDTH), "output_norm.weight": (WIDTH,)}
    if architecture in ("llama", "qwen2", "gpt-oss"):
        all_layers["output.weight"] = (n_vocab, WIDTH)
    layer = {"attn_norm.weight": (WIDTH,), "attn_q.weight": (q, WIDTH), "attn_k.weight": (kv, WIDTH), "attn_v.weight": (kv, WIDTH),
             "attn_output.weight": (WIDTH, q)}
    if architecture == "gpt-oss":
        layer |= {"post_attention_norm.weight": (WIDTH,), "attn_sinks.weight": (N_HEAD,), "attn_output.bias": (WIDTH,),
                  "attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,),
                  "ffn_gate_inp.weight": (N_EXPERT, WIDTH), "ffn_gate_inp.bias": (N_EXPERT,)}
        for name, (rows, columns) in {"gate": (N_FF, WIDTH), "up": (N_FF, WIDTH), "down": (WIDTH, N_FF)}.items():
            layer |= {f"ffn_{name}_exps.weight": (N_EXPERT, rows, columns), f"ffn_{name}_exps.bias": (N_EXPERT, rows)}
    else:
        layer |= {"ffn_gate.weight": (N_FF, WIDTH), "ffn_up.weight": (N_FF, WIDTH), "ffn_down.weight": (WIDTH, N_FF)}
        if architecture != "cohere2":
            layer["ffn_norm.weight"] = (WIDTH,)
    if architecture == "gemma3":
        layer |= {f"{name}.weight": (WIDTH,) for name in ("post_attention_norm", "post_ffw_norm")}
        layer |= {"attn_q_norm.weight": (HEAD_SIZE,), "attn_k_norm.weight": (HEAD_SIZE,)}
    return all_layers | {f"blk.{il}.{name}": shape for il in range(N_LAYER) for name, shape in layer.items()}
