#!/usr/bin/env bash
# What several threads do with contexts of one model (threads.c), under helgrind.
#
#     native/tests/check-threads.sh [BUILD]     BUILD: of `make dev`, build/dev by default; needs valgrind, gguf and numpy
#
# What it covers: calls of the C API by several threads, two contexts on the same weights, sfi_cancel(), the abort callback, and
# sfi_free() under a call. What it does not: the threads that ggml divides an operation among. Contexts have one, because helgrind
# knows neither libgomp's barriers nor ggml's, and would report each cell that two of them share. Where the CPU has AVX-512,
# valgrind cannot run a native build: build with CMAKE_FLAGS=-DGGML_NATIVE=OFF.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=${1:-build/dev}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${CC:-cc}" -std=c11 -O1 -g -Wall -Wextra -Werror -Inative/include -I"$build/llama.cpp/include" -I"$build/llama.cpp/ggml/include" \
    native/tests/threads.c -o "$work/threads" -L"$build/bin" -lsfi-llama -lsfi-ggml -lsfi-ggml-base -lpthread \
    -Wl,-rpath,"$(cd "$build/bin" && pwd)"
PYTHONPATH=tests "${PYTHON:-python3}" -c "
import sys
from pathlib import Path
from support.tiny_model import write_tiny
write_tiny(Path(sys.argv[1]), n_layer=2)" "$work/tiny.gguf"

"$work/threads" "$work/tiny.gguf" 50

helgrind() {
    valgrind --tool=helgrind --error-exitcode=9 --num-callers=12 --suppressions=native/tests/helgrind.supp "$work/threads" "$work/tiny.gguf" "$@" \
        > "$work/log" 2>&1
}

if helgrind 1 race; then
    echo "helgrind did not find the race that threads.c has on purpose." >&2
    exit 1
fi
grep -q 'unguarded' "$work/log" || { tail -n 20 "$work/log"; exit 1; }
helgrind 2 || { grep -A 12 'Possible data race\|SIGILL\|Thread #' "$work/log" | head -n 80; exit 1; }
grep 'wrong\|ERROR SUMMARY' "$work/log"
