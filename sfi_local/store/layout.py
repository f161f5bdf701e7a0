"""From GGUF metadata alone: the attention layers of a model, their KV bytes, and which of them can be sparse. Pure.

The rules follow llama.cpp at the pin (src/models/*.cpp, llama_model::create_memory). They predict; the verdict on a
loaded model is the library's (``Engine.layers()``), and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfi_local.params import MAX_QUERIES, SfiParams
from sfi_local.store.gguf_file import GgufFile

# bytes per 32 elements of K or V
KV_TYPES = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18}

MAX_HEAD_SIZE = 512

_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_HYBRID = {
    "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen3next",
    "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "qwen35", "qwen35moe", "qwen4exp", "deepseek4", "minimax-01",
}
_OWN_CACHE = {"minimax-m3", "glm-dsa", "deepseek32", "hy_v4", "dots3note", "dflash", "gemma4-assistant"}
NO_CACHE = {
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1", "t5", "t5encoder", "llama-embed",
}
_ALIBI = {"bloom", "refact"}

# architecture -> (period: every n-th layer is not sliding-window, the first layer of a period is the exception,
# window in cells if the file does not say); a period of None: the file lists the layers
_SWA = {
    "afmoe": (4, False, 0), "cohere2": (4, False, 0), "cohere2moe": (4, True, 0), "exaone-moe": (4, False, 128),
    "exaone4": (4, False, 4096), "gemma2": (2, False, 4096), "gemma3": (6, False, 0), "gemma3n": (5, False, 0),
    "gemma4": (None, False, 0), "granite_swa": (None, False, 0), "laguna": (4, True, 0), "llama4": (4, False, 8192),
    "maple": (None, False, 0), "mellum": (4, False, 0), "mimo2": (None, False, 0), "muse-glimmer": (4, False, 0),
    "olmo2": (4, False, 0), "gpt-oss": (2, False, 0), "plamo3": (8, False, 0), "smallthinker": (4, True, 4096),
    "spark2_5": (None, False, 0), "step35": (None, False, 0),
}


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    n_head, n_head_kv: query heads and KV heads; n_head_kv 0: no attention in this layer
    k_size, v_size:    head size of K and V
    window:            cells of a sliding window; 0: the layer sees every cell
    shared:            reads the KV cache of an earlier layer and has none of its own
    sparse, why:       whether fast steps can be sparse here, and if not, why
    """

    n_head: int
    n_head_kv: int
    k_size: int
    v_size: int
    window: int
    shared: bool
    sparse: bool
    why: str

    def kv_bytes(self, n_ctx: int, type_k: str, type_v: str) -> int:
        """Bytes of K and V of this layer in a context of n_ctx cells: all of them also where it sees a window only, because the
        cache is made so that it can be cut and continued anywhere."""
        return 0 if self.shared else n_ctx * self.n_head_kv * (self.k_size * KV_TYPES[type_k] + self.v_size * KV_TYPES[type_v]) // 32


def layers(file: GgufFile) -> list[Layer]:
    """All layers of a model, in order."""
    n_layer = int(file.get("block_count", 0)) - int(file.get("nextn_predict_layers", 0))
    whole = _why_whole_model(file)
    return [_layer(file, il, whole) for il in range(max(0, n_layer))]


# architecture -> what such a file is
_NO_MODEL = {
    "clip": "an image or sound projector (mmproj)", "imatrix": "an importance matrix for quantising", "controlvector": "a control vector",
    "eagle3": "a draft model that only helps another",
}


def kind_of_file(file: GgufFile) -> str:
    """What a file is that is no model for itself; "" if it may be one."""
    kind = str(file.metadata.get("general.type", "model"))
    if kind == "adapter" or any(name.endswith((".lora_a", ".lora_b")) for name in file.tensors):
        return "an adapter (LoRA) for a model"
    if kind in ("imatrix", "mmproj", "control_vector", "vocab"):
        return {"imatrix": _NO_MODEL["imatrix"], "mmproj": _NO_MODEL["clip"], "vocab": "a vocabulary without weights"}.get(
            kind, _NO_MODEL["controlvector"])
    if file.architecture in _NO_MODEL:
        return _NO_MODEL[file.architecture]
    if file.metadata.get("clip.has_vision_encoder") or file.metadata.get("clip.has_audio_encoder"):
        return _NO_MODEL["clip"]
    return "" if file.tensors or int(file.metadata.get("split.count", 0)) > 1 else "a vocabulary without weights"


