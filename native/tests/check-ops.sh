#!/usr/bin/env bash
# Run the operations' tests where the usual build does not: on NEON under qemu-user, or under sanitizers.
#
#     native/tests/check-ops.sh neon     needs aarch64-linux-gnu-g++ and qemu-aarch64; check-arm64.sh tries the rest of an arm64 build
#     native/tests/check-ops.sh asan     AddressSanitizer and UBSan, every SIMD path of this CPU
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:?neon or asan}
tree=$PWD/build/ops/llama.cpp
build=$PWD/build/ops/$what
ops='SPARSE_ATTN,SUPPORT_.*,SKETCH_.*,BLOCK_.*,FEW_.*'

python3 patches/patchset.py apply "$tree"

configure() {
    cmake -S native/tests/ops -B "$build" -DSFI_TREE="$tree" -DGGML_OPENMP=OFF "$@" > "$build.log" 2>&1 ||
        { tail -n 20 "$build.log"; exit 1; }
    cmake --build "$build" --target test-backend-ops --parallel "${JOBS:-2}" >> "$build.log" 2>&1 ||
        { tail -n 20 "$build.log"; exit 1; }
}

# a filter that matches nothing passes too, so look for what passed
passed() {
    grep -E '^ *[1-9][0-9]*/[1-9][0-9]* tests passed'
}

case $what in
    neon)
        configure -DCMAKE_TOOLCHAIN_FILE="$PWD/native/cross/arm64.cmake" -DGGML_NATIVE=OFF -DCMAKE_BUILD_TYPE=Release
        qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/test-backend-ops" test -b CPU -o "$ops" | passed
        ;;
    asan)
        # each function by itself: inlined into one another, a kernel with its checks takes the compiler minutes
        flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1 -DSFI_INLINE=inline'
        configure -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE="$flags" -DCMAKE_CXX_FLAGS_RELEASE="$flags"
        macros=$("${CXX:-c++}" -march=native -dM -E -x c++ /dev/null)
        for path in scalar neon avx2 avx512; do
            case $path:$macros in
                scalar:* | neon:*__ARM_NEON* | avx2:*__AVX2__* | avx512:*__AVX512VL__*) ;;
                *) echo "SFI_SIMD=$path: not tried, this CPU has none"; continue ;;
            esac
            echo "SFI_SIMD=$path"
            SFI_SIMD=$path ASAN_OPTIONS=detect_leaks=0 "$build/test-backend-ops" test -b CPU -o "$ops" | passed
        done
        ;;
    *) echo "unknown: $what" >&2; exit 2 ;;
esac
