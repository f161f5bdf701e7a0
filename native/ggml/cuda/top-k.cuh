// The k best of many scores in one block, without sorting them.

#pragma once

#include "gpu.cuh"

namespace sfi_cuda {

// A score as a key: larger is better, 0 is for what cannot be chosen. Among equal keys the lower number wins, so that a
// rank is a 64-bit number of which no two are equal.
static __device__ __forceinline__ uint64_t rank_of(uint32_t key, uint32_t i) {
    return (uint64_t) key << 32 | ~i;
}

static __device__ __forceinline__ bool is_best(uint32_t key, uint32_t i, uint64_t least_rank) {
    return key != 0 && rank_of(key, i) >= least_rank;
}

// Order-preserving map of float to unsigned; never 0 for a number.
static __device__ __forceinline__ uint32_t sortable(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f); // both zeros are equal
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

constexpr int digit_bins   = 256;
constexpr int digit_copies = 8; // of the histogram: neighbours often have the same digit
constexpr int keys_at_once = 8; // of a thread

struct top_k_shared {
    unsigned bins[digit_bins*digit_copies];
    unsigned of_digit[digit_bins];
    uint64_t prefix;
    unsigned wanted;
    bool     done;
};

// The least rank among the k best of n items (key, number). All threads of the block call it. Digit by digit from the top: of
// the digits seen so far those of the k-th best are known.
static __device__ uint64_t least_rank_of_best(const uint2 * items, int n, unsigned k, top_k_shared & sh) {
    if (threadIdx.x == 0) {
        sh.prefix = 0;
        sh.wanted = k;
        sh.done   = false;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int b = threadIdx.x; b < digit_bins*digit_copies; b += blockDim.x) {
            sh.bins[b] = 0;
        }
        __syncthreads();
        const uint64_t prefix = sh.prefix;
        const int      copy   = threadIdx.x % digit_copies;
        for (int i0 = threadIdx.x; i0 < n; i0 += keys_at_once*blockDim.x) {
            uint2 item[keys_at_once];
#pragma unroll
            for (int j = 0; j < keys_at_once; ++j) { // all loads before the first use
                const int i = i0 + j*blockDim.x;
                item[j] = i < n ? items[i] : make_uint2(0, 0);
            }
#pragma unroll
            for (int j = 0; j < keys_at_once; ++j) {
                const uint64_t rank = rank_of(item[j].x, item[j].y);
                if (item[j].x != 0 && (shift == 56 || rank >> (shift + 8) == prefix)) {
                    atomicAdd(&sh.bins[(rank >> shift & 255)*digit_copies + copy], 1u);
                }
            }
        }
        __syncthreads();
        for (int b = threadIdx.x; b < digit_bins; b += blockDim.x) {
            unsigned sum = 0;
            for (int c = 0; c < digit_copies; ++c) {
                sum += sh.bins[b*digit_copies + c];
            }
            sh.of_digit[b] = sum;
        }
        __syncthreads();
        if (threadIdx.x < warp_size) { // the digit of the k-th best: eight digits a lane, best first
            unsigned mine = 0;
            for (int j = 0; j < 8; ++j) {
                mine += sh.of_digit[255 - 8*threadIdx.x - j];
            }
            const unsigned sum = warp_prefix_sum(mine), above = sum - mine;
            const unsigned all = __shfl_sync(all_lanes, sum, warp_size - 1), wanted = sh.wanted;
            __syncwarp();
            if (all <= wanted) { // shift 56: fewer than k; later: exactly k
                if (threadIdx.x == 0) {
                    sh.prefix = shift == 56 ? 0 : prefix << 8;
                    sh.done   = true;
                }
            } else if (above < wanted && wanted <= above + mine) {
                unsigned left = wanted - above;
                for (int j = 0; j < 8; ++j) {
                    const int      digit = 255 - 8*threadIdx.x - j;
                    const unsigned count = sh.of_digit[digit];
                    if (left <= count) {
                        sh.prefix = prefix << 8 | digit;
                        sh.wanted = left;
                        break;
                    }
                    left -= count;
                }
            }
        }
        __syncthreads();
        if (sh.done) {
            const uint64_t least = shift == 56 ? 0 : sh.prefix << shift;
            __syncthreads();
            return least;
        }
    }
    const uint64_t least = sh.prefix;
    __syncthreads();
    return least;
}

// ---- selecting in chunks: what may be selected is listed in any order, and written in the order of the cells --------------

// Appends a thread's items (key, number) whose key is not 0 to a list, which keeps `most` of them and counts all. One addition
// for a warp, as all add to the same.
template <int C>
static __device__ __forceinline__ void append_listed(const uint2 * item, uint2 * listed, unsigned * n_listed, int most) {
    const int lane = threadIdx.x % warp_size;
    unsigned has[C];
    int n = 0, at = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        has[c] = __ballot_sync(all_lanes, item[c].x != 0);
        n += __popc(has[c]);
    }
    if (lane == 0 && n > 0) {
        at = (int) atomicAdd(n_listed, (unsigned) n);
    }
    at = __shfl_sync(all_lanes, at, 0);
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int place = at + __popc(has[c] & ((1u << lane) - 1));
        if (item[c].x != 0 && place < most) {
            listed[place] = item[c];
        }
        at += __popc(has[c]);
    }
}

constexpr int key_digits = 4096;
constexpr int max_few    = 3072; // items that are ranked in shared memory

