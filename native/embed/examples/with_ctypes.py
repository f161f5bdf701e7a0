"""libsfi without a compiler, as from any language that can call C: with_ctypes.py LIBRARY MODEL.gguf TEXT

The functions of llama.h are called sfi_llama_... here. Its structs are passed by value, so a binding is made for one SONAME of the
library: native/embed/abi.txt in the library's source has their sizes and offsets.
"""

import ctypes
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

VERSION = 100  # SFI_VERSION 0.1.0: what this binding was made for


class ModelParams(Structure):
    _fields_ = [("of_no_interest", c_uint64 * 10)]  # 80 bytes


class ContextParams(Structure):
    _fields_ = [("n_ctx", c_uint32), ("before", c_int32 * 12), ("flash_attn_type", c_int32), ("after", c_uint64 * 13)]  # at 0, at 52; 160 bytes


class InitParams(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", c_int32), ("n_threads", c_int32), ("n_spin", c_int32)]


FUNCTIONS = {  # name: (what it returns, arguments...)
    "sfi_llama_model_default_params": (ModelParams,),
    "sfi_llama_context_default_params": (ContextParams,),
    "sfi_llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "sfi_llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "sfi_llama_model_get_vocab": (c_void_p, c_void_p),
    "sfi_llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "sfi_llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "sfi_llama_sampler_init_greedy": (c_void_p,),
    "sfi_llama_sampler_sample": (c_int32, c_void_p, c_void_p, c_int32),
    "sfi_llama_sampler_free": (None, c_void_p),
    "sfi_llama_free": (None, c_void_p),
    "sfi_llama_model_free": (None, c_void_p),
    "sfi_init": (c_int, POINTER(InitParams)),
    "sfi_attach": (c_int, c_void_p, c_void_p, POINTER(c_void_p)),
    "sfi_free": (None, c_void_p),
    "sfi_prefill": (c_int, c_void_p, c_int32, POINTER(c_int32), c_int32, c_void_p, c_void_p),
    "sfi_step": (c_int, c_void_p, c_int32, c_int32, c_int, c_void_p),
    "sfi_last_error": (c_char_p,),
}


def library(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    for name, (returned, *arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = returned, arguments
    return lib


def main(path: str, model_path: str, text: str, n: int = 8) -> None:
    lib = library(path)

    def check(status: int) -> None:
        if status < 0:
            sys.exit(lib.sfi_last_error().decode())

    check(lib.sfi_init(byref(InitParams(ctypes.sizeof(InitParams), VERSION, 0, 0))))
    model = lib.sfi_llama_model_load_from_file(model_path.encode(), lib.sfi_llama_model_default_params())
    params = lib.sfi_llama_context_default_params()
    params.n_ctx, params.flash_attn_type = 2048, 1
    context, sfi = lib.sfi_llama_init_from_model(model, params), c_void_p()
    check(lib.sfi_attach(context, None, byref(sfi)))
    vocab, sampler = lib.sfi_llama_model_get_vocab(model), lib.sfi_llama_sampler_init_greedy()

    data = text.encode()
    tokens = (c_int32 * (len(data) + 8))()
    check(lib.sfi_prefill(sfi, 0, tokens, lib.sfi_llama_tokenize(vocab, data, len(data), tokens, len(tokens), True, False), None, None))
    piece = ctypes.create_string_buffer(64)
    for _ in range(n):
        token = lib.sfi_llama_sampler_sample(sampler, context, -1)
        size = lib.sfi_llama_token_to_piece(vocab, token, piece, 64, 0, False)
        print(piece.raw[:size].decode(errors="replace"), end="", flush=True)
        check(lib.sfi_step(sfi, 0, token, 0, None))
    print()
    lib.sfi_llama_sampler_free(sampler)
    lib.sfi_free(sfi)
    lib.sfi_llama_free(context)
    lib.sfi_llama_model_free(model)


if __name__ == "__main__":
    main(*sys.argv[1:4])
