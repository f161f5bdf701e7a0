"""Generate the C source of sfi_local._sfi from sfi.h and sfi-research.h, the one place where the C API is declared.

usage: build_ffi.py SFI_H SFI_RESEARCH_H OUT_C

cffi wants declarations without preprocessor. Values of enums are left to the C compiler
("..."), so a stale cdef cannot exist: what does not match the header does not compile.
"""

import re
import sys
from pathlib import Path

MODULE = "sfi_local._sfi"

# what sfi.h takes from llama.h, and the little else that Python calls directly
PRELUDE = """
struct llama_context;
struct llama_model;
struct llama_vocab;
struct llama_context_params;
typedef int32_t llama_token;
typedef int32_t llama_seq_id;
enum ggml_log_level { GGML_LOG_LEVEL_NONE = ..., ... };
typedef void (*ggml_log_callback)(enum ggml_log_level level, const char * text, void * user);
void ggml_backend_load_all_from_path(const char * dir_path);
"""

# a sfi_progress_fn implemented in Python with @ffi.def_extern()
CALLBACKS = """
extern "Python" bool sfi_progress_py(void * user, enum sfi_phase phase, int32_t done, int32_t total);
"""

# a ggml_abort_callback that reads a flag without Python: it is called between any two operations of a graph, and a step of
# few milliseconds has a thousand of them
FLAG = """
bool sfi_flag_is_set(void * flag);
"""

# the tokens of a vocabulary that have one of some attributes: a vocabulary has a hundred thousand, too many to ask of each from Python
TOKENS = """
int32_t sfi_tokens_with(const struct llama_vocab * vocab, int32_t attributes, llama_token * tokens);
"""

SOURCE = """
#include "sfi.h"
#include "sfi-research.h"
#include "ggml-backend.h"

static bool sfi_flag_is_set(void * flag) {
    return *(volatile bool *) flag;
}

static int32_t sfi_tokens_with(const struct llama_vocab * vocab, int32_t attributes, llama_token * tokens) {
    const int32_t n = llama_vocab_n_tokens(vocab);
    int32_t n_found = 0;
    for (llama_token t = 0; t < n; ++t) {
        if (llama_vocab_get_attr(vocab, t) & attributes) {
            tokens[n_found++] = t;
        }
    }
    return n_found;
}
"""


def without_comments(header: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)


def without_preprocessor(header: str) -> str:
    """Drop the directives, and the extern "C" braces that stand between two of them."""
    header = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", header, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*\n", "", header, flags=re.MULTILINE)


def cdef(header: str) -> str:
    """The declarations of a header as cffi reads them."""
    text = without_preprocessor(without_comments(header)).replace("SFI_API ", "")
    text = re.sub(r"\b(SFI_[A-Z0-9_]+)\s*=\s*-?\d+", r"\1 = ...", text)
    return text


def whole(headers: list[str]) -> str:
    """What cffi is given of these files."""
    return PRELUDE + "".join(cdef(Path(header).read_text(encoding="utf-8")) for header in headers) + CALLBACKS + FLAG + TOKENS


def main(*headers_and_out: str) -> None:
    from cffi import FFI

    *headers, out = headers_and_out
    ffi = FFI()
    ffi.cdef(whole(headers))
    ffi.set_source(MODULE, SOURCE)
    ffi.emit_c_code(out)
    Path(out).touch()  # cffi leaves an equal file alone, and make would try again for ever


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ImportError:
        sys.exit("cffi is missing: pip install cffi, or build with 'pip install .', which brings it.")
