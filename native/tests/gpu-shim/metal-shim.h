// Enough of the Metal Shading Language to run the kernels of native/ggml/metal on a CPU. Address spaces are words that mean
// nothing here: no other header may follow this one.

#pragma once

#include "gpu-shim.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include <math.h> // floats get the functions of the global namespace

namespace metal {

using uchar  = unsigned char;
using ushort = unsigned short;
using uint   = unsigned int;
using ulong  = unsigned long;

struct half {
    uint16_t bits;
    operator float() const { return ggml_fp16_to_fp32(bits); }
};

struct half2  { half x, y; };
struct uchar4 { uchar x, y, z, w; };
struct uint3  { uint x, y, z; };
struct alignas(8) float2 {
    float x, y;
    float2(float x, float y) : x(x), y(y) {}
};
struct alignas(8) uint2 {
    uint x, y;
    uint2(uint x, uint y) : x(x), y(y) {}
};
struct alignas(16) uint4 {
    uint x, y, z, w;
    uint4() = default;
    uint4(uint x, uint y, uint z, uint w) : x(x), y(y), z(z), w(w) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
    float4() = default;
    float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
    explicit float4(uchar4 v) : x(v.x), y(v.y), z(v.z), w(v.w) {}
};

inline float dot(float4 a, float4 b) { return a.x*b.x + a.y*b.y + a.z*b.z + a.w*b.w; }
inline float powr(float x, float y)  { return powf(x, y); }

template <class T> T min(T a, T b) { return a < b ? a : b; } // both of one type, as Metal wants it
template <class T> T max(T a, T b) { return a > b ? a : b; }

template <class To, class From> To as_type(From x) { return sfi_shim::bits_as<To>(x); }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags) { sfi_shim::block_barrier(); }
inline void simdgroup_barrier(mem_flags)   { sfi_shim::warp_barrier(); }

template <class T> T simd_shuffle(T x, ushort lane)     { return sfi_shim::from_lane(x, lane); }
template <class T> T simd_shuffle_xor(T x, ushort mask) { return sfi_shim::from_lane(x, sfi_shim::lane_of_thread() ^ mask); }

template <class T>
T simd_sum(T x) {
    const uint64_t * all = sfi_shim::exchange_values(x);
    T sum = 0;
    for (int i = 0; i < 32; ++i) {
        sum += sfi_shim::register_of<T>(all[i]);
    }
    return sum;
}

template <class T>
T simd_max(T x) {
    const uint64_t * all = sfi_shim::exchange_values(x);
    for (int i = 0; i < 32; ++i) {
        x = max(x, sfi_shim::register_of<T>(all[i]));
    }
    return x;
}

template <class T>
T simd_prefix_exclusive_sum(T x) {
    const uint64_t * all = sfi_shim::exchange_values(x);
    T sum = 0;
    for (int i = 0; i < sfi_shim::lane_of_thread(); ++i) {
        sum += sfi_shim::register_of<T>(all[i]);
    }
    return sum;
}

enum memory_order { memory_order_relaxed };

// a type of its own, so that only the functions for it can touch it
template <class T> struct atomic { T value; };
using atomic_uint = atomic<uint>;
using atomic_int  = atomic<int>;

template <class T> T    atomic_load_explicit (const atomic<T> * p, memory_order)  { return p->value; }
template <class T> void atomic_store_explicit(atomic<T> * p, T x, memory_order)   { p->value = x; }
template <class T> T atomic_fetch_add_explicit(atomic<T> * p, T x, memory_order)  { return std::exchange(p->value, p->value + x); }
template <class T> T atomic_fetch_or_explicit (atomic<T> * p, T x, memory_order)  { return std::exchange(p->value, p->value | x); }
template <class T> T atomic_fetch_and_explicit(atomic<T> * p, T x, memory_order)  { return std::exchange(p->value, p->value & x); }

template <class T>
bool atomic_compare_exchange_weak_explicit(atomic<T> * p, T * expected, T x, memory_order, memory_order) {
    if (p->value != *expected) {
        *expected = p->value;
        return false;
    }
    p->value = x;
    return true;
}

} // namespace metal

namespace sfi_shim {

// What a kernel's parameter gets: a buffer, or where its thread is. See SFI_POSITION.
struct parameter {
    void * const * buffers;
    size_t i, n;

    template <class T> operator T * () const { return (T *) buffers[i]; }
    operator metal::uint3() const { return { blockIdx.x, blockIdx.y, blockIdx.z }; }
    operator metal::ushort() const {
        return (metal::ushort) (i + 3 == n ? threadIdx.x : i + 2 == n ? threadIdx.x % 32 : threadIdx.x/32);
    }
};

struct metal_kernel {
    size_t args_size, n_buffers;
    std::function<void(const void * args, void * const * buffers)> run; // as one thread
};

// by the names that the host asks for
inline std::map<std::string, metal_kernel> & metal_kernels() {
    static std::map<std::string, metal_kernel> all;
    return all;
}

template <class Args, class... P, size_t... i>
void run_kernel(void (*kernel)(const Args &, P...), const void * args, void * const * buffers, std::index_sequence<i...>) {
    kernel(*(const Args *) args, static_cast<P>(parameter { buffers, i, sizeof...(P) })...);
}

template <class Args, class... P>
bool add_kernel(const char * name, void (*kernel)(const Args &, P...)) {
    metal_kernels()[name] = { sizeof(Args), sizeof...(P) - 4, [kernel](const void * args, void * const * buffers) {
        run_kernel(kernel, args, buffers, std::index_sequence_for<P...>());
    } };
    return true;
}

} // namespace sfi_shim

#define SFI_UNIQUE_(a, b) a##b
#define SFI_UNIQUE(a, b)  SFI_UNIQUE_(a, b)
#define SFI_KERNEL_AS(name, ...) static const bool SFI_UNIQUE(added_, __COUNTER__) = sfi_shim::add_kernel(name, __VA_ARGS__);
#define SFI_KERNEL(function)     SFI_KERNEL_AS(#function, function)
#define SFI_THREADGROUP          static

#define kernel
#define constant    const
#define device
#define threadgroup
#define thread
