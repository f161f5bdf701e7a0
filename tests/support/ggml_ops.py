"""One ggml operation at a time, from numpy to numpy, on the CPU backend, or on that of a GPU's shim: SFI_TEST_DEVICE=CUDA-shim.

    with Graph() as g:
        q = g.tensor(q_array)                       # float32 or int32, contiguous
        k = g.cache(encode(k_array, "q8_0"), "q8_0")  # a view of a KV cache, strided the way llama.cpp strides it
        out = g.compute(g.sparse_attn(q, k, v, None, selected, scale=0.125), n_threads=2)

A ggml tensor [ne0, ne1, ne2, ne3] is a numpy array [ne3, ne2, ne1, ne0].
"""

import ctypes
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest

# ggml's OpenMP threads spin when they wait; with more threads than idle cores that makes these tests ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_K": 12, "q5_K": 13, "q6_K": 14, "i8": 24, "i32": 26,
         "bf16": 30}
DEVICE_CPU = 0  # enum ggml_backend_dev_type
DEVICE = os.environ.get("SFI_TEST_DEVICE", "")
MEM_SIZE = 512 << 20  # of a context; only what is touched becomes real
POISON = 0xFF  # filled into memory no operation may read (NaN in every float type) or must overwrite


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Tensor(ctypes.Structure):  # the head of struct ggml_tensor
    _fields_ = [("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4)]


class Selector(ctypes.Structure):  # struct ggml_support_selector
    _fields_ = [(name, c_int32) for name in ("kind", "pool_after", "pool_before", "nms_radius")]
    _fields_ += [(name, c_float) for name in ("alpha", "gamma", "beta", "p", "eta", "lambda_clip", "a_soft", "a_cross",
                                              "temperature")]


class SketchFormat(ctypes.Structure):  # struct ggml_sketch_format
    _fields_ = [(name, c_int32) for name in ("n_k4", "n_k2", "n_k1", "n_v4", "n_v2", "n_first")]


class Stranger(Exception):
    """The libraries are not there, or are not ours."""


T, SIZE, F, I = POINTER(Tensor), c_size_t, c_float, c_int
SIGNATURES = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_row_size": (SIZE, [I, c_int64]),
    "ggml_nbytes": (SIZE, [T]),
    "ggml_get_data": (c_void_p, [T]),
    "ggml_get_mem_buffer": (c_void_p, [c_void_p]),
    "ggml_get_mem_size": (SIZE, [c_void_p]),
    "ggml_get_first_tensor": (T, [c_void_p]),
    "ggml_get_next_tensor": (T, [c_void_p, T]),
    "ggml_quantize_chunk": (SIZE, [I, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_new_tensor_4d": (T, [c_void_p, I] + [c_int64] * 4),
    "ggml_view_4d": (T, [c_void_p, T] + [c_int64] * 4 + [SIZE] * 4),
    "ggml_permute": (T, [c_void_p, T] + [I] * 4),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, T]),
    "ggml_flash_attn_ext": (T, [c_void_p, T, T, T, T, F, F, F]),
    "ggml_flash_attn_ext_add_sinks": (None, [T, T]),
    "ggml_mul_mat": (T, [c_void_p, T, T]),
    "ggml_backend_dev_count": (SIZE, []),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_init_by_type": (c_void_p, [I, c_char_p]),
    "ggml_backend_init_by_name": (c_void_p, [c_char_p, c_char_p]),
    "ggml_backend_load": (c_void_p, [c_char_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, SIZE]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, T]),
    "ggml_backend_graph_compute": (I, [c_void_p, c_void_p]),
}
SFI_SIGNATURES = {  # ggml-sfi.h
    "ggml_sparse_attn": (T, [c_void_p, T, T, T, T, T, T, T, F, F]),
    "ggml_sparse_attn_evidence": (T, [c_void_p, T, T, T, T, T, T, F, F]),
    "ggml_sparse_attn_set_visible": (None, [T, T]),
    "ggml_sparse_attn_set_blocks": (None, [T]),
    "ggml_sparse_attn_skip_tiles": (None, [T, ctypes.c_float]),
    "ggml_block_mul_mat": (T, [c_void_p, T, T]),
    "ggml_few_mul_mat": (T, [c_void_p, T, T]),
    "ggml_support_evidence": (T, [c_void_p, T, T, T, T, F, F, F, I]),
    "ggml_support_select": (T, [c_void_p, T, T, T, T, c_int32, POINTER(Selector)]),
    "ggml_support_stability": (T, [c_void_p, T, T, T, T, T]),
    "ggml_sketch_cell_bytes": (c_int64, [POINTER(SketchFormat)]),
    "ggml_sketch_basis_size": (c_int64, [POINTER(SketchFormat), c_int64, c_int64]),
    "ggml_sketch_encode": (T, [c_void_p, T, T, T, T, T, POINTER(SketchFormat)]),
    "ggml_sketch_scan": (T, [c_void_p, T, T, T, T, T, T, T, T, c_int64, c_int64, F, F, F, POINTER(SketchFormat)]),
}


