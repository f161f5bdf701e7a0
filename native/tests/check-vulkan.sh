#!/usr/bin/env bash
# The portable path on Vulkan, in software where there is no GPU: the tests that need no look into the graph, layers there with K and V in
# the host's memory, then a decode of smollm2-135m beside dense and stock, by the commands that users type.
#
#     native/tests/check-vulkan.sh
#
# Needs glslc, SPIRV-Headers, a Vulkan driver (Debian: glslc spirv-headers libvulkan-dev mesa-vulkan-drivers), and a Python
# with what sfi-local depends on. VULKAN_INCLUDE: newer Vulkan headers (1.3.272 or later) than the system's. PYTHON, JOBS.
set -euo pipefail
cd "$(dirname "$0")/../.."
. native/tests/own-package.sh

python=${PYTHON:-python3}
build=$PWD/build/vulkan

own_package "$build" -DGGML_VULKAN=ON ${VULKAN_INCLUDE:+-DVulkan_INCLUDE_DIR="$VULKAN_INCLUDE"}
cd "$build/python"

export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}  # ggml passes over a driver in software unless it is named
sfi() { "$python" -m sfi_local "$@"; }

echo "== devices"
sfi doctor | grep -A4 '^devices' | tee "$build/devices.log"
grep -q 'Vulkan.*frozen portable' "$build/devices.log" || { echo "no Vulkan device has the portable path" >&2; exit 1; }

echo "== tests"
"$python" -m pytest -q tests/context/test_portable.py -k "$(tr '\n' ' ' <<'TESTS'
    budget_of_everything or shorter_than or begin_with or prefill_after or selected_cells or selection_of_every or an_edit
    or interleaved or taken_back or is_refused or a_batch or falls_to
TESTS
)"

echo "== K and V in the host's memory"
"$python" -m pytest -q -rs tests/context/test_kv_host.py | tee "$build/kv-host.log"
! grep -q skipped "$build/kv-host.log"

echo "== decode"
sfi pull smollm2-135m > /dev/null
"$python" -c 'import pydoc_data.topics as t; print(open(t.__file__).read()[4000:16000])' > "$build/text.txt"
# a driver in software prefills four tokens a second
for kv_type in f16 q8_0; do
    sfi eval smollm2-135m --text "$build/text.txt" --depth 300 -n 16 --modes dense,stock,sfi \
        --set policy=frozen,n_selected=64,n_recent=32 --kv-type "$kv_type"
done
sfi run smollm2-135m -f "$build/text.txt" --max-prompt-tokens 300 -p "What is this text about?" -n 24 --temp 0 --mode sfi \
    --set n_selected=64,n_recent=32 --no-cache
sfi run smollm2-135m -f "$build/text.txt" --max-prompt-tokens 300 -p "What is this text about?" -n 24 --temp 0 --mode sfi \
    --set n_selected=64,n_recent=32 --no-cache --kv-host
