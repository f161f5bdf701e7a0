#!/usr/bin/env bash
# Run what takes bytes from outside into a context (rows, states, files of the prefix store) under AddressSanitizer and UBSan:
#
#     native/tests/check-state.sh [CHANGES]     50000 changed states of each policy unless given; PYTHON has the tests' packages
#
# Builds a copy of the tree in build/state/, which takes some 15 minutes of two cores once; the tests take some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
changes=${1:-50000}
tree=$PWD/build/state/tree
flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1'

mkdir -p "$tree"
git ls-files -z | xargs -0 cp --parents --update -t "$tree"
cd "$tree"
make dev PYTHON="$python" CMAKE_FLAGS="-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_FLAGS='$flags' -DCMAKE_CXX_FLAGS='$flags' -DSFI_TESTS=OFF" \
    > ../build.log 2>&1 || { tail -n 20 ../build.log; exit 1; }

# UBSan's own messages about flags in an enum of upstream's are no part of this: what is not recovered from ends the run
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 SFI_FUZZ_CHANGES=$changes PYTHONPATH=$tree
"$python" -m pytest -q tests/context/test_state.py
"$python" -m pytest -q tests/store/test_prefixes.py -k 'change'