class Library:
    """The functions above, and the CPU backend: the only one of this build, or the best of a portable one."""

    def __init__(self, lib_dir):
        # base first: "ggml" needs it, and a global one is found without a search path
        self.parts = [ctypes.CDLL(str(find_library(lib_dir, part)), ctypes.RTLD_GLOBAL) for part in ("ggml-base", "ggml")]
        for name, signature in {**SIGNATURES, **SFI_SIGNATURES}.items():
            setattr(self, name, self.function(name, *signature))
        if self.ggml_backend_dev_count() == 0:
            self.ggml_backend_load_all_from_path(str(lib_dir).encode())
        self.cpu = self.ggml_backend_init_by_type(DEVICE_CPU, None)
        reg = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(self.cpu))
        address = self.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
        self.set_n_threads = ctypes.CFUNCTYPE(None, c_void_p, I)(address)
        self.backend = self.cpu
        if DEVICE:
            shim = lib_dir.resolve() / f"libsfi-{DEVICE.lower()}.so"
            if not self.ggml_backend_load(str(shim).encode()):
                raise Stranger(f"{shim} cannot be loaded: build with -DSFI_TESTS=ON")
            self.backend = self.ggml_backend_init_by_name(DEVICE.encode(), None)

    def function(self, name, restype, argtypes):
        for part in self.parts:
            if hasattr(part, name):
                f = getattr(part, name)
                f.restype, f.argtypes = restype, argtypes
                return f
        raise Stranger(f"{name} is in none of {[p._name for p in self.parts]}: build the native library again")


