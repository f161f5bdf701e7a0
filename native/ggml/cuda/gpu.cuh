// What the kernels of this folder ask of the GPU beyond the CUDA language, so that the tests can run the very same text
// on a CPU (native/tests/gpu-shim): a launch, and conversions of storage types.

#pragma once

#include "gpu/fill.h"
#include "gpu/operations.h"

#include <type_traits>

#ifdef SFI_GPU_SHIM
#include "cuda-shim.h"
#else
#include "common.cuh"

// From Hopper on a kernel is launched while the one before it still runs, and waits there, as upstream's kernels do.
#define SFI_LAUNCH(kernel, grid, block, stream, ...) \
    ggml_cuda_kernel_launch((kernel), ggml_cuda_kernel_launch_params((grid), (block), (size_t) 0, (stream)), __VA_ARGS__)

// The first statement of every kernel: what the kernels before it read or wrote must not be touched earlier.
static __device__ __forceinline__ void follow_previous() {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
}

static __device__ __forceinline__ float2 f16x2_to_f32(uint32_t bits) {
    __half2 h;
    memcpy(&h, &bits, sizeof(h));
    return __half22float2(h);
}
#endif

namespace sfi_cuda {

using namespace sfi_gpu;

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int      warp_size = 32;

// Where and with what an operation runs. counters: zeros; a kernel that uses some leaves them at zero.
struct gpu {
    cudaStream_t stream;
    int          n_sm;
    char       * scratch;
    unsigned   * counters;
};

constexpr int n_counters = 1 << 18;

SFI_GPU_OPERATIONS(const gpu)

// ---- small things that several kernels need ---------------------------------------------------------------------------

// fast exponentials have no -inf - -inf
static __device__ __forceinline__ float weight_of(float x, float max) {
    return x == -INFINITY ? 0.0f : expf(x - max);
}

// A softmax over some cells: the largest logit, and the sum of exp(logit - max).
struct softmax_sum { float max, sum; };

static __device__ __forceinline__ softmax_sum no_cells() { return { -INFINITY, 0.0f }; }

static __device__ __forceinline__ softmax_sum merge(softmax_sum a, softmax_sum b) {
    const float max = fmaxf(a.max, b.max);
    return { max, a.sum*weight_of(a.max, max) + b.sum*weight_of(b.max, max) };
}

static __device__ __forceinline__ float log_of(softmax_sum x) { return x.sum > 0.0f ? x.max + logf(x.sum) : -INFINITY; }

// tanh by one exponential: that of fast math is good to 2^-11 only
static __device__ __forceinline__ float soft_capped(float x, float cap) {
    return cap > 0.0f ? cap*(1.0f - 2.0f/(expf(2.0f*x) + 1.0f)) : x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = warp_size/2; o > 0; o >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(all_lanes, x, o));
    }
    return x;
}

// over groups of n lanes
template <int n = warp_size>
static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = n/2; o > 0; o >>= 1) {
        x += __shfl_xor_sync(all_lanes, x, o);
    }
    return x;
}

// of all lanes, in all lanes
static __device__ __forceinline__ softmax_sum warp_merge(softmax_sum x) {
    const float max = warp_max(x.max);
    return { max, warp_sum(x.sum*weight_of(x.max, max)) };
}

// over the lanes up to this one
template <class T>
static __device__ __forceinline__ T warp_prefix_sum(T x) {
#pragma unroll
    for (int o = 1; o < warp_size; o <<= 1) {
        const T other = __shfl_up_sync(all_lanes, x, o);
        x += (int) (threadIdx.x % warp_size) >= o ? other : T(0);
    }
    return x;
}

// of all threads, in all threads; tmp: a float per warp, shared
template <int n_warps>
static __device__ __forceinline__ float block_sum(float x, float * tmp) {
    x = warp_sum(x);
    __syncthreads(); // tmp may still be read
    if (threadIdx.x % warp_size == 0) {
        tmp[threadIdx.x/warp_size] = x;
    }
    __syncthreads();
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < n_warps; ++w) {
        all += tmp[w];
    }
    return all;
}

template <int n_warps>
static __device__ __forceinline__ float block_max(float x, float * tmp) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % warp_size == 0) {
        tmp[threadIdx.x/warp_size] = x;
    }
    __syncthreads();
    float all = tmp[0];
#pragma unroll
    for (int w = 1; w < n_warps; ++w) {
        all = fmaxf(all, tmp[w]);
    }
    return all;
}

// True in all threads of the block that finishes last among n; the writes of the others are visible to it then.
static __device__ __forceinline__ bool is_last_block(unsigned * counter, unsigned n) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) { // after the barrier one thread's fence is that of all
        __threadfence();
        last = atomicAdd(counter, 1u) == n - 1;
        if (last) {
            *counter = 0; // for the next launch
        }
        __threadfence();
    }
    __syncthreads();
    return last;
}

// ---- rows of K and V -------------------------------------------------------------------------------------------------

