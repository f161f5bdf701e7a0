// What the kernels of this folder share. The tests run this very text on a CPU (native/tests/gpu-shim).
//
// Metal compiles with fast math, which may assume that there are no infinities. So the kernels have none: `no_logit` stands
// for minus infinity inside, and what comes from or goes to other operations is looked at as bits.

#pragma once

#include "kernels.h"

#ifdef __METAL_VERSION__
#define SFI_THREADGROUP threadgroup
// a kernel by its own name, and an instance of a template by a name of its own
#define SFI_KERNEL(function)
#define SFI_KERNEL_AS(name, ...) template [[host_name(name)]] kernel decltype(__VA_ARGS__) __VA_ARGS__;
#endif

// memory of the threadgroup: at most this on every GPU
#define SFI_SHARED(type, name) \
    static_assert(sizeof(type) <= 32768, "too much threadgroup memory"); \
    SFI_THREADGROUP type name

// the last parameters of every kernel
#define SFI_POSITION \
    uint3  block [[threadgroup_position_in_grid]], \
    ushort tid   [[thread_index_in_threadgroup]], \
    ushort lane  [[thread_index_in_simdgroup]], \
    ushort sg    [[simdgroup_index_in_threadgroup]]

using namespace metal;
using namespace sfi_gpu;
using namespace sfi_metal;

SFI_CONSTANT float no_logit = -1e30f;
SFI_CONSTANT uint  minus_infinity_bits = 0xff800000u;

static inline float weight_of(float x, float most) {
    return x > no_logit ? exp(x - most) : 0.0f;
}

// A softmax over some cells: the largest logit, and the sum of exp(logit - most).
struct softmax_sum {
    float most, sum;
};

static inline softmax_sum sum_of(float most, float sum) {
    softmax_sum x;
    x.most = most;
    x.sum  = sum;
    return x;
}

static inline softmax_sum no_cells() {
    return sum_of(no_logit, 0.0f);
}

static inline softmax_sum merge(softmax_sum a, softmax_sum b) {
    const float most = max(a.most, b.most);
    return sum_of(most, a.sum*weight_of(a.most, most) + b.sum*weight_of(b.most, most));
}

// of all lanes, in all lanes
static inline softmax_sum simd_merge(softmax_sum x) {
    const float most = simd_max(x.most);
    return sum_of(most, simd_sum(x.sum*weight_of(x.most, most)));
}

static inline float log_of(softmax_sum x) {
    return x.sum > 0.0f ? x.most + log(x.sum) : no_logit;
}

// by its bits, which no fast math takes for granted
static inline bool is_finite(float x) {
    return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u;
}

// tanh by one exponential: that of fast math is good to 2^-11 only
static inline float soft_capped(float x, float cap) {
    return cap > 0.0f ? cap*(1.0f - 2.0f/(exp(min(2.0f*x, 60.0f)) + 1.0f)) : x;
}

static inline float load_logit(device const float * p) {
    const uint bits = *(device const uint *) p;
    return as_type<float>(bits == minus_infinity_bits ? as_type<uint>(no_logit) : bits);
}

static inline void store_logit(device float * p, bool any, float x) {
    *(device uint *) p = any ? as_type<uint>(x) : minus_infinity_bits;
}

