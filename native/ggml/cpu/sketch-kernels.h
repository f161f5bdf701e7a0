// The kernels of GGML_OP_SKETCH_SCAN, one set per instruction set.

#pragma once

#include "simd.h"
#include "sketch.h"

#include <cstdint>

namespace sfi {
namespace scan {

constexpr int     run_cells   = 256;
constexpr int64_t chunk_cells = 4*run_cells;
constexpr int64_t ahead_cells = 64;       // of prefetching records
constexpr int     max_heads   = 4;        // of a kernel
constexpr float   log2_one    = 21.9999f; // a weight of 1 as an integer: 256 of them fit 31 bits, and 1/64 of it 16 bits

// A query against the codes: log2 of exp(logit) = base + factor * sum_j w_j code_j; the second of two looks adds `again` and
// the sum over the components of the further planes. most: none is larger, by the first look.
struct projected {
    int8_t w[sketch_max_components];
    float  factor, base, again, most;
};

struct run_sum {
    float   top;
    int32_t weight, of_v;
};

// For n cells, a multiple of 16; logits in rows of ld, weights in rows of 4*run_cells:
using logits_fn = void (*)(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld);
// (largest t, sum of 2^(t - it)) of n, padded to a vector
struct powers { float top, sum; };
using powers_fn = powers (*)(const float * t, int64_t n);
// logits, and of each head (largest t, sum of 2^(t - p.most))
using summed_fn = void (*)(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld, powers * sum);
// integers 2^(t - top + log2_one), 1/64 of them, rounded, as split() writes these, and the sums of both
using weigh_fn  = void (*)(const float * t, int n, uint8_t * weights, run_sum & sum);
// sums over a group of value codes, less centre_j, times the smaller integers, to rows of out [n_heads, n_v]
using codes_fn  = void (*)(const sketch_layout & l, int group, const uint8_t * block, int n, const uint8_t * weights, const run_sum * sum,
                           float * out);
// Cells and their logits, rows of t [n_heads, ld], in order; z: the largest of t - bound
struct filtered {
    int32_t * cell;
    float   * t;
    int64_t   ld;
    float   * z;
};
// those where one of the heads is at least `threshold` above its bound, and `offset` is added to their number; returns how many
using filter_fn = int64_t (*)(const filtered & from, int64_t n, int n_heads, const float * bound, float threshold, int32_t offset, const filtered & to);
// The same sums over single cells, times rows of w [n_heads, ld], without the centres. codes: of the KV head; if there are two
// looks, its records
using cells_fn  = void (*)(const sketch_layout & l, int group, const uint8_t * codes, const int32_t * cell, int64_t n, const float * w, int64_t ld,
                           float * out);
// out = 2^(t + shift), rounded to integers as in weigh; n padded to a vector
using exp2_fn   = void (*)(const float * t, const float * shift, int64_t n, float * out);

// t += what the second look adds, from the records of single cells; n a multiple of 16
using again_fn  = void (*)(const sketch_layout & l, const uint8_t * records, const int32_t * cell, int64_t n, const projected * p, float * t, int64_t ld);
// out = 2^(t - log2_sum); returns the sum over n, padded to a vector
using share_fn  = float (*)(const float * t, int64_t n, float log2_sum, float * out);
// powers, each of which goes to out
using weights_fn = powers (*)(const float * t, int64_t n, float * out);

struct kernels {
    logits_fn logits[max_heads];
    summed_fn summed[max_heads];
    codes_fn  codes [max_heads];
    cells_fn  cells [max_heads];
    again_fn  again [max_heads];
    weigh_fn  weigh;
    filter_fn filter;
    exp2_fn   exp2;
    share_fn  share;
    powers_fn powers;
    weights_fn weights;
};

kernels kernels_for(simd path);

// it may lie in two lines of the cache
static SFI_INLINE void prefetch_record(const uint8_t * record, int bytes) {
    prefetch(record);
    prefetch(record + bytes - 1);
}

} // namespace scan
} // namespace sfi
