// Enough of CUDA to run the kernels of native/ggml/cuda on a CPU.

#pragma once

#include "gpu-shim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2  { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline uint2  make_uint2(unsigned x, unsigned y) { return { x, y }; }
inline uint4  make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }

using cudaStream_t = void *;

// here a kernel never runs beside the one before it; on a GPU it may, so each thread must say that it waits
inline size_t n_following = 0;
inline void follow_previous() { ++n_following; }

template <class F>
void launch_following(dim3 grid, dim3 block, F && thread) {
    n_following = 0;
    sfi_shim::launch(grid, block, thread);
    if (n_following != (size_t) grid.x*grid.y*grid.z*block.x*block.y*block.z) {
        sfi_shim::fail("a kernel that does not wait for the one before it");
    }
}

#define SFI_LAUNCH(kernel, grid, block, stream, ...) (void) (stream), launch_following((grid), (block), [&] { (kernel)(__VA_ARGS__); })

inline int lane_of_thread() { return sfi_shim::lane_of_thread(); }

inline void __syncthreads() { sfi_shim::block_barrier(); }
inline void __syncwarp()    { sfi_shim::warp_barrier(); }
inline void __threadfence() {}

template <class T> T __shfl_sync(unsigned, T x, int lane)     { return sfi_shim::from_lane(x, lane); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return sfi_shim::from_lane(x, lane_of_thread() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, int n) {
    return sfi_shim::from_lane(x, lane_of_thread() < n ? lane_of_thread() : lane_of_thread() - n);
}
inline bool __any_sync(unsigned, bool x) {
    const uint64_t * all = sfi_shim::exchange(x);
    return std::any_of(all, all + 32, [](uint64_t y) { return y != 0; });
}
inline unsigned __ballot_sync(unsigned, bool x) {
    const uint64_t * all = sfi_shim::exchange(x);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) {
        bits |= (unsigned) (all[i] != 0) << i;
    }
    return bits;
}

template <class T> T atomicAdd(T * p, T x) { const T old = *p; *p = old + x; return old; }
template <class T> T atomicOr (T * p, T x) { const T old = *p; *p = old | x; return old; }
template <class T> T atomicAnd(T * p, T x) { const T old = *p; *p = old & x; return old; }

inline int __popc(unsigned x) {
    int n = 0;
    for (; x; x &= x - 1) {
        ++n;
    }
    return n;
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += (int8_t) (a >> 8*i)*(int8_t) (b >> 8*i);
    }
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) {
        c += (a >> 8*i & 255)*(b >> 8*i & 255);
    }
    return c;
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = (uint64_t) y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        out |= (unsigned) (both >> 8*(selector >> 4*i & 7) & 255) << 8*i;
    }
    return out;
}

inline float    __uint_as_float(unsigned x) { return sfi_shim::bits_as<float>(x); }
inline unsigned __float_as_uint(float x)    { return sfi_shim::bits_as<unsigned>(x); }

inline float2 f16x2_to_f32(uint32_t bits) {
    return { ggml_fp16_to_fp32((ggml_fp16_t) (bits & 0xffff)), ggml_fp16_to_fp32((ggml_fp16_t) (bits >> 16)) };
}

using std::max;
using std::min;