// Eight values of a row as they are stored: loading them is one thing, using them another, so that many loads can be
// under way. Part i of a row has its values 8i .. 8i + 7. They are get() times scale(), which is 1 if not is_scaled.
template <ggml_type T> struct octet;

// Byte j of a word as a float, plus 2^23: its bits are put below the exponent, which is faster than a conversion.
static __device__ __forceinline__ float byte_and_2_23(uint32_t word, int j) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 | j));
}

struct unscaled {
    static constexpr bool is_scaled = false;
    __device__ __forceinline__ float scale() const { return 1.0f; }
};

template <> struct octet<GGML_TYPE_F16> : unscaled {
    uint4 raw;
    __device__ __forceinline__ void load(const char * row, int i) { raw = ((const uint4 *) row)[i]; }
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void get(float * x) const {
        const uint32_t w[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = f16x2_to_f32(w[j]);
            x[2*j]     = f.x;
            x[2*j + 1] = f.y;
        }
    }
};

template <> struct octet<GGML_TYPE_BF16> : unscaled {
    uint4 raw;
    __device__ __forceinline__ void load(const char * row, int i) { raw = ((const uint4 *) row)[i]; }
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void get(float * x) const {
        const uint32_t w[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[2*j]     = __uint_as_float(w[j] << 16);
            x[2*j + 1] = __uint_as_float(w[j] & 0xffff0000u);
        }
    }
};

template <> struct octet<GGML_TYPE_F32> : unscaled {
    float4 lo, hi;
    __device__ __forceinline__ void load(const char * row, int i) {
        lo = ((const float4 *) row)[2*i];
        hi = ((const float4 *) row)[2*i + 1];
    }
    __device__ __forceinline__ void clear() { lo = hi = make_float4(0, 0, 0, 0); }
    __device__ __forceinline__ void get(float * x) const {
        x[0] = lo.x; x[1] = lo.y; x[2] = lo.z; x[3] = lo.w;
        x[4] = hi.x; x[5] = hi.y; x[6] = hi.z; x[7] = hi.w;
    }
};

// blocks of 32 values: an F16 scale and 32 int8, on even addresses
template <> struct octet<GGML_TYPE_Q8_0> {
    static constexpr bool is_scaled = true;
    uint32_t raw[2];
    uint16_t d;
    __device__ __forceinline__ float scale() const { return f16x2_to_f32(d).x; }
    __device__ __forceinline__ void load(const char * row, int i) {
        const uint16_t * block = (const uint16_t *) (row + (i/4)*34), * p = block + 1 + 4*(i % 4);
        d      = block[0];
        raw[0] = p[0] | (uint32_t) p[1] << 16;
        raw[1] = p[2] | (uint32_t) p[3] << 16;
    }
    __device__ __forceinline__ void clear() { d = 0; raw[0] = raw[1] = 0; }
    __device__ __forceinline__ void get(float * x) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = byte_and_2_23(raw[j/4] ^ 0x80808080u, j % 4) - (float) ((1 << 23) + 128);
        }
    }
};

// blocks of 32 values: an F16 scale and 16 bytes, value j in the low half of byte j, value 16 + j in the high half
template <> struct octet<GGML_TYPE_Q4_0> {
    static constexpr bool is_scaled = true;
    uint32_t raw[2];
    uint16_t d;
    __device__ __forceinline__ float scale() const { return f16x2_to_f32(d).x; }
    __device__ __forceinline__ void load(const char * row, int i) {
        const uint16_t * block = (const uint16_t *) (row + (i/4)*18), * p = block + 1 + 4*(i % 2);
        const int shift = i % 4 < 2 ? 0 : 4;
        d      = block[0];
        raw[0] = (p[0] | (uint32_t) p[1] << 16) >> shift & 0x0f0f0f0fu;
        raw[1] = (p[2] | (uint32_t) p[3] << 16) >> shift & 0x0f0f0f0fu;
    }
    __device__ __forceinline__ void clear() { d = 0; raw[0] = raw[1] = 0; }
    __device__ __forceinline__ void get(float * x) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = byte_and_2_23(raw[j/4], j % 4) - (float) ((1 << 23) + 8);
        }
    }
};

// f(std::integral_constant of the type), for those of is_kv_type()
template <class F>
static void with_kv_type(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_F16:  f(std::integral_constant<ggml_type, GGML_TYPE_F16>());  break;
        case GGML_TYPE_BF16: f(std::integral_constant<ggml_type, GGML_TYPE_BF16>()); break;
        case GGML_TYPE_Q8_0: f(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>()); break;
        default:             f(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>()); break;
    }
}

// Takes scratch apart; of none (null) it says how much is needed.
struct scratch_parts {
    char * base;
    size_t used = 0;

    template <class T> void take(T *& part, int64_t n) {
        part  = (T *) (base + used);
        used += (n*sizeof(T) + 15)/16*16;
    }
};

} // namespace sfi_cuda
