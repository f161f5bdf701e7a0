// A GPU's threads on one thread of a CPU, so that the tests can run the kernels as they are: what they execute is the text
// that ships, not a copy of it. cuda-shim.h and metal-shim.h add the words of CUDA and Metal.
//
// A thread of a block is a fiber. Fibers run in turn until they reach a barrier or an operation of their warp, and go on when
// all have got there, so that a kernel sees what it would see in lockstep. A thread that is elsewhere than its warp or its
// block is an error, not a hang. Blocks run one after the other, in an order that changes with every launch, and so does that of
// warps and threads between barriers. Shared memory
// and registers that nobody wrote hold what was there before, and memory is the host's: out of bounds is for ASan.
//
// Not shown: timing, occupancy, and races between threads that real hardware runs at once.

#pragma once

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// the thread at work
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sfi_shim {

void launch(dim3 grid, dim3 block, const std::function<void()> & thread);
void block_barrier();
void warp_barrier();
// of each lane of the warp the value that it brought; valid until the lane's next but one exchange
const uint64_t * exchange(uint64_t value);

[[noreturn]] void fail(const char * what);

inline int lane_of_thread() { return (int) (threadIdx.x & 31); }

template <class T>
T register_of(uint64_t bits) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one register");
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// each lane's value, by register_of()
template <class T>
const uint64_t * exchange_values(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return exchange(bits);
}

template <class T>
T from_lane(T value, int lane) {
    return register_of<T>(exchange_values(value)[lane & 31]);
}

template <class To, class From>
To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

} // namespace sfi_shim
