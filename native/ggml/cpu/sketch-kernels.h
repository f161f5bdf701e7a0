// The kernels of SKETCH_SCAN, one set per instruction set.

#pragma once

#include "simd.h"
#include "sketch.h"

#include <cstdint>

namespace sfi {
namespace scan {

constexpr int64_t chunk_cells = 1024;     // what a thread takes
constexpr int64_t ahead_cells = 64;       // of prefetching records
constexpr int     max_heads   = 4;        // of a kernel

// A query against the codes: log2 of exp(logit) = base + factor * sum_j w_j code_j; the second of two looks adds `again` and
// the sum over the components of the further planes. most: none is larger, by the first look.
struct projected {
    int8_t w[sketch_max_components];
    float  factor, base, again, most;
};

// For n cells, a multiple of 16; logits in rows of ld:
using logits_fn = void (*)(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld);
// (largest t, sum of 2^(t - it)) of n, padded to a vector
struct powers { float top, sum; };
using powers_fn = powers (*)(const float * t, int64_t n);
// logits, and of each head (largest t, sum of 2^(t - p.most))
using summed_fn = void (*)(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld, powers * sum);
// Cells and their logits, rows of t [n_heads, ld], in order; z: the largest of t - bound
struct filtered {
    int32_t * cell;
    float   * t;
    int64_t   ld;
    float   * z;
};
// those where one of the heads is at least `threshold` above its bound, and `offset` is added to their number; returns how many
using filter_fn = int64_t (*)(const filtered & from, int64_t n, int n_heads, const float * bound, float threshold, int32_t offset, const filtered & to);
// sums over a group of value codes of single cells, times rows of w [n_heads, ld], to rows of out [n_heads, 16]
using cells_fn  = void (*)(const sketch_layout & l, int group, const uint8_t * records, const int32_t * cell, int64_t n, const float * w, int64_t ld,
                           float * out);
// t += what the second look adds, from the records of single cells; n a multiple of 16
using again_fn  = void (*)(const sketch_layout & l, const uint8_t * records, const int32_t * cell, int64_t n, const projected * p, float * t, int64_t ld);
// out = 2^(t - log2_sum); returns the sum over n, padded to a vector
using share_fn  = float (*)(const float * t, int64_t n, float log2_sum, float * out);
// powers, each of which goes to out
using weights_fn = powers (*)(const float * t, int64_t n, float * out);

struct kernels {
    logits_fn logits[max_heads];
    summed_fn summed[max_heads];
    cells_fn  cells [max_heads];
    again_fn  again [max_heads];
    filter_fn filter;
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
