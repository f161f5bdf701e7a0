// The k best of many scores in one threadgroup, without sorting them.

#pragma once

#include "gpu.metal"

// A score as a key: larger is better, 0 is for what cannot be chosen. Among equal keys the lower number wins, so that a
// rank is a 64-bit number of which no two are equal.
static inline ulong rank_of(uint key, uint i) {
    return (ulong) key << 32 | (ulong) ~i;
}

static inline bool is_best(uint key, uint i, ulong least_rank) {
    return key != 0 && rank_of(key, i) >= least_rank;
}

// Order-preserving map of float to unsigned; never 0 for a number.
static inline uint sortable(float x) {
    const uint u = x == 0.0f ? 0u : as_type<uint>(x); // both zeros are equal
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

SFI_CONSTANT int digit_bins   = 256;
SFI_CONSTANT int digit_copies = 8; // of the histogram: neighbours often have the same digit

struct top_k_shared {
    atomic_uint bins[digit_bins*digit_copies];
    uint  of_digit[digit_bins];
    ulong prefix;
    uint  wanted;
    int   done;
};

// By the first simdgroup: the digit of the k-th best. Eight digits a lane, best first.
static inline void find_digit(threadgroup top_k_shared & sh, int shift, int lane) {
    const ulong prefix = sh.prefix;
    const uint  wanted = sh.wanted;
    uint mine = 0;
    for (int j = 0; j < 8; ++j) {
        mine += sh.of_digit[255 - 8*lane - j];
    }
    const uint above = simd_prefix_exclusive_sum(mine), all = simd_sum(mine);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (all <= wanted) { // shift 56: fewer than k; later: exactly k
        if (lane == 0) {
            sh.prefix = shift == 56 ? (ulong) 0 : prefix << 8;
            sh.done   = 1;
        }
        return;
    }
    if (above >= wanted || wanted > above + mine) {
        return;
    }
    uint left = wanted - above;
    for (int j = 0; j < 8; ++j) {
        const int  digit = 255 - 8*lane - j;
        const uint count = sh.of_digit[digit];
        if (left <= count) {
            sh.prefix = prefix << 8 | (ulong) digit;
            sh.wanted = left;
            break;
        }
        left -= count;
    }
}

// The least rank among the k best of n items; items.key(i) and items.number(i) are those of item i. All threads call it.
// Digit by digit from the top: of the digits seen so far those of the k-th best are known.
template <typename Items>
static inline ulong least_rank_of_best(int n, uint k, thread const Items & items, threadgroup top_k_shared & sh,
        int n_threads, int tid, int lane, int sg) {
    if (tid == 0) {
        sh.prefix = 0;
        sh.wanted = k;
        sh.done   = 0;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int b = tid; b < digit_bins*digit_copies; b += n_threads) {
            atomic_store_explicit(&sh.bins[b], 0u, memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const ulong prefix = sh.prefix;
        for (int i = tid; i < n; i += n_threads) {
            const uint  key  = items.key(i);
            const ulong rank = rank_of(key, items.number(i));
            if (key != 0 && (shift == 56 || rank >> (shift + 8) == prefix)) {
                atomic_fetch_add_explicit(&sh.bins[(int) (rank >> shift & 255)*digit_copies + tid % digit_copies], 1u, memory_order_relaxed);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int b = tid; b < digit_bins; b += n_threads) {
            uint sum = 0;
            for (int c = 0; c < digit_copies; ++c) {
                sum += atomic_load_explicit(&sh.bins[b*digit_copies + c], memory_order_relaxed);
            }
            sh.of_digit[b] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sg == 0) {
            find_digit(sh, shift, lane);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sh.done) {
            return shift == 56 ? (ulong) 0 : sh.prefix << shift;
        }
    }
    return sh.prefix;
}
