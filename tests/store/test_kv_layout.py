"""Which layers can be sparse and what the KV cache costs, from metadata alone."""

from pathlib import Path

import pytest

from sfi_local.store.gguf_file import GgufFile, read_gguf
from sfi_local.store.layout import kv_bytes, layers, sfi_bytes, why_dense


def model(architecture="llama", **keys):
    facts = {"block_count": 12, "embedding_length": 1024, "attention.head_count": 16, "attention.head_count_kv": 4, **keys}
    metadata = {f"{architecture}.{key}": value for key, value in facts.items()}
    return GgufFile(Path("m.gguf"), 0, {"general.architecture": architecture, **metadata}, {})


def sparse(file):
    return [il for il, layer in enumerate(layers(file)) if layer.sparse]


def test_every_layer_of_a_llama_is_sparse():
    assert sparse(model()) == list(range(12))


@pytest.mark.parametrize("architecture, keys, expected", [
    ("gemma2", {"attention.sliding_window": 4096}, [1, 3, 5, 7, 9, 11]),
    ("gemma3", {"attention.sliding_window": 512}, [5, 11]),
    ("cohere2moe", {"attention.sliding_window": 512}, [0, 4, 8]),
    ("gpt-oss", {"attention.sliding_window": 128}, [1, 3, 5, 7, 9, 11]),
    ("gemma4", {"attention.sliding_window": 512, "attention.sliding_window_pattern": [1, 1, 0] * 4}, [2, 5, 8, 11]),
    ("llama", {"attention.sliding_window": 512}, list(range(12))),
])
def test_sliding_window_layers_stay_dense(architecture, keys, expected):
    assert sparse(model(architecture, **keys)) == expected


@pytest.mark.parametrize("file, word", [
    (model("mamba"), "recurrent"), (model("qwen3next"), "recurrent"), (model("bloom"), "ALiBi"),
    (model("mpt", **{"attention.max_alibi_bias": 8.0}), "ALiBi"),
    (model("deepseek2", **{"attention.key_length_mla": 192}), "MLA"), (model("bert"), "token by token"),
    (model("llama", **{"attention.key_length": 72}), "multiple of 16"),
    (model("llama", **{"attention.causal": False}), "causal"),
])
def test_what_cannot_be_sparse_says_why(file, word):
    assert sparse(file) == []
    assert word in why_dense(layers(file))


def test_kv_bytes_by_hand():
    # 12 layers x 4 KV heads x (64 + 64) elements x 2 bytes
    assert kv_bytes(layers(model()), 1000) == 1000 * 12 * 4 * 128 * 2
    assert kv_bytes(layers(model()), 1000, "q8_0", "q4_0") == 1000 * 12 * 4 * (68 + 36)


def test_layers_with_a_sliding_window_hold_every_cell():
    """Their caches are made whole, so that they can be cut and continued anywhere."""
    file = model("gemma3", **{"attention.sliding_window": 512})
    assert kv_bytes(layers(file), 100_000) == 100_000 * 12 * 4 * 128 * 2


def test_layers_that_share_a_cache_cost_nothing_and_stay_dense():
    file = model("gemma4", **{"attention.sliding_window": 512, "attention.sliding_window_pattern": [0] * 12,
                              "attention.shared_kv_layers": 4})
    assert sparse(file) == list(range(8))
    assert kv_bytes(layers(file), 10) == 10 * 8 * 4 * 128 * 2


def test_layers_may_differ_in_heads():
    file = model(**{"attention.head_count_kv": [4] * 6 + [0] * 6})
    assert sparse(file) == list(range(6))


def test_the_prediction_agrees_with_the_library(tiny):
    from sfi_local import load

    with load(tiny, mode="sfi", n_threads=1) as loaded:
        session = loaded.open_session(1, 1)
        engine = session.engine
        ours, theirs = layers(read_gguf(tiny)), engine.layers()
        assert [(a.sparse, a.n_head, a.n_head_kv, a.k_size, a.v_size) for a in ours] == [
            (b.sparse, b.n_head, b.n_head_kv, b.n_embd_head_k, b.n_embd_head_v) for b in theirs]
        assert kv_bytes(ours, 1) == sum(layer.kv_cell_bytes for layer in theirs)
        assert sfi_bytes(ours, engine.params, session.n_ctx) == pytest.approx(engine.memory(), rel=0.01)


def test_the_compact_copy_of_the_portable_path_too(tiny, monkeypatch):
    from sfi_local import SfiParams, load
    from sfi_local.store.layout import compact_bytes

    monkeypatch.setenv("SFI_PORTABLE_PATH", "1")
    for policy, kv_type in (("frozen", "f16"), ("frozen", "f32"), ("window", "q8_0")):
        params = SfiParams.of(policy).fit_context(512)
        with load(tiny, mode="sfi", n_threads=1, n_ctx=512, params=params, type_k=kv_type, type_v=kv_type) as loaded:
            engine, ours = loaded.open_session(1, 1).engine, layers(read_gguf(tiny))
            assert engine.path == "portable"
            of_policy = sfi_bytes(ours, params, 512) if policy == "frozen" else 0
            assert of_policy + compact_bytes(ours, params, 512, kv_type, kv_type) == pytest.approx(engine.memory(), rel=0.01)
