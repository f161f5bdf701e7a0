"""A llama_context with slow-fast decoding attached, its cache to edit, and a view of what its graph computes."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from support import reference as ref
from support.ggml_ops import TYPES, find_library, library_dir  # first: it sets how OpenMP threads wait
from support.tiny_model import write_tiny

KINDS = {number: kind for kind, number in TYPES.items()}
BLOCKS = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}  # values, bytes of a block
ROW_KINDS = list(BLOCKS)


class Node(ctypes.Structure):
    """struct ggml_tensor"""


Node._fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                 ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16),
                 ("flags", ctypes.c_int32), ("src", ctypes.POINTER(Node) * 10), ("view_src", ctypes.c_void_p),
                 ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


class Watch:
    """Every node whose name is `prefix`-LAYER, after it was computed: its layer and operation are kept in `seen`.

    replace(layer, node) -> array: what the graph goes on with instead, float32 of as many values; None: watch only.
    """

    def __init__(self, prefix):
        self.prefix, self.seen, self.replace, self.error = prefix + "-", [], None, None
        self.op_name = ctypes.CDLL(str(find_library(library_dir(), "ggml-base"))).ggml_sfi_op_desc
        self.op_name.restype, self.op_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

    def __call__(self, address, ask, user):
        node = Node.from_address(address)
        name = node.name.decode()
        if not name.startswith(self.prefix) or ask:
            return name.startswith(self.prefix) or not ask
        try:
            self.on_node(int(name.removeprefix(self.prefix)), node)
        except BaseException as error:  # it must not be lost on its way through C
            self.error = error
        return self.error is None

    def on_node(self, layer, node):
        self.seen.append((layer, self.op_name(ctypes.addressof(node)).decode()))
        if self.replace:
            new = np.ascontiguousarray(self.replace(layer, node), np.float32)
            assert new.size == np.prod(node.ne)
            ctypes.memmove(node.data, new.ctypes.data, new.nbytes)


def node_rows(node):
    """(kind, uint8 [ne2, ne1, row bytes]) of a node [ne0, ne1, ne2] of any type and any strides."""
    kind = KINDS[node.type]
    per_block, size = BLOCKS[kind]
    shape = (node.ne[2], node.ne[1], node.ne[0] // per_block * size)
    span = sum((n - 1) * nb for n, nb in zip(shape, (node.nb[2], node.nb[1], 1))) + 1
    flat = np.frombuffer((ctypes.c_uint8 * span).from_address(node.data), np.uint8)
    return kind, np.lib.stride_tricks.as_strided(flat, shape, (node.nb[2], node.nb[1], 1), writeable=False)


def values_of(node):
    """The values of a contiguous I32 node."""
    return np.array((ctypes.c_int32 * (node.ne[0] * node.ne[1])).from_address(node.data))


def attend_to(node, supports):
    """What a sparse_attn node of one token gives if KV head h attends to supports[h] -> [n_head, n_embd_v]."""
    (_, q), k, v = (node_rows(node.src[i].contents) for i in range(3))
    q = ref.dequantise("f32", q)[:, 0]  # [n_head, n_embd_k]
    keys, values = ([ref.dequantise(kind, rows[h][cells]) for h, cells in enumerate(supports)] for kind, rows in (k, v))
    group = len(q) // len(supports)
    return np.array([ref.attend(q[h], keys[h // group], values[h // group], q.shape[1]**-0.5) for h in range(len(q))])


class Context:
    """A llama_context, its engine (None without params), and its KV cache; n_ctx cells per sequence."""

    def __init__(self, native, weights, params, n_ctx=1024, kv="f16", n_threads=1, n_seq=1, watch=None, **settings):
        from sfi_local.binding.engine import Engine

        self.llama, self.engine, self.watch = native.llama_cpp, None, watch
        p = self.llama.llama_context_default_params()
        p.n_ctx, p.n_seq_max, p.n_batch, p.n_ubatch = n_ctx * n_seq, n_seq, 512, 256
        p.n_threads = p.n_threads_batch = n_threads
        p.type_k = p.type_v = TYPES.get(kv, kv)
        p.flash_attn_type, p.no_perf = self.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, True
        if watch:
            p.cb_eval = self._callback = self.llama.llama_cpp.ggml_backend_sched_eval_callback(watch)
        for name, value in settings.items():
            setattr(p, name, value)
        self.address = self.llama.llama_init_from_model(weights, p)
        assert self.address, "llama.cpp made no context"
        self.memory = self.llama.llama_get_memory(self.address)
        self.n_vocab = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(weights))
        if params:
            self.engine = Engine(self.address, params)
            self.prefill, self.peek = self.engine.prefill, self.engine.peek

    def close(self):
        if self.engine:
            self.engine.close()
        self.free_context()

    def free_context(self):
        """The llama_context alone; the engine stays and is detached."""
        self.llama.llama_free(self.address)
        self.address = None

    def step(self, token, kind="auto", seq=0):
        """A step, its StepInfo; an error of the watcher comes out here."""
        info = self.engine.step(token, kind, seq)
        if self.watch and self.watch.error:
            raise self.watch.error
        return info

    def steps(self, tokens, kind="auto", seq=0):
        """The logits after each of several steps, [n, n_vocab]."""
        return np.array([self.logits() for token in tokens if self.step(token, kind, seq)])

    def decode(self, tokens, seq=0, status=0):
        """Plain llama_decode behind the engine's back, after what the sequence holds; the logits of the last token."""
        pos = self.llama.llama_memory_seq_pos_max(self.memory, seq) + 1
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos + i, 1
            batch.seq_id[i][0], batch.logits[i] = seq, i == len(tokens) - 1
        assert self.llama.llama_decode(self.address, batch) == status
        self.llama.llama_batch_free(batch)
        return self.logits() if status == 0 else None

    def logits(self, row=-1):
        return np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.address, row), shape=(self.n_vocab,)).copy()

    def n_reused(self):
        """Graphs that were used again since the context was made."""
        return self.llama.llama_perf_context(self.address).n_reused

    def cut(self, pos, end=-1, seq=0):
        """Remove the cells of positions [pos, end); -1: all from pos on."""
        assert self.llama.llama_memory_seq_rm(self.memory, seq, pos, end)

    def state(self, seq=0):
        """The state of one sequence, as bytes in a ctypes array."""
        data = (ctypes.c_uint8 * self.llama.llama_state_seq_get_size(self.address, seq))()
        assert self.llama.llama_state_seq_get_data(self.address, data, len(data), seq) == len(data)
        return data

    def set_state(self, data, seq=0):
        assert self.llama.llama_state_seq_set_data(self.address, data, len(data), seq) == len(data)


def write_sliding(path):
    """A tiny model whose layers 0, 1, 2 attend to a window of 64 cells, and layer 3 to all."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name, *args, **kwargs):
            if name != "output.weight" and "ffn_norm" not in name:  # this architecture has none
                super().add_tensor(name, *args, **kwargs)

    keys = {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 1.0, "attention.sliding_window": 64}
    with patch.object(gguf, "GGUFWriter", Writer):
        return write_tiny(path, architecture="cohere2", **keys)


def write_scaling(path):
    """The tiny model as an architecture that scales Q itself and passes 1 for the scale of the logits."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name, *args, **kwargs):
            if name != "output.weight":  # this architecture has none
                super().add_tensor(name, *args, **kwargs)

    with patch.object(gguf, "GGUFWriter", Writer):
        return write_tiny(path, architecture="gemma", **{"attention.layer_norm_rms_epsilon": 1e-5})


@contextmanager
def load_weights(native, path):
    """A llama_model, freed at the end."""
    model = native.llama_cpp.llama_model_load_from_file(str(path).encode(), native.llama_cpp.llama_model_default_params())
    assert model, f"{path} cannot be loaded"
    yield model
    native.llama_cpp.llama_model_free(model)