def find_library(lib_dir, name):
    found = [p for p in sorted(lib_dir.glob(f"*sfi-{name}.*")) if p.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise Stranger(f"there is no *sfi-{name} in {lib_dir}: build the native library first")
    return found[0]


def library_dir():
    """sfi_local/lib, of the package that would be imported or else of this tree."""
    spec = importlib.util.find_spec("sfi_local")
    package = Path(spec.origin).parent if spec and spec.origin else Path(__file__).resolve().parents[2] / "sfi_local"
    return Path(os.environ.get("SFI_LIB_DIR") or package / "lib")


_library = None


def library():
    global _library
    if _library is None:
        _library = Library(library_dir())
    return _library


def encode(array, kind):
    """float [..., n] -> uint8 [..., n_bytes]: the rows as ggml stores them."""
    rows = np.ascontiguousarray(array, np.float32)
    n = rows.shape[-1]
    out = np.zeros(rows.shape[:-1] + (library().ggml_row_size(TYPES[kind], n),), np.uint8)
    if rows.size:
        library().ggml_quantize_chunk(TYPES[kind], rows.ctypes.data, out.ctypes.data, 0, rows.size // n, n, None)
    return out


class Graph:
    """A ggml context that holds the inputs of one operation, the operation and its result."""

    def __init__(self):
        self.lib = library()
        self.ctx = self.lib.ggml_init(InitParams(MEM_SIZE, None, False))
        self.buffer = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_free(self.ctx)

    # -- inputs --

    def new(self, kind, *ne):
        return self.lib.ggml_new_tensor_4d(self.ctx, TYPES[kind], *ne, *[1] * (4 - len(ne)))

    def tensor(self, array):
        """A contiguous F32, I32 or (from uint8) I8 tensor. None stays None (a NULL argument)."""
        if array is None:
            return None
        array = np.asarray(array)
        if array.dtype == np.uint8:
            return self.write(self.new("i8", *reversed(array.shape)), array)
        kind = "i32" if array.dtype.kind == "i" else "f32"
        array = np.ascontiguousarray(array, np.int32 if kind == "i32" else np.float32)
        return self.write(self.new(kind, *reversed(array.shape)), array)

    def rows(self, rows, kind):
        """A contiguous tensor of any type from encoded rows, uint8 [..., n_bytes]."""
        n_values = rows.shape[-1] * 256 // self.lib.ggml_row_size(TYPES[kind], 256)
        return self.write(self.new(kind, n_values, *reversed(rows.shape[:-1])), rows)

    def cache(self, rows, kind, n_spare=5):
        """K or V as llama.cpp passes it: [n_embd, n_cells, n_head_kv, n_stream] permuted out of a cache that stores
        [n_embd * n_head_kv, n_cells + n_spare, n_stream]. rows: uint8 [n_stream, n_head_kv, n_cells, n_bytes]."""
        n_stream, n_head_kv, n_cells, n_bytes = rows.shape
        n_embd = n_bytes * 256 // self.lib.ggml_row_size(TYPES[kind], 256)
        store = np.full((n_stream, n_cells + n_spare, n_head_kv, n_bytes), POISON, np.uint8)
        store[:, :n_cells] = rows.transpose(0, 2, 1, 3)
        whole = self.write(self.new(kind, n_embd * n_head_kv, n_cells + n_spare, n_stream), store)
        view = self.lib.ggml_view_4d(self.ctx, whole, n_embd, n_head_kv, n_cells, n_stream, n_bytes,
                                     n_bytes * n_head_kv, n_bytes * n_head_kv * (n_cells + n_spare), 0)
        return self.lib.ggml_permute(self.ctx, view, 0, 2, 1, 3)

    def permuted(self, array):
        """float [n3, n2, n1, n0] stored as [n3, n1, n2, n0]: q as llama.cpp passes it."""
        return self.lib.ggml_permute(self.ctx, self.tensor(np.asarray(array).transpose(0, 2, 1, 3)), 0, 2, 1, 3)

    def strided(self, array, n_spare=3):
        """float32 or int32, every row followed by n_spare entries that nobody may read."""
        array = np.asarray(array)
        shape = (1,) * (4 - array.ndim) + array.shape
        wide = np.full(shape[:-1] + (shape[-1] + n_spare,), -1, np.int32)
        wide = wide if array.dtype.kind == "i" else wide.view(np.float32)
        wide[..., :shape[-1]] = array.reshape(shape)
        t = self.tensor(wide)
        return self.lib.ggml_view_4d(self.ctx, t, *reversed(shape), *t.contents.nb[1:], 0)

    def write(self, t, array):
        array = np.ascontiguousarray(array)
        assert array.nbytes == self.lib.ggml_nbytes(t)
        if array.nbytes:
            ctypes.memmove(self.lib.ggml_get_data(t), array.ctypes.data, array.nbytes)
        return t

    # -- operations: a method per function of ggml-sfi.h, without the context --

    def sparse_attn(self, q, k, v, always=None, selected=None, tail=None, sinks=None, scale=1.0, logit_softcap=0.0,
                    visible=None, blocks=False, least=0.0):
        out = self.lib.ggml_sparse_attn(self.ctx, q, k, v, always, selected, tail, sinks, scale, logit_softcap)
        if visible is not None:
            self.lib.ggml_sparse_attn_set_visible(out, visible)
        if blocks:
            self.lib.ggml_sparse_attn_set_blocks(out)
        if least:
            self.lib.ggml_sparse_attn_skip_tiles(out, least)
        return out

    def sparse_attn_evidence(self, q, k, v, cells, sinks, plan, scale=1.0, logit_softcap=0.0):
        return self.lib.ggml_sparse_attn_evidence(self.ctx, q, k, v, cells, sinks, plan, scale, logit_softcap)

    def support_evidence(self, q, k, cells, plan, scale=1.0, logit_softcap=0.0, alpha=1.0, over=0):
        return self.lib.ggml_support_evidence(self.ctx, q, k, cells, plan, scale, logit_softcap, alpha, over)

    def support_select(self, evidence, cells, plan, k, n_selected, **selector):
        return self.lib.ggml_support_select(self.ctx, evidence, cells, plan, k, n_selected, Selector(**selector))

    def support_stability(self, evidence, cells, plan, selected, previous):
        return self.lib.ggml_support_stability(self.ctx, evidence, cells, plan, selected, previous)

    def sketch_encode(self, codes, basis, k, v, cells, form):
        return self.lib.ggml_sketch_encode(self.ctx, codes, basis, k, v, cells, SketchFormat(*form))

    def sketch_scan(self, q, codes, basis, skip, plan, least, selected, counts, n_list, n_embd_v, form, scale=1.0, logit_softcap=0.0,
                    second_look=0.0):
        return self.lib.ggml_sketch_scan(self.ctx, q, codes, basis, skip, plan, least, selected, counts, n_list, n_embd_v, scale,
                                         logit_softcap, second_look, SketchFormat(*form))

    def mul_mat(self, w, x):
        return self.lib.ggml_mul_mat(self.ctx, w, x)

    def block_mul_mat(self, w, x):
        return self.lib.ggml_block_mul_mat(self.ctx, w, x)

    def few_mul_mat(self, w, x):
        return self.lib.ggml_few_mul_mat(self.ctx, w, x)

    def flash_attn(self, q, k, v, mask=None, sinks=None, scale=1.0, logit_softcap=0.0):
        out = self.lib.ggml_flash_attn_ext(self.ctx, q, k, v, mask, scale, 0.0, logit_softcap)
        self.lib.ggml_flash_attn_ext_add_sinks(out, sinks)
        return out

    # -- result --

    def supported(self, out):
        """On a GPU's shim the test is skipped where it does not: GPUs have kernels for some types and sizes only."""
        answer = self.lib.ggml_backend_supports_op(self.lib.backend, out)
        if DEVICE and not answer:
            pytest.skip(f"{DEVICE} does not compute this")
        return answer

    def give_buffer(self):
        """A GPU's backend finds the memory of a tensor by its buffer, which those of a context do not have."""
        if not self.buffer:
            memory, size = self.lib.ggml_get_mem_buffer(self.ctx), self.lib.ggml_get_mem_size(self.ctx)
            self.buffer = self.lib.ggml_backend_cpu_buffer_from_ptr(memory, size)
        tensor = self.lib.ggml_get_first_tensor(self.ctx)
        while tensor:
            tensor.contents.buffer = self.buffer
            tensor = self.lib.ggml_get_next_tensor(self.ctx, tensor)

    def compute(self, out, n_threads=1, in_place=False):
        """The F32, I32 or I8 result as an array. It is poisoned first, so what the operation does not write is seen;
        but not that of an operation which works in place."""
        if DEVICE:
            self.supported(out)
            self.give_buffer()
        data, n_bytes = self.lib.ggml_get_data(out), self.lib.ggml_nbytes(out)
        if not in_place:
            ctypes.memset(data, POISON, n_bytes)
        graph = self.lib.ggml_new_graph(self.ctx)
        self.lib.ggml_build_forward_expand(graph, out)
        if not DEVICE:
            self.lib.set_n_threads(self.lib.cpu, n_threads)
        status = self.lib.ggml_backend_graph_compute(self.lib.backend, graph)
        assert status == 0, f"ggml status {status}"
        return self.read(out)

    def read(self, t):
        """A contiguous F32, I32 or I8 tensor as an array."""
        dtype = {TYPES["i32"]: np.int32, TYPES["i8"]: np.uint8}.get(t.contents.type, np.float32)
        data = ctypes.string_at(self.lib.ggml_get_data(t), self.lib.ggml_nbytes(t))
        return np.frombuffer(data, dtype).reshape(tuple(reversed(t.contents.ne)))
