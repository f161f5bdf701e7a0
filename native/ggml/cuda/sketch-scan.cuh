// What the kernels of GGML_OP_SKETCH_SCAN share, be it with one look or with two: see sketch-scan.cu and sketch-looks.cu.

#pragma once

#include "sketch.h"
#include "top-k.cuh"

namespace sfi_cuda {

constexpr int scan_threads  = 256; // where a chunk has as many cells at once
constexpr int scan_warps    = scan_threads/warp_size;
constexpr int max_group     = 8;
constexpr int max_k_fields  = 64;
constexpr int max_v_groups  = 8;
constexpr float least_tail_share = 1.0f/(1 << 20); // of a tail that counts

struct scan_field { uint8_t plane, shift, bits; };

struct scan_args {
    const char * q;
    const uint8_t * codes;
    const float * basis, * least;
    const int32_t * skip, * plan;
    int32_t * selected, * counts;
    float * out;
    // scratch
    int32_t  * weights; // [n_head, n_k/4]: four whole numbers in a word
    float    * factor;  // [n_head, 3]: logit = factor*sum + offset; after the second look also what its sum lacks
    float    * logits;  // [n_head, n_list]
    float    * stats;   // [n_head, n_chunks, 2]: maximum, sum
    uint2    * listed;  // [n_head_kv, n_list]: key, cell
    unsigned * counters; // [n_head_kv]
    unsigned * digits;   // [n_head_kv, key_digits], zeros before and after
    // one look
    float    * total;   // [n_head, 2]: maximum, log-sum-exp
    uint32_t * keys;    // [n_head_kv, n_list]
    unsigned * n_listed;// [n_head_kv]
    uint64_t * best;    // [n_head_kv]: the least rank that is selected
    int32_t  * first;   // [n_head_kv, n_chunks]: where the selected cells of a chunk go
    float    * tails;   // [n_head, n_chunks, n_v + 2]: components, weight of them, sum
    // two looks: of the cells of each chunk that are looked at again, one after the other where the chunk begins
    int32_t  * cells;   // [n_head_kv, n_list]; their logits replace those of the first look
    int32_t  * n_again; // [n_head_kv, n_chunks]
    float    * again;   // [n_head, n_chunks, 3]: maximum, sum; their share by the first look
    float    * values;  // [n_head, n_chunks, n_v]: sum of their codes of V times exp(logit - maximum)
    int64_t q_nb1, head_bytes, records_at, selected_ld;
    int d_k, d_v, n_k, n_v, n_skip, n_list, n_selected, n_head, group, n_chunks, chunk, basis_size, block_bytes, record_bytes;
    int k_planes, first_planes, n_k_fields, n_first_fields, n_v_groups;
    float scale, softcap, second_look;
    scan_field k[max_k_fields];
    scan_field v[max_v_groups][4];
};

// f(std::integral_constant of the number of heads that kernels are made for)
template <class F>
static void with_group(int group, F f) {
    if (group <= 1) {
        f(std::integral_constant<int, 1>());
    } else if (group <= 2) {
        f(std::integral_constant<int, 2>());
    } else if (group <= 4) {
        f(std::integral_constant<int, 4>());
    } else {
        f(std::integral_constant<int, max_group>());
    }
}

// the second look's kernels
size_t take_looks_scratch(scan_args & a, scratch_parts & parts, int n_head_kv);
void   look_again(const gpu & g, const scan_args & a, int n_head_kv);

template <int G> struct alignas(G < 4 ? 4*G : 16) field_weights { int32_t of_head[G]; };

// Adds codes times weights of the fields of a plane, f and those after it up to `last`, for C cells. w: of the fields from `first` on
template <int G, int C>
static __device__ __forceinline__ void add_plane(const scan_args & a, int plane, const uint32_t * word, const field_weights<G> * w,
        int first, int last, int & f, int (*acc)[G]) {
    for (; f < last && a.k[f].plane == plane; ++f) {
        const int      shift = a.k[f].shift;
        const uint32_t mask  = ((1u << a.k[f].bits) - 1)*0x01010101u;
        const field_weights<G> wf = w[f - first];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const int codes = (int) (word[c] >> shift & mask);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                acc[c][g] = __dp4a(codes, wf.of_head[g], acc[c][g]);
            }
        }
    }
}

// maximum and sum of head h by the first look, by one warp
static __device__ float2 merge_stats(const scan_args & a, int h) {
    const int lane = threadIdx.x % warp_size;
    const float * stats = a.stats + (int64_t) h*a.n_chunks*2;
    float max = -INFINITY, sum = 0.0f;
    for (int c = lane; c < a.n_chunks; c += warp_size) {
        const float most = fmaxf(max, stats[2*c]);
        sum = sum*weight_of(max, most) + stats[2*c + 1]*weight_of(stats[2*c], most);
        max = most;
    }
    const float most = warp_max(max);
    return make_float2(most, warp_sum(sum*weight_of(max, most)));
}

// Scores as keys. Those that single precision can hardly tell from 0 are ranked by their logarithm instead, below all others.
constexpr float tiny_score = 1e-30f; // bits 0x0da24260
constexpr float log_of_tiny = 69.1f, largest_log = 1e4f, keys_per_nat = 2e4f;

static __device__ __forceinline__ uint32_t key_of_log(float log_score) {
    return 1 + (uint32_t) (keys_per_nat*fmaxf(log_score + log_of_tiny + largest_log, 0.0f));
}

// Of a cell with the logits x: 0 if it is left out, or its share is below `least` in every head of the group.
template <int G>
static __device__ __forceinline__ uint32_t key_of_cell(const float * x, const float * lse, int group, float least) {
    float score = 0.0f, most = 0.0f;
    bool  in = false;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < group) {
            const float share = weight_of(x[g], lse[g]);
            in    = in || x[g] > -INFINITY;
            score += share;
            most  = fmaxf(most, share);
        }
    }
    if (!in || most < least) {
        return 0;
    }
    if (score >= tiny_score) {
        return __float_as_uint(score) + 1;
    }
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        top = g < group ? fmaxf(top, x[g] - lse[g]) : top;
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        sum += g < group ? expf(x[g] - lse[g] - top) : 0.0f;
    }
    return key_of_log(top + logf(sum));
}

static __device__ __forceinline__ float centre_of_v(const scan_args & a, int j) {
    return 0.5f*(float) ((1 << a.v[j/16][0].bits) - 1);
}

// Value e of V with these components: what they are beside the mean, over `weight`
static __device__ __forceinline__ float decoded_v(const scan_args & a, int h_kv, const float * components, float scale, float centres, int e) {
    const float    * mean = a.basis + (int64_t) (h_kv + 1)*a.basis_size - (int64_t) (1 + a.n_v + a.n_v/2)*a.d_v;
    const uint32_t * dec  = (const uint32_t *) (mean + (int64_t) (1 + a.n_v)*a.d_v); // of two values in F16
    float y = mean[e];
#pragma unroll 16
    for (int j = 0; j < a.n_v; ++j) {
        const float2 pair = f16x2_to_f32(dec[((int64_t) j*a.d_v + e)/2]);
        y = fmaf(components[j]*scale - centres*centre_of_v(a, j), e % 2 ? pair.y : pair.x, y);
    }
    return y;
}

} // namespace sfi_cuda
