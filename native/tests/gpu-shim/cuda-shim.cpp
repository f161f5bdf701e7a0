// The kernels of native/ggml/cuda with the CPU in the place of the GPU.

#include "cuda-shim.h"

#include "evidence.cu"
#include "select.cu"
#include "sketch-encode.cu"
#include "sketch-scan.cu"
#include "sparse-attn.cu"
#include "stability.cu"

#include "shim-backend.h"

#include <vector>

const char * const shim_name = "CUDA-shim";

static constexpr int n_sm = 12; // few, so that there are splits but not for everyone

bool shim_supported(const ggml_tensor * op) {
    const auto * o = sfi_cuda::operation_of(op);
    return o && o->supported(op);
}

void shim_compute(ggml_tensor * op) {
    static std::vector<unsigned> counters(sfi_cuda::n_counters);
    const auto * o = sfi_cuda::operation_of(op);
    // each its own allocation, so that a sanitizer sees its end, and full of what nobody should read
    std::vector<uint32_t> scratch((o->scratch(op, n_sm) + sizeof(uint32_t) - 1)/sizeof(uint32_t), 0x7fbadbadu);
    const sfi_cuda::gpu g = { nullptr, n_sm, (char *) scratch.data(), counters.data() };
    o->compute(g, op);
    if (std::any_of(counters.begin(), counters.end(), [](unsigned c) { return c != 0; })) {
        sfi_shim::fail("an operation left its counters");
    }
}
