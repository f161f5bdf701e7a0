// The operations of ggml-sfi.h on CUDA, as ggml-cuda.cu calls them. The kernels have files of their own.

#pragma once

#include "common.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA) // same source, other warps: there the portable path is taken
static inline bool ggml_cuda_sfi          (ggml_backend_cuda_context &, ggml_tensor *) { return false; }
static inline bool ggml_cuda_sfi_supported(int, const ggml_tensor *)                   { return false; }
#else
bool ggml_cuda_sfi          (ggml_backend_cuda_context & ctx, ggml_tensor * dst); // false: not one of ours
bool ggml_cuda_sfi_supported(int device, const ggml_tensor * dst);
#endif
