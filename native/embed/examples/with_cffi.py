"""libsfi from Python by cffi, which asks the C compiler for structs and names: with_cffi.py PREFIX MODEL.gguf TEXT

PREFIX is the folder with include/ and lib/. (For Python there is the package sfi_local; this shows how a binding is made.)
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

from cffi import FFI

DECLARATIONS = """
typedef int32_t llama_token;
struct llama_model_params   { ...; };
struct llama_context_params { uint32_t n_ctx; int32_t flash_attn_type; ...; };
struct llama_model_params   llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
struct llama_model *   llama_model_load_from_file(const char * path, struct llama_model_params params);
struct llama_context * llama_init_from_model(struct llama_model * model, struct llama_context_params params);
const struct llama_vocab * llama_model_get_vocab(const struct llama_model * model);
int32_t llama_tokenize(const struct llama_vocab * vocab, const char * text, int32_t size, llama_token * tokens, int32_t n_max, bool add, bool parse);
int32_t llama_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * text, int32_t size, int32_t strip, bool special);
struct llama_sampler * llama_sampler_init_greedy(void);
llama_token llama_sampler_sample(struct llama_sampler * sampler, struct llama_context * lctx, int32_t i);
void llama_sampler_free(struct llama_sampler * sampler);
void llama_free(struct llama_context * lctx);
void llama_model_free(struct llama_model * model);
int  sfi_attach(struct llama_context * lctx, const void * params, struct sfi ** out);
void sfi_free(struct sfi * sfi);
int  sfi_prefill(struct sfi * sfi, int32_t seq, const llama_token * tokens, int32_t n, void * progress, void * user);
int  sfi_step(struct sfi * sfi, int32_t seq, llama_token token, int kind, void * info);
const char * sfi_last_error(void);
"""


def binding(prefix: Path):
    """The compiled module; a real binding is compiled once, when it is installed."""
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source("_sfi_example", '#include "sfi.h"', include_dirs=[str(prefix / "include")], library_dirs=[str(prefix / "lib")],
                   libraries=["sfi"], extra_link_args=[f"-Wl,-rpath,{prefix / 'lib'}"],
                   extra_compile_args=["-Wno-int-conversion", "-Wno-incompatible-pointer-types"])
    built = ffi.compile(tmpdir=tempfile.mkdtemp())
    spec = importlib.util.spec_from_file_location("_sfi_example", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffi, module.lib


def main(prefix: str, path: str, text: str, n: int = 8) -> None:
    ffi, lib = binding(Path(prefix).resolve())

    def check(status: int) -> None:
        if status < 0:
            sys.exit(ffi.string(lib.sfi_last_error()).decode())

    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.flash_attn_type = 2048, 1
    context = lib.llama_init_from_model(model, params)
    attached = ffi.new("struct sfi **")
    check(lib.sfi_attach(context, ffi.NULL, attached))
    vocab, sampler = lib.llama_model_get_vocab(model), lib.llama_sampler_init_greedy()

    data = text.encode()
    tokens = ffi.new("llama_token[]", len(data) + 8)
    check(lib.sfi_prefill(attached[0], 0, tokens, lib.llama_tokenize(vocab, data, len(data), tokens, len(tokens), True, False), ffi.NULL, ffi.NULL))
    piece = ffi.new("char[64]")
    for _ in range(n):
        token = lib.llama_sampler_sample(sampler, context, -1)
        size = lib.llama_token_to_piece(vocab, token, piece, 64, 0, False)
        print(ffi.buffer(piece, size)[:].decode(errors="replace"), end="", flush=True)
        check(lib.sfi_step(attached[0], 0, token, 0, ffi.NULL))
    print()
    lib.llama_sampler_free(sampler)
    lib.sfi_free(attached[0])
    lib.llama_free(context)
    lib.llama_model_free(model)


if __name__ == "__main__":
    main(*sys.argv[1:4])
