#!/usr/bin/env bash
# Build for Linux on arm64 (Raspberry Pi, Orange Pi, Jetson, arm64 servers) on a Debian machine of another kind.
#
#     native/cross/build-arm64.sh library     the C library, for every arm64 CPU, as a tar.gz
#     native/cross/build-arm64.sh wheel       the Python package as a wheel, and llama-cpp-python's beside it
#     native/cross/build-arm64.sh             both
#
# What is made lies in dist/ (DIST=DIR). Needs g++-aarch64-linux-gnu, CMake, Ninja and Python 3.10; the wheel pip and a network too.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-all}
case $what in library | wheel | all) ;; *) echo "unknown: $what (library, wheel or nothing)" >&2; exit 2 ;; esac
dist=${DIST:-dist}
build=build/arm64
python=${PYTHON:-python3}
toolchain=$PWD/native/cross/arm64.cmake

for tool in aarch64-linux-gnu-g++ cmake ninja "$python"; do
    command -v "$tool" > /dev/null || {
        echo "$tool is missing: apt install g++-aarch64-linux-gnu cmake ninja-build python3" >&2
        exit 1
    }
done

library() {
    cmake -S native -B "$build" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$toolchain" -DPython_EXECUTABLE="$(command -v "$python")" \
        -DSFI_PYTHON=OFF -DSFI_PORTABLE=ON -DSFI_TESTS="${SFI_TESTS:-OFF}" > "$build.log"
    grep 'is left out' "$build.log" || true
    cmake --build "$build" --parallel "${JOBS:-2}"
    "$python" native/package.py "$build" --portable --out "$dist"
}

mkdir -p build "$dist"
if [ "$what" != wheel ]; then library; fi
if [ "$what" != library ]; then "$python" native/wheels.py --arch aarch64 --out "$dist"; fi