static __device__ __forceinline__ unsigned digit_of(uint32_t key) { return key >> 20; }

// The largest digit with which at least n of the counted keys are of it or above; 0 if there are fewer in all. Threads of the
// block each take some digits.
template <int n_threads>
static __device__ unsigned least_digit(const unsigned * digits, unsigned n) {
    constexpr int each = key_digits/n_threads, n_warps = n_threads/warp_size;
    __shared__ unsigned of_warp[n_warps], found;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size, top = key_digits - 1 - each*threadIdx.x;
    unsigned counts[each], mine = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
        counts[i] = digits[top - i];
        mine += counts[i];
    }
    const unsigned sum = warp_prefix_sum(mine);
    if (lane == warp_size - 1) {
        of_warp[warp] = sum;
    }
    if (threadIdx.x == 0) {
        found = 0;
    }
    __syncthreads();
    unsigned above = sum - mine;
    for (int w = 0; w < warp; ++w) {
        above += of_warp[w];
    }
    if (above < n && n <= above + mine) {
        bool done = false;
#pragma unroll
        for (int i = 0; i < each; ++i) {
            above += counts[i];
            if (!done && above >= n) {
                found = top - i;
                done  = true;
            }
        }
    }
    __syncthreads();
    return found;
}

struct best_shared {
    union {
        top_k_shared top;
        int          of_chunk[max_chunks];
    };
    uint2    few[max_few];
    unsigned n_few;
};

// Counts the items of each chunk among the best, and sums up: first[chunk] is where its selected items begin.
static __device__ void place_chunks(const uint2 * items, int n, uint64_t best, int chunk, int n_chunks, int32_t * first, int * of_chunk) {
    __syncthreads();
    for (int c = threadIdx.x; c < n_chunks; c += blockDim.x) {
        of_chunk[c] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const uint2 item = items[i];
        if (is_best(item.x, item.y, best)) {
            atomicAdd(&of_chunk[item.y/chunk], 1);
        }
    }
    __syncthreads();
    if (threadIdx.x >= warp_size) {
        return;
    }
    int before = 0;
    for (int c0 = 0; c0 < n_chunks; c0 += warp_size) {
        const int c = c0 + threadIdx.x, mine = c < n_chunks ? of_chunk[c] : 0;
        const int sum = warp_prefix_sum(mine);
        if (c < n_chunks) {
            first[c] = before + sum - mine;
        }
        before += __shfl_sync(all_lanes, sum, warp_size - 1);
    }
}

// One block: the least rank among the n_selected best of n listed items, where each chunk of items writes those it has, and
// pads. digits: how many of the items have each leading digit; zeroed. So only items that may be among the best are ranked.
template <int n_threads>
static __device__ void choose_listed(const uint2 * listed, int n, int n_selected, unsigned * digits, int chunk, int n_chunks,
        uint64_t * best_rank, int32_t * first, int32_t * selected, best_shared & sh) {
    // of the n_selected listed items all may be the best, but what was not listed must not be
    const unsigned least = n >= n_selected ? least_digit<n_threads>(digits, n_selected) : 0;
    if (threadIdx.x == 0) {
        sh.n_few = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < key_digits; i += n_threads) {
        digits[i] = 0;
    }
    for (int i0 = 0; i0 < n; i0 += keys_at_once*n_threads) {
        uint2 item[keys_at_once];
#pragma unroll
        for (int j = 0; j < keys_at_once; ++j) {
            const int i = i0 + j*n_threads + threadIdx.x;
            item[j] = i < n ? listed[i] : make_uint2(0, 0);
        }
#pragma unroll
        for (int j = 0; j < keys_at_once; ++j) {
            item[j].x = digit_of(item[j].x) >= least ? item[j].x : 0;
        }
        append_listed<keys_at_once>(item, sh.few, &sh.n_few, max_few);
    }
    __syncthreads();
    const bool    few   = sh.n_few <= max_few;
    const uint2 * items = few ? sh.few : listed;
    const int     n_items = few ? (int) sh.n_few : n;
    const uint64_t best = n_items <= n_selected ? 0 : least_rank_of_best(items, n_items, n_selected, sh.top);
    // what has a smaller digit is no item here, so that all of these may be the best
    const uint64_t best_of_all = best > 0 ? best : (uint64_t) least << 52;
    place_chunks(items, n_items, best_of_all, chunk, n_chunks, first, sh.of_chunk);
    if (threadIdx.x == 0) {
        *best_rank = best_of_all;
    }
    for (int i = min(n, n_selected) + threadIdx.x; i < n_selected; i += n_threads) {
        selected[i] = -1;
    }
}

// The block of a chunk: where the thread's item c goes that is taken, item c of warp w coming before c + 1 of any warp. Returns where the
// next would go. of_warp: shared
template <int C, int n_warps>
static __device__ int places_of(const bool * take, int first, int (*of_warp)[n_warps], int * place) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    unsigned taken[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        taken[c] = __ballot_sync(all_lanes, take[c]);
        if (lane == 0) {
            of_warp[c][warp] = __popc(taken[c]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < C; ++c) {
        int before = first;
#pragma unroll
        for (int w = 0; w < n_warps; ++w) {
            before += w < warp ? of_warp[c][w] : 0;
            first  += of_warp[c][w];
        }
        place[c] = before + __popc(taken[c] & ((1u << lane) - 1));
    }
    return first;
}

} // namespace sfi_cuda