// of all threads, in all threads; tmp: a float per simdgroup
template <int n_simds>
static inline float group_sum(float x, threadgroup float * tmp, int lane, int sg) {
    x = simd_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup); // tmp may still be read
    if (lane == 0) {
        tmp[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float all = 0.0f;
    for (int i = 0; i < n_simds; ++i) {
        all += tmp[i];
    }
    return all;
}

template <int n_simds>
static inline float group_max(float x, threadgroup float * tmp, int lane, int sg) {
    x = simd_max(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        tmp[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float most = tmp[0];
    for (int i = 1; i < n_simds; ++i) {
        most = max(most, tmp[i]);
    }
    return most;
}

// Where the thread's item goes that is taken; items go in the order of their threads, and `at` moves from the first one's
// place to behind the last one's. of_simd: an int per simdgroup
template <int n_simds>
static inline int next_place(bool take, thread int & at, threadgroup int * of_simd, int lane, int sg) {
    const int before_in_simd = simd_prefix_exclusive_sum(take ? 1 : 0), in_simd = simd_sum(take ? 1 : 0);
    if (lane == 0) {
        of_simd[sg] = in_simd;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int before = at;
#pragma unroll
    for (int i = 0; i < n_simds; ++i) {
        before += i < sg ? of_simd[i] : 0;
        at     += of_simd[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return before + before_in_simd;
}

// ---- rows of K and V -------------------------------------------------------------------------------------------------

// Eight values of a row as they are stored: loading them is one thing, using them another, so that many loads can be
// under way. Part i of a row has its values 8i .. 8i + 7.

struct octet_f32 {
    float4 lo, hi;
    void load(device const char * row, int i) {
        lo = ((device const float4 *) row)[2*i];
        hi = ((device const float4 *) row)[2*i + 1];
    }
    void get(thread float * x) const {
        x[0] = lo.x; x[1] = lo.y; x[2] = lo.z; x[3] = lo.w;
        x[4] = hi.x; x[5] = hi.y; x[6] = hi.z; x[7] = hi.w;
    }
};

struct octet_f16 {
    uint4 raw;
    void load(device const char * row, int i) { raw = ((device const uint4 *) row)[i]; }
    void clear() { raw = uint4(0, 0, 0, 0); }
    void get(thread float * x) const {
        const uint w[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const half2 h = as_type<half2>(w[j]);
            x[2*j]     = (float) h.x;
            x[2*j + 1] = (float) h.y;
        }
    }
};

// by shifts, which every GPU has: not all have the type
struct octet_bf16 {
    uint4 raw;
    void load(device const char * row, int i) { raw = ((device const uint4 *) row)[i]; }
    void clear() { raw = uint4(0, 0, 0, 0); }
    void get(thread float * x) const {
        const uint w[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[2*j]     = as_type<float>(w[j] << 16);
            x[2*j + 1] = as_type<float>(w[j] & 0xffff0000u);
        }
    }
};

// blocks of 32 values: an F16 scale and 32 int8, on even addresses
struct octet_q8_0 {
    uint raw[2];
    uint scale;
    void load(device const char * row, int i) {
        device const ushort * block = (device const ushort *) (row + (i/4)*34);
        device const ushort * p = block + 1 + 4*(i % 4);
        scale  = block[0];
        raw[0] = (uint) p[0] | (uint) p[1] << 16;
        raw[1] = (uint) p[2] | (uint) p[3] << 16;
    }
    void clear() { scale = raw[0] = raw[1] = 0; }
    void get(thread float * x) const {
        const float d = (float) as_type<half2>(scale).x;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = d*(float) ((int) (raw[j/4] << (24 - 8*(j % 4))) >> 24);
        }
    }
};

// blocks of 32 values: an F16 scale and 16 bytes, value j in the low half of byte j, value 16 + j in the high half
struct octet_q4_0 {
    uint raw[2];
    uint scale;
    void load(device const char * row, int i) {
        device const ushort * block = (device const ushort *) (row + (i/4)*18);
        device const ushort * p = block + 1 + 4*(i % 2);
        const int shift = i % 4 < 2 ? 0 : 4;
        scale  = block[0];
        raw[0] = ((uint) p[0] | (uint) p[1] << 16) >> shift & 0x0f0f0f0fu;
        raw[1] = ((uint) p[2] | (uint) p[3] << 16) >> shift & 0x0f0f0f0fu;
    }
    void clear() { scale = raw[0] = raw[1] = 0; }
    void get(thread float * x) const {
        const float d = (float) as_type<half2>(scale).x;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = d*(float) ((int) (raw[j/4] >> 8*(j % 4) & 0xffu) - 8);
        }
    }
};