def why_dense(all_layers: list[Layer]) -> str:
    """Why no layer can be sparse; "" if one can."""
    if any(layer.sparse for layer in all_layers):
        return ""
    return next((layer.why for layer in all_layers), "the file describes no layers")


def kv_bytes(all_layers: list[Layer], n_ctx: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of the KV cache of a context of n_ctx cells."""
    return sum(layer.kv_bytes(n_ctx, type_k, type_v) for layer in all_layers)


def n_vocab(file: GgufFile) -> int:
    """Tokens of the vocabulary."""
    embedding = file.tensors.get("token_embd.weight", (0, 0))
    tokens = file.metadata.get("tokenizer.ggml.tokens", 0)
    return embedding[1] or (len(tokens) if isinstance(tokens, list) else int(tokens))


def compute_bytes(file: GgufFile, all_layers: list[Layer], n_ctx: int, n_batch: int, n_outputs: int) -> int:
    """No less than what a batch's masks, activations and logits take, in bytes."""
    masks = 2 if any(layer.window for layer in all_layers) else 1
    widest = max(_most(file.get("feed_forward_length", 0)),
                 int(file.get("expert_feed_forward_length", 0)) * int(file.get("expert_used_count", 0)))
    heads = max((layer.n_head * layer.k_size for layer in all_layers), default=0)
    of_token = 6 * int(file.get("embedding_length", 0)) + 3 * widest + 3 * heads
    return 2 * masks * n_batch * n_ctx + 4 * n_batch * of_token + 4 * n_outputs * n_vocab(file)


def sfi_bytes(all_layers: list[Layer], params: SfiParams, n_ctx: int) -> int:
    """Bytes that sfi adds per sequence of n_ctx cells: the ring of queries (F32), selected cells (I32), stability (4 F32 per
    KV head, policy frozen), and of policy sketch the codes of all cells and their bases."""
    is_sketch = params.policy == "sketch"
    n_queries, n_selected = MAX_QUERIES if is_sketch else params.n_queries, min(params.n_selected, n_ctx)
    return sum(
        4 * (n_queries * layer.n_head * layer.k_size + (n_selected + (4 if params.policy == "frozen" else 0)) * layer.n_head_kv)
        + (_sketch_bytes(layer, params, n_ctx) if is_sketch else 0)
        for layer in all_layers if layer.sparse)


def compact_bytes(all_layers: list[Layer], params: SfiParams, n_ctx: int, type_k: str, type_v: str) -> int:
    """Bytes of the portable path beside that: K and V of a support's cells close together, the set before and evidence of every cell."""
    n_always = min(params.n_sink + params.n_recent + params.max_span, n_ctx)
    n_selected = min(params.n_selected, n_ctx) if params.policy == "frozen" else 0
    n_rows = -(-(n_always + n_selected) // 256) * 256
    kinds = ("f16" if kind == "f32" else kind for kind in (type_k, type_v))
    of_row = [KV_TYPES[kind] for kind in kinds]
    return sum(
        layer.n_head_kv * (n_rows * (layer.k_size * of_row[0] + layer.v_size * of_row[1]) // 32 + (4 * (n_selected + n_ctx) if n_selected else 0))
        for layer in all_layers if layer.sparse)


def _sketch_bytes(layer: Layer, params: SfiParams, n_ctx: int) -> int:
    """Codes in blocks of 16 cells, mean and encoder (F32) and decoder (F16) of K and of V, what is kept of each step."""
    bits_k, n_k = 4 * params.sketch_k4 + 2 * params.sketch_k2 + params.sketch_k1, params.sketch_k4 + params.sketch_k2 + params.sketch_k1
    bits_v, n_v = 4 * params.sketch_v4 + 2 * params.sketch_v2, params.sketch_v4 + params.sketch_v2
    if not n_k:  # the default of llama-path.cpp, for every 64 values of a head
        k, v = max(1, layer.k_size // 64), max(1, layer.v_size // 64)
        two_looks = (128, 56) if k == 1 else (96 * k, 44 * k)
        bits_k, n_k = two_looks if params.tolerance > 0 else (64 * k, 40 * k)
        bits_v, n_v = 32 * v, 16 * v
    codes = -(-n_ctx // 16) * 2 * (bits_k + bits_v)
    basis = layer.k_size * (4 + 6 * n_k) + layer.v_size * (4 + 6 * n_v)
    return layer.n_head_kv * (codes + basis + 12) + 8 * layer.n_head


def _layer(file: GgufFile, il: int, whole: str) -> Layer:
    n_head = _per_layer(file.get("attention.head_count", 0), il)
    n_head_kv = _per_layer(file.get("attention.head_count_kv", n_head), il)
    window = _window(file, il)
    suffix = "_swa" if window else ""
    k_size = int(file.get("attention.key_length" + suffix, 0) or file.get("attention.key_length", 0)
                 or _default_head_size(file, n_head))
    v_size = int(file.get("attention.value_length" + suffix, 0) or file.get("attention.value_length", 0)
                 or _default_head_size(file, n_head))
    shared = _is_shared(file, il)
    why = whole or _why_layer(n_head, n_head_kv, k_size, v_size, window, shared)
    return Layer(n_head, n_head_kv, k_size, v_size, window, shared, sparse=not why, why=why)


def _default_head_size(file: GgufFile, n_head: int) -> int:
    return int(file.get("embedding_length", 0)) // n_head if n_head else 0


def _most(value) -> int:
    """The largest of a value that may be a list with one per layer."""
    return max(map(int, value), default=0) if isinstance(value, list) else int(value)


def _per_layer(value, il: int) -> int:
    """A value that is one number for all layers or a list with one per layer."""
    if isinstance(value, list):
        return int(value[il]) if il < len(value) else 0
    return int(value)


def _is_shared(file: GgufFile, il: int) -> bool:
    """The last layers of the Gemma 3n family read the cache of earlier ones."""
    if file.architecture == "gemma3n":
        return il >= 20
    n_shared = int(file.get("attention.shared_kv_layers", 0)) if file.architecture == "gemma4" else 0
    return il >= int(file.get("block_count", 0)) - n_shared


def _window(file: GgufFile, il: int) -> int:
    """Cells of the sliding window of a layer; 0 if it has none."""
    rule = _SWA.get(file.architecture)
    if rule is None or file.get("attention.sliding_window") == 0:
        return 0
    period, first_is_full, default = rule
    window = int(file.get("attention.sliding_window", default) or 0)
    pattern = file.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return window if il < len(pattern) and pattern[il] else 0
    if not pattern:
        return window if pattern == 0 else 0
    full = il % pattern == (0 if first_is_full else pattern - 1)
    return 0 if full else window


def _why_whole_model(file: GgufFile) -> str:
    """Why no layer of this architecture can be sparse; "" if some may."""
    arch = file.architecture
    if arch in _RECURRENT:
        return f"{arch} is recurrent: it has no KV cache"
    if arch in _HYBRID:
        return f"{arch} mixes recurrent and attention layers, whose cache sfi does not support yet"
    if arch in _OWN_CACHE:
        return f"{arch} has a KV cache of its own kind"
    if arch in NO_CACHE:
        return f"{arch} does not decode token by token from a KV cache"
    if file.get("attention.key_length_mla"):
        return "multi-head latent attention (MLA) is not supported yet"
    if arch in _ALIBI or file.get("attention.max_alibi_bias", 0) or (
            arch == "baichuan" and int(file.get("block_count", 0)) == 40):
        return "attention with ALiBi is not supported"
    if file.get("attention.causal") is False:
        return "attention is not causal"
    return ""


def _why_layer(n_head: int, n_head_kv: int, k_size: int, v_size: int, window: int, shared: bool) -> str:
    if not n_head or not n_head_kv:
        return "no attention in this layer"
    if shared:
        return "the KV cache of an earlier layer is read"
    if window:
        return f"sliding window of {window} cells"
    if n_head % n_head_kv:
        return f"{n_head} heads are no multiple of {n_head_kv} KV heads"
    for size in (k_size, v_size):
        if size % 16 or not 0 < size <= MAX_HEAD_SIZE:
            return f"head size {size} is not a multiple of 16 up to {MAX_HEAD_SIZE}"
    return ""
