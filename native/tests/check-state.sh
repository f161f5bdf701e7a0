#!/usr/bin/env bash
# What takes bytes from outside into a context (rows, states, files of the prefix store), under AddressSanitizer and UBSan.
#
#     native/tests/check-state.sh [CHANGES]     of each policy's state, 10000 unless given
#
# Our own sources are built with the sanitizers (SFI_SANITIZE), upstream's without. Needs GCC, and a Python with what the tests need. PYTHON, JOBS.
set -euo pipefail
cd "$(dirname "$0")/../.."
. native/tests/own-package.sh

python=${PYTHON:-python3}
build=$PWD/build/state

own_package "$build" -DSFI_SANITIZE=address,undefined
cd "$build/python"

changes=${1:-10000}
sanitized() {
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
        PYTHONMALLOC=malloc SFI_FUZZ_CHANGES=$changes "$python" "$@"
}

echo "== a read behind a buffer is noticed"
sanitized -c 'from sfi_local.binding.library import open_library as o; n = o(); n.lib.sfi_checksum(0, n.ffi.from_buffer(bytearray(1000)), 1064)' \
    > "$build/behind.log" 2>&1 && exit 1
grep heap-buffer-overflow "$build/behind.log"

echo "== states and rows"
sanitized -m pytest -q -s tests/context/test_state.py
echo "== files of the store"
sanitized -m pytest -q -s tests/store/test_prefixes.py -k change
