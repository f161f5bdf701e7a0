#include "ggml-sfi-cuda.cuh"

#include "gpu.cuh"

#include <map>
#include <mutex>
#include <utility>

// The counters of a stream: kernels of one stream follow each other, so they can share them. They are few and stay for
// the life of the process: a captured graph may hold their address. Nothing waits: this may be called in a capture.
static unsigned * counters_of(int device, cudaStream_t stream) {
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, unsigned *> all;

    const std::lock_guard<std::mutex> lock(mutex);
    unsigned *& counters = all[{ device, stream }];
    if (!counters) {
        CUDA_CHECK(cudaMalloc((void **) &counters, sfi_cuda::n_counters*sizeof(unsigned)));
        CUDA_CHECK(cudaMemsetAsync(counters, 0, sfi_cuda::n_counters*sizeof(unsigned), stream));
    }
    return counters;
}

bool ggml_cuda_sfi(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const auto * op = sfi_cuda::operation_of(dst);
    if (!op) {
        return false;
    }
    const int n_sm = ggml_cuda_info().devices[ctx.device].nsm;
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), op->scratch(dst, n_sm) + 1);
    const sfi_cuda::gpu g = { ctx.stream(), n_sm, scratch.get(), counters_of(ctx.device, ctx.stream()) };
    op->compute(g, dst);
    return true;
}

bool ggml_cuda_sfi_supported(int device, const ggml_tensor * dst) {
    const auto * op = sfi_cuda::operation_of(dst);
    return op && ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_TURING && op->supported(dst);
}
