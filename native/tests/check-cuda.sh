#!/usr/bin/env bash
# Compile the CUDA kernels for every architecture we support, warnings being errors, and report what they need:
# native/tests/check-cuda.sh TREE [ARCH...]    TREE: a patched llama.cpp (`patchset.py apply`, or the build's)
#
# Runs nothing, so it needs the toolkit but no GPU.
set -euo pipefail
tree=$1
shift
archs=${*:-75 86 89 90 120}
root=$(cd "$(dirname "$0")/../.." && pwd)
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
toolkit=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

compile() {  # compile ARCH FILE
    "$nvcc" -std=c++17 -O3 -use_fast_math -extended-lambda -arch="sm_$1" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror,-Wno-unused-function \
        -Xptxas -v -I "$root/native/ggml" -I "$root/native/ggml/cuda" -isystem "$tree/ggml/include" -isystem "$tree/ggml/src" \
        -isystem "$tree/ggml/src/ggml-cuda" -isystem "$toolkit/include" \
        -c -o "$out/$1-$2.o" "$root/native/ggml/cuda/$2.cu" > "$out/$1-$2.log" 2>&1 || { cat "$out/$1-$2.log" >&2; return 255; }
}
export -f compile
export nvcc root tree out toolkit

files=$(cd "$root/native/ggml/cuda" && ls *.cu | sed 's/\.cu$//; /^ggml-sfi-cuda$/d')
"$nvcc" --version | grep release
for arch in $archs; do for file in $files; do echo "$arch $file"; done; done | xargs -P "$(nproc)" -L 1 bash -c 'compile $0 $1'

# of ptxas' report: registers, and bytes spilled to local memory
printf '%-8s %-14s %8s %14s %12s %14s\n' arch file kernels 'registers, max' 'with spills' 'bytes, most'
for arch in $archs; do
    for file in $files; do
        awk -v arch="sm_$arch" -v file="$file" '
            / bytes spill stores/ { match($0, /[0-9]+ bytes spill stores/); n = substr($0, RSTART, RLENGTH) + 0; spills += n > 0; if (n > most) most = n }
            /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); n = substr($0, RSTART + 5, RLENGTH - 5) + 0; ++kernels; if (n > max) max = n }
            END { printf "%-8s %-14s %8d %14d %12d %14d\n", arch, file, kernels, max, spills, most }' "$out/$arch-$file.log"
    done
done
