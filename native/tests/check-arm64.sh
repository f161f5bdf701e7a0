#!/usr/bin/env bash
# Try the arm64 build under qemu-user: on a Cortex-A53 and A72 (Raspberry Pi 3 and 4), an A76 (Pi 5) and on everything qemu has.
#
#     native/tests/check-arm64.sh          all: builds the portable library and the wheel first. An hour where ccache knows nothing
#     native/tests/check-arm64.sh short    sparse attention alone, with dot products on an A76, without full optimisation; CI does it
#
# On each CPU: the library that is chosen, the operations against ggml's reference, 16 tokens of SmolLM2 from C, the same ones as on
# this machine or a tie that is shown, and the Python package with a Python of Debian's. Says how long each took.
# CPUS="cortex-a76 max" and OPS=SPARSE_ATTN take fewer; needs g++-aarch64-linux-gnu and qemu-user; for the rest SmolLM2 in the cache and pip.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-all}
python=${PYTHON:-python3}
ops=${OPS:-SPARSE_ATTN,SUPPORT_.*,SKETCH_.*,BLOCK_.*,FEW_.*}
work=build/check-arm64
sysroot=/usr/aarch64-linux-gnu

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
    command -v "$tool" > /dev/null || { echo "$tool is missing: arm64 is not checked. apt install g++-aarch64-linux-gnu qemu-user cmake ninja-build"; exit 0; }
done
mkdir -p "$work"

fail() { echo "arm64: $*" >&2; exit 1; }

emulated() {  # emulated CPU PROGRAM..., on one core: threads that wait for each other by spinning cost an emulator most of its time
    local cpu=$1
    shift
    [ "$cpu" = max ] && cpu=max,pauth-impdef=on  # the architecture's own way to sign pointers takes qemu most of its time
    taskset -c 0 qemu-aarch64 -L "${root:-$sysroot}" -cpu "$cpu" "$@"
}

check_operations() {  # check_operations CPU PROGRAM
    local log=$work/ops-$1.log
    emulated "$1" "$2" test -b CPU -o "$ops" > "$log" 2>&1 || { grep -a FAIL "$log" | head; fail "operations on $1, see $log"; }
    grep -q 'SPARSE_ATTN(' "$log" || fail "no operation was tried on $1"  # a filter that matches nothing passes too
    echo "$1: $(grep -aoE '^ *[1-9][0-9]*/[1-9][0-9]* tests passed' "$log" | sed 's/^ *//')"
}

# ---- the short part ----------------------------------------------------------------------------------------------------------

if [ "$what" = short ]; then
    "$python" patches/patchset.py apply build/ops/llama.cpp
    cmake -S native/tests/ops -B "$work/ops" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/native/cross/arm64.cmake" -DSFI_TREE="$PWD/build/ops/llama.cpp" \
        -DGGML_OPENMP=OFF -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16 -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 > "$work/build.log"
    cmake --build "$work/ops" --target test-backend-ops --parallel "${JOBS:-2}" >> "$work/build.log" 2>&1 || { tail -n 20 "$work/build.log"; exit 1; }
    ops=SPARSE_ATTN
    check_operations cortex-a76 "$work/ops/test-backend-ops"
    exit
fi

# ---- all: what is tried --------------------------------------------------------------------------------------------------------

case $what in all) ;; *) echo "unknown: $what (short or nothing)" >&2; exit 2 ;; esac
bin=build/arm64/bin
model=${MODEL:-$("$python" -c 'from sfi_local.catalogue import find; print(find("smollm2-135m").path)')}
[ -f "$model" ] || fail "SmolLM2 is not in the cache: sfi-local pull smollm2-135m"
SFI_TESTS=ON PYTHON=$python native/cross/build-arm64.sh > "$work/build.log" 2>&1 || { tail -n 20 "$work/build.log"; fail "the build"; }

text=$work/text.txt
printf '%s' "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. The capital of Germany is" > "$text"

# The CPU library of a portable build, from what the dynamic linker says: all are opened and asked, the one that is taken is opened last.
chosen() {
    grep -aoE 'opening file=.*libggml-cpu-[^/]*\.so' "$1" | tail -n 1 | sed 's/.*libggml-cpu-//; s/\.so//'
}

expected() {
    case $1 in
        cortex-a53 | cortex-a72) echo armv8.0_1 ;;
        cortex-a76) echo armv8.2_2 ;;
        max) echo "${BEST:-armv8.6_2}" ;;  # a compiler that knows sme makes a better one
    esac
}

# 16 tokens of this machine: {"text": ..., "gaps": how far the likeliest token lies before the next one, in nats}
reference=$work/reference.json
"$python" native/tests/greedy.py "$model" "$text" 16 > "$reference"

arm_python() {  # Python of Debian's for arm64 and the wheel with what it needs, in a folder of their own
    local apt=$PWD/$work/apt packages=python3-minimal
    [ -d "$work/root/usr/bin" ] && return
    mkdir -p "$apt"/state/lists/partial "$apt"/cache/archives/partial "$apt"/sources "$work/root"
    touch "$apt/status"
    cp /etc/apt/sources.list.d/debian.sources "$apt/sources/" 2> /dev/null || cp /etc/apt/sources.list "$apt/sources/debian.list"
    local options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$apt/state" -o Dir::Cache="$apt/cache"
        -o Dir::State::status="$apt/status" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt/sources")
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install -y --download-only --no-install-recommends $packages libpython3-stdlib libgomp1 libstdc++6 > /dev/null
    for deb in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
    local version
    version=$(basename "$(ls -d "$work"/root/usr/bin/python3.* | head -n 1)")
    "$python" -m pip install --quiet --disable-pip-version-check --target "$work/site" --python-version "${version#python}" --implementation cp \
        --only-binary :all: --platform manylinux_2_36_aarch64 --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --find-links "${DIST:-dist}" sfi-local
}

# ---- all: on each CPU -----------------------------------------------------------------------------------------------------------

arm_python
interpreter=$(ls "$work"/root/usr/bin/python3.* | head -n 1)
for cpu in ${CPUS:-cortex-a53 cortex-a72 cortex-a76 max}; do
    start=$SECONDS
    emulated "$cpu" -E LD_DEBUG=files "$bin/sfi-example-generate" "$model" "$text" 16 > "$work/$cpu.txt" 2> "$work/$cpu.log" ||
        fail "the example on $cpu ended with $?, see $work/$cpu.log"
    library=$(chosen "$work/$cpu.log")
    [ "$library" = "$(expected "$cpu")" ] || fail "$cpu took $library, not $(expected "$cpu")"
    echo "$cpu: $library; from C $("$python" native/tests/greedy.py --compare "$reference" "$work/$cpu.txt") ($((SECONDS - start)) s)"
    start=$SECONDS
    root=$work/root emulated "$cpu" -E PYTHONPATH="$work/site" "$interpreter" native/tests/greedy.py "$model" "$text" 4 > "$work/$cpu.json" \
        2> "$work/$cpu-python.log" || fail "Python on $cpu ended with $?, see $work/$cpu-python.log"
    "$python" native/tests/greedy.py --compare "$reference" "$work/$cpu.json" > /dev/null
    grep -q "\"libggml-cpu-$library.so\"" "$work/$cpu.json" || fail "Python on $cpu took another library: $(cat "$work/$cpu.json")"
    echo "$cpu: from Python the same ($((SECONDS - start)) s)"
    start=$SECONDS
    check_operations "$cpu" "$bin/test-backend-ops"
    echo "$cpu: operations took $((SECONDS - start)) s"
done
