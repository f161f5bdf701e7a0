// GGML_OP_SKETCH_SCAN on the CPU: every code is read once, and what is computed from it stays in the first-level cache.
//
// Cells are taken in runs of 256, and a few runs make a chunk, which is what a thread takes. Logits are kept as base-2
// logarithms. The weights of a run are integers, relative to a power of two that is not below the largest of them, so sums
// over the codes are exact, and sums of different runs are put together without rounding a factor. Nothing depends on
// how chunks are shared out.
//
//   pass 1  project the queries of a group onto the basis, as 8-bit weights
//   pass 2  per run: logits, weights, sums over the value codes, and the cells that may turn out to be selected
//   pass 3  per KV head: the log-sum-exps, by them the selected cells, which are taken out of the sums again; decode once
//
// A cell is a candidate while its share of what this thread has seen of its head is large enough: that can only fall.

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sketch-simd.h"
#include "top-k.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

namespace {

using sfi::exp_constants::log2e;

constexpr int     run_cells   = 256;
constexpr int64_t chunk_cells = 4*run_cells;
constexpr int64_t span_chunks = 8;        // that a thread scans before it looks for candidates in them: they fit the second-level cache
constexpr int64_t ld_t        = span_chunks*chunk_cells + 80; // rows of logits, not a power of two apart
constexpr int     ahead_bytes = 8192;     // of prefetching codes
constexpr int     max_heads   = 4;        // of a kernel
constexpr float   log2_one    = 21.9999f; // a weight of 1 as an integer: 256 of them fit 31 bits, and 1/64 of it 16 bits
constexpr float   ln2         = 0.693147181f;
constexpr float   log2_no_tail = -20.0f;  // a share below which the tail is nothing but rounding errors

// A query against the codes: log2 of exp(logit) = base + factor * sum_j w_j code_j.
struct projected {
    int8_t w[sfi::sketch_max_components];
    float  factor, base;
};

struct run_sum {
    float   top;
    int32_t weight, of_v;
};

// For n cells, a multiple of 16; logits in rows of ld_t, weights in rows of 4*run_cells:
using logits_fn = void (*)(const sfi::sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t);
// integers 2^(t - top + log2_one), 1/64 of them, rounded, as split() writes these, and the sums of both
using weigh_fn  = void (*)(const float * t, int n, uint8_t * weights, run_sum & sum);
// sums over a group of value codes, less centre_j, times the smaller integers, to rows of out [n_heads, n_v]
using codes_fn  = void (*)(const sfi::sketch_layout & l, int group, const uint8_t * block, int n, const uint8_t * weights, const run_sum * sum,
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
// the same sums over single cells, times rows of w [n_heads, ld]
using cells_fn  = void (*)(const sfi::sketch_layout & l, int group, const uint8_t * codes, const int32_t * cell, int64_t n, const float * w, int64_t ld,
                           float * out);
// out = 2^(t + shift), rounded to integers as in weigh; n padded to a vector
using exp2_fn   = void (*)(const float * t, const float * shift, int64_t n, float * out);

struct kernels {
    logits_fn logits[max_heads];
    codes_fn  codes [max_heads];
    cells_fn  cells [max_heads];
    weigh_fn  weigh;
    filter_fn filter;
    exp2_fn   exp2;
};

// M blocks of codes against N queries: the fields of one plane from the bit `shift` on, of which n4 have 4 bits, then n2 have
// 2, then the rest 1. A shift that the compiler knows is cheaper than one it does not.
template <class B, int N, int M, int shift, int n4, int n2>
SFI_INLINE void add_fields(typename B::Q (* q)[M], const typename B::P * plane, const projected * p, int field) {
    if constexpr (shift < 8) {
        constexpr int bits = n4 > 0 ? 4 : n2 > 0 ? 2 : 1;
        typename B::P codes[M];
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            codes[m] = B::template field<shift, (1 << bits) - 1>(plane[m]);
        }
        SFI_UNROLL
        for (int h = 0; h < N; ++h) {
            int32_t w;
            memcpy(&w, p[h].w + 4*field, sizeof(w));
            SFI_UNROLL
            for (int m = 0; m < M; ++m) {
                q[h][m] = B::dot(q[h][m], codes[m], w);
            }
        }
        add_fields<B, N, M, shift + bits, n4 - (bits == 4), n2 - (bits == 2)>(q, plane, p, field + 1);
    }
}

template <class B, int N, int M>
SFI_INLINE void add_plane(typename B::Q (* q)[M], const typename B::P * plane, const projected * p, const sfi::sketch_layout & l, int i) {
    const int first = l.k_first[i];
    switch (l.k_kind[i]) {
        case sfi::sketch_layout::kind(2, 0): add_fields<B, N, M, 0, 2, 0>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(1, 2): add_fields<B, N, M, 0, 1, 2>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(1, 1): add_fields<B, N, M, 0, 1, 1>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(1, 0): add_fields<B, N, M, 0, 1, 0>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(0, 4): add_fields<B, N, M, 0, 0, 4>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(0, 3): add_fields<B, N, M, 0, 0, 3>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(0, 2): add_fields<B, N, M, 0, 0, 2>(q, plane, p, first); break;
        case sfi::sketch_layout::kind(0, 1): add_fields<B, N, M, 0, 0, 1>(q, plane, p, first); break;
        default:                             add_fields<B, N, M, 0, 0, 0>(q, plane, p, first); break;
    }
}

template <class B, int N, int M>
SFI_INLINE void some_logits(const sfi::sketch_layout & l, const uint8_t * block, const projected * p, float * t) {
    using F = typename B::F;
    typename B::A sum[N][M];
    typename B::Q q[N][M];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            sum[h][m] = B::zero();
            q[h][m]   = B::zero_q();
        }
    }
    for (int64_t i = 0; i < M*l.block_bytes(); i += sfi::sketch_plane) {
        sfi::prefetch(block + ahead_bytes + i);
    }
    for (int i = 0; i < l.k_planes; ++i) {
        typename B::P plane[M];
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            plane[m] = B::load(block + m*l.block_bytes() + i*sfi::sketch_plane);
        }
        add_plane<B, N, M>(q, plane, p, l, i);
        if (B::narrow && (i % 4 == 3 || i + 1 == l.k_planes)) {
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                SFI_UNROLL
                for (int m = 0; m < M; ++m) {
                    B::flush(sum[h][m], q[h][m]);
                }
            }
        }
    }
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            if (!B::narrow) {
                B::flush(sum[h][m], q[h][m]);
            }
            SFI_UNROLL
            for (int i = 0; i < sfi::sketch_cells/F::W; ++i) {
                F::store(t + h*ld_t + m*sfi::sketch_cells + i*F::W,
                         F::fma(F::set1(p[h].factor), B::to_float(sum[h][m], i), F::set1(p[h].base)));
            }
        }
    }
}

template <class B, int N>
void run_logits(const sfi::sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t) {
    const int n_blocks = n/sfi::sketch_cells;
    int b = 0;
    for (; b + B::M <= n_blocks; b += B::M) {
        some_logits<B, N, B::M>(l, block + b*l.block_bytes(), p, t + b*sfi::sketch_cells);
    }
    for (; b < n_blocks; ++b) {
        some_logits<B, N, 1>(l, block + b*l.block_bytes(), p, t + b*sfi::sketch_cells);
    }
}

template <class B>
void weigh(const float * t, int n, uint8_t * weights, run_sum & out) {
    using F = typename B::F;
    typename F::V most[2] = { F::load(t), F::load(t) };
    int c = 0;
    for (; c + 2*F::W <= n; c += 2*F::W) {
        most[0] = F::max(most[0], F::load(t + c));
        most[1] = F::max(most[1], F::load(t + c + F::W));
    }
    if (c < n) {
        most[0] = F::max(most[0], F::load(t + c));
    }
    out = { std::ceil(F::hmax(F::max(most[0], most[1]))), 0, 0 };
    if (out.top == -INFINITY) {
        memset(weights, 0, 4*n);
        return;
    }
    const typename F::V shift = F::set1(log2_one - out.top);
    typename B::I sum = B::zero_i(), sum_v = B::zero_i();
    for (c = 0; c < n; c += F::W) {
        const typename B::I w = B::round(F::exp2(F::add(F::load(t + c), shift))), w_v = B::over_64(w);
        sum   = B::add(sum, w);
        sum_v = B::add(sum_v, w_v);
        B::split(w_v, weights + (F::W == 1 ? c/4*16 + c % 4 : 4*c));
    }
    out.weight = B::sum(sum);
    out.of_v   = B::sum(sum_v);
}

template <class B, int N>
SFI_INLINE void add_values(typename B::Q (* q)[2], const typename B::P & codes, const uint8_t * weights) {
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int i = 0; i < 2; ++i) {
            int32_t four;
            memcpy(&four, weights + h*4*run_cells + 4*i, sizeof(four));
            q[h][i] = B::dot_weights(q[h][i], codes, four);
        }
    }
}

template <class B, int N>
void run_codes(const sfi::sketch_layout & l, int group, const uint8_t * block, int n, const uint8_t * weights, const run_sum * of_run, float * out) {
    using F = typename B::F;
    typename B::A sum[N][2];
    typename B::Q q[N][2];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int i = 0; i < 2; ++i) {
            sum[h][i] = B::zero();
            q[h][i]   = B::zero_q();
        }
    }
    const sfi::sketch_field & first = l.v[group][0];
    block += first.plane*sfi::sketch_plane;
    for (int c = 0; c < n; c += sfi::sketch_cells, block += l.block_bytes(), weights += 4*sfi::sketch_cells) {
        const typename B::P plane = B::load(block);
        if (first.mask == 15) {
            const typename B::P second = B::load(block + sfi::sketch_plane);
            add_values<B, N>(q, B::template field<0, 15>(plane),  weights);
            add_values<B, N>(q, B::template field<4, 15>(plane),  weights + 16);
            add_values<B, N>(q, B::template field<0, 15>(second), weights + 32);
            add_values<B, N>(q, B::template field<4, 15>(second), weights + 48);
        } else {
            add_values<B, N>(q, B::template field<0, 3>(plane), weights);
            add_values<B, N>(q, B::template field<2, 3>(plane), weights + 16);
            add_values<B, N>(q, B::template field<4, 3>(plane), weights + 32);
            add_values<B, N>(q, B::template field<6, 3>(plane), weights + 48);
        }
        if (B::narrow || c + sfi::sketch_cells == n) {
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                SFI_UNROLL
                for (int i = 0; i < 2; ++i) {
                    B::flush(sum[h][i], q[h][i]);
                }
            }
        }
    }
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int i = 0; i < sfi::sketch_cells/F::W; ++i) {
            const typename F::V less = F::set1(-0.5f*(float) first.mask*(float) of_run[h].of_v);
            F::store(out + h*l.n_v + 16*group + i*F::W,
                     F::add(F::fma(B::to_float(sum[h][1], i), F::set1(256.0f), B::to_float(sum[h][0], i)), less));
        }
    }
}

template <class B>
int64_t filter(const filtered & from, int64_t n, int n_heads, const float * bound, float threshold, int32_t offset, const filtered & to) {
    using F = typename B::F;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += F::W) {
        typename F::V most = F::add(F::load(from.t + i), F::set1(-bound[0]));
        for (int h = 1; h < n_heads; ++h) {
            most = F::max(most, F::add(F::load(from.t + h*from.ld + i), F::set1(-bound[h])));
        }
        const uint32_t lanes = n - i < F::W ? (1u << (n - i)) - 1 : UINT32_MAX;
        const uint32_t hits  = F::ge(most, F::set1(threshold)) & lanes;
        if (hits == 0) {
            continue;
        }
        for (int h = 0; h < n_heads; ++h) {
            F::keep(to.t + h*to.ld + m, F::load(from.t + h*from.ld + i), hits);
        }
        if (to.z) {
            F::keep(to.z + m, most, hits);
        }
        m += B::keep(to.cell + m, from.cell + i, offset, hits);
    }
    return m;
}

// single cells, whose weights are rows of w [N, ld]
template <class B, int N>
void cells_codes(const sfi::sketch_layout & l, int group, const uint8_t * codes, const int32_t * cell, int64_t n, const float * w, int64_t ld,
                 float * out) {
    using F = typename B::F;
    constexpr int n_vectors = sfi::sketch_cells/F::W;
    typename F::V sum[N][n_vectors];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int v = 0; v < n_vectors; ++v) {
            sum[h][v] = F::zero();
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const int in_block = cell[i] % sfi::sketch_cells;
        const sfi::sketch_field & field = l.v[group][in_block/4];
        const uint8_t * plane = codes + cell[i]/sfi::sketch_cells*l.block_bytes() + field.plane*sfi::sketch_plane;
        SFI_UNROLL
        for (int v = 0; v < n_vectors; ++v) {
            const typename F::V code = B::codes_of_cell(plane + 4*F::W*v, in_block % 4, field);
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                sum[h][v] = F::fma(F::set1(w[h*ld + i]), code, sum[h][v]);
            }
        }
    }
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int v = 0; v < n_vectors; ++v) {
            F::store(out + h*sfi::sketch_cells + v*F::W, sum[h][v]);
        }
    }
}

template <class B>
void exp2_of(const float * t, const float * shift, int64_t n, float * out) {
    using F = typename B::F;
    for (int64_t i = 0; i < n; i += F::W) {
        F::store(out + i, B::from_int(B::round(F::exp2(F::add(F::load(t + i), F::load(shift + i))))));
    }
}

template <class B> kernels kernels_of() {
    return {
        { run_logits<B, 1>, run_logits<B, 2>, run_logits<B, 3>, run_logits<B, 4> },
        { run_codes <B, 1>, run_codes <B, 2>, run_codes <B, 3>, run_codes <B, 4> },
        { cells_codes<B, 1>, cells_codes<B, 2>, cells_codes<B, 3>, cells_codes<B, 4> },
        weigh<B>, filter<B>, exp2_of<B>,
    };
}

kernels kernels_for(sfi::simd path) {
    switch (path) {
#if defined(SFI_AVX512)
        case sfi::simd::avx512: return kernels_of<sfi::bytes_avx512>();
#endif
#if defined(SFI_AVX2)
        case sfi::simd::avx2:   return kernels_of<sfi::bytes_avx2>();
#endif
#if defined(SFI_NEON)
        case sfi::simd::neon:   return kernels_of<sfi::bytes_neon>();
#endif
        default:                return kernels_of<sfi::bytes_scalar>();
    }
}

// 2^x for an integer x < 128 or -INFINITY
float power_of_two(float x) {
    const uint32_t bits = x < -126.0f ? 0 : (uint32_t) ((int32_t) x + 127) << 23;
    float y;
    memcpy(&y, &bits, sizeof(y));
    return y;
}

// a lower bound of log2(x), x > 0
float floor_log2(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (float) ((int32_t) (bits >> 23 & 255) - 127);
}

// 2^top times: a sum of weights, which is exact, and of 1/64 of them times (code_j - centre_j)
struct partial {
    double  weight = 0.0;
    float   top = -INFINITY;
    int32_t n_v = 0;
    float * v   = nullptr;

    void add(float x_top, double x_weight, const float * x_v) {
        if (x_weight == 0.0) {
            return;
        }
        const float most = std::max(top, x_top);
        const float mine = power_of_two(top - most), theirs = power_of_two(x_top - most);
        top    = most;
        weight = mine*weight + theirs*x_weight;
        for (int j = 0; j < n_v; ++j) {
            v[j] = mine*v[j] + theirs*x_v[j];
        }
    }
    float log2_sum() const { return weight > 0.0 ? top + std::log2((float) weight) - log2_one : -INFINITY; }
};

// rows of work memory, each on cache lines of its own; without memory, only its size
struct arena {
    char * base;
    size_t used;

    template <class T> void take(T *& row, int64_t n) {
        row = base ? (T *) (base + used) : nullptr;
        used += GGML_PAD(n*sizeof(T), 64);
    }
};

struct task {
    const ggml_tensor * dst, * q, * codes, * basis, * skip;
    const float * least; // [n_head_kv] or null
    sfi::sketch_layout l;
    int64_t n_list, n_head, n_head_kv, group, n_selected, n_embd_v;
    int64_t ld;          // n_list, padded to chunks
    float   scale, softcap;

    explicit task(const ggml_tensor * dst) :
            dst(dst), q(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), skip(dst->src[3]), l(dst) {
        least      = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
        n_list     = sfi::sketch_n_list(dst);
        n_head     = q->ne[1];
        n_head_kv  = codes->ne[2];
        group      = n_head/n_head_kv;
        n_selected = dst->src[6]->ne[0];
        n_embd_v   = dst->ne[0] - 1;
        ld         = GGML_PAD(n_list, chunk_cells);
        scale      = ggml_get_op_params_f32(dst, 0);
        softcap    = ggml_get_op_params_f32(dst, 1);
    }

    int32_t * selected_of(int64_t h_kv) const { return (int32_t *) ((char *) dst->src[6]->data + h_kv*dst->src[6]->nb[1]); }
    const uint8_t * codes_of(int64_t h_kv) const { return (const uint8_t *) codes->data + h_kv*codes->nb[2]; }
};

// of all threads
struct shared_rows {
    partial * partials;     // [n_head, ld/chunk_cells]
    float   * sums;         // [n_head, ld/chunk_cells, n_v]: theirs
    float   * run_top;      // [n_head, ld/run_cells]
    int32_t * n_candidates; // [n_head_kv, ld/chunk_cells]
    int32_t * candidate;    // [n_head_kv, ld]: the cells; those of a chunk begin where it does
    float   * candidate_t;  // [n_head, ld]

    shared_rows(const task & a, arena & from) {
        from.take(partials,     a.n_head*a.ld/chunk_cells);
        from.take(sums,         a.n_head*a.ld/chunk_cells*a.l.n_v);
        from.take(run_top,      a.n_head*a.ld/run_cells);
        from.take(n_candidates, a.n_head_kv*a.ld/chunk_cells);
        from.take(candidate,    a.n_head_kv*a.ld);
        from.take(candidate_t,  a.n_head*a.ld);
    }
};

// of one thread
struct own_rows {
    float     * q;             // [group, n_embd_k]
    float     * products;      // [group, n_k + 1, padded]
    projected * p;             // [group]
    partial   * sum;           // [group]: of all chunks, pass 3
    partial   * seen;          // [group]: of all chunks of this KV head so far, without values
    float     * bound, * lse;  // [group]
    float     * t;             // [group, ld_t]: of a span
    uint8_t   * weights;       // [max_heads, 4*run_cells]
    float     * sums;          // [max_heads, n_v]
    float     * v;             // [group, n_v]
    uint16_t  * skipped;       // a bit per cell
    int32_t   * in_run;        // [run_cells]: 0, 1, 2 ...
    // pass 3
    int32_t   * cell;          // [ld]: the candidates that are left
    float     * kept;          // [group, ld]: their logits
    float     * z, * y;        // [ld]
    float     * w;             // [max_heads, ld]
    float     * shift, * scale; // [ld/run_cells]
    uint32_t  * key;           // [ld]

    own_rows(const task & a, arena & from) {
        from.take(q,        a.group*a.q->ne[0]);
        from.take(products, a.group*GGML_PAD(a.l.n_k + 1, sfi::max_vector));
        from.take(p,       a.group);
        from.take(sum,     a.group);
        from.take(seen,    a.group);
        from.take(bound,   a.group);
        from.take(lse,     a.group);
        from.take(t,       a.group*ld_t);
        from.take(weights, max_heads*4*run_cells);
        from.take(sums,    max_heads*a.l.n_v);
        from.take(v,       a.group*a.l.n_v);
        from.take(skipped, a.ld/16);
        from.take(in_run,  run_cells);
        from.take(cell,    a.ld);
        from.take(kept,    a.group*a.ld + sfi::max_vector);
        from.take(w,       max_heads*a.ld);
        from.take(shift,   a.ld/run_cells);
        from.take(scale,   a.ld/run_cells);
        from.take(z,       a.ld);
        from.take(y,       a.ld);
        from.take(key,     a.ld);
    }
};

struct worker {
    const task        & a;
    const kernels       f;
    const shared_rows & all;
    const own_rows      own;
    const sfi::tile_ops ops;
    const int64_t       n_used, n_chunks;

    worker(const task & a, const kernels & f, const shared_rows & all, const own_rows & own, bool use_ref) :
            a(a), f(f), all(all), own(own), ops(sfi::tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, use_ref)),
            n_used(std::clamp<int64_t>(*(const int32_t *) a.dst->src[4]->data, 0, a.n_list)),
            n_chunks((n_used + chunk_cells - 1)/chunk_cells) {}

    partial & partial_of(int64_t h, int64_t chunk) const { return all.partials[h*a.ld/chunk_cells + chunk]; }
    partial   cleared(float * v) const;
    float & run_top(int64_t h, int64_t c) const { return all.run_top[(h*a.ld + c)/run_cells]; }

    void project(int64_t h_kv) const;
    void mark_skipped() const;
    void hide_skipped(int64_t c, int n, float * t) const;
    void scan_run(int64_t h_kv, int64_t c, int n, float * t) const;
    int64_t find_candidates(int64_t h_kv, int64_t c, int n, float * t, int64_t to) const;
    void scan_span(int64_t h_kv, int64_t first, int64_t last) const;
    void scan(int64_t first, int64_t last) const;

    int64_t keep_large(int64_t h_kv) const;
    int64_t keep_best(int64_t n) const;
    void    move(int64_t from, int64_t to) const;
    void    take_out(int64_t h, int n_heads, int64_t n, partial * sum) const;
    void    write(int64_t h, const partial & rest, float log2_all) const;
    void    finish(int64_t h_kv) const;
};

// ---- pass 1 ------------------------------------------------------------------------------------------------------------

void worker::project(int64_t h_kv) const {
    const int n_embd = (int) a.q->ne[0], n_rows = a.l.n_k + 1, ld = GGML_PAD(n_rows, sfi::max_vector);
    for (int64_t g = 0; g < a.group; ++g) {
        memcpy(own.q + g*n_embd, (const char *) a.q->data + (h_kv*a.group + g)*a.q->nb[1], n_embd*sizeof(float));
    }
    const auto basis = sfi::sketch_basis::of_k(a.basis, h_kv, a.l.n_k, n_embd);
    const char * rows[sfi::sketch_max_components + 1];
    for (int j = 0; j < a.l.n_k; ++j) {
        rows[j] = (const char *) (basis.dec + (int64_t) j*n_embd);
    }
    rows[a.l.n_k] = (const char *) basis.mean;
    ops.dot(own.q, (int) a.group, n_embd, { rows, 0, n_rows, nullptr, 0, 0, 0 }, own.products, ld);

    const float unit = a.softcap > 0.0f ? 1.0f : log2e; // a softcap is of the logit itself
    for (int64_t g = 0; g < a.group; ++g) {
        const float * w = own.products + g*ld;
        float largest = 0.0f;
        for (int j = 0; j < a.l.n_k; ++j) {
            largest = std::max(largest, std::fabs(w[j]));
        }
        const float inverse = largest > 0.0f ? 127.0f/largest : 0.0f;
        int centre = 0; // twice the sum over w_j centre_j
        projected & p = own.p[g];
        for (int j = 0; j < a.l.n_k; ++j) {
            p.w[j] = (int8_t) lrintf(w[j]*inverse);
            centre += p.w[j]*a.l.k_mask(j);
        }
        p.factor = unit*a.scale*(largest/127.0f);
        p.base   = unit*a.scale*w[a.l.n_k] - 0.5f*p.factor*(float) centre;
    }
}

void worker::mark_skipped() const {
    std::fill(own.skipped, own.skipped + a.ld/16, (uint16_t) 0);
    const int32_t * skip = (const int32_t *) a.skip->data;
    for (int64_t i = 0; i < a.skip->ne[0]; ++i) {
        if (skip[i] >= 0 && skip[i] < n_used) {
            own.skipped[skip[i]/16] |= (uint16_t) (1u << skip[i] % 16);
        }
    }
    if (n_used % 16 != 0) { // a block is scanned as a whole
        own.skipped[n_used/16] |= (uint16_t) (0xffffu << n_used % 16);
    }
}

// ---- pass 2 ------------------------------------------------------------------------------------------------------------

// of the n cells from c on, whose logits are at t
void worker::hide_skipped(int64_t c, int n, float * t) const {
    for (int b = 0; b < n/16; ++b) {
        for (uint32_t bits = own.skipped[c/16 + b], i = 16*b; bits != 0; bits >>= 1, ++i) {
            for (int64_t g = 0; g < a.group && bits & 1; ++g) {
                t[g*ld_t + i] = -INFINITY;
            }
        }
    }
}

static void cap(float * t, int n, float softcap) {
    for (int i = 0; i < n; ++i) {
        t[i] = log2e*softcap*tanhf(t[i]/softcap);
    }
}

void worker::scan_run(int64_t h_kv, int64_t c, int n, float * t) const {
    const uint8_t * block = a.codes_of(h_kv) + c/sfi::sketch_cells*a.l.block_bytes();
    for (int64_t g = 0; g < a.group; g += max_heads) {
        f.logits[std::min<int64_t>(a.group - g, max_heads) - 1](a.l, block, n, own.p + g, t + g*ld_t);
    }
    for (int64_t g = 0; g < a.group && a.softcap > 0.0f; ++g) {
        cap(t + g*ld_t, n, a.softcap);
    }
    hide_skipped(c, n, t);

    for (int64_t g = 0; g < a.group; g += max_heads) {
        const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
        run_sum sum[max_heads];
        for (int i = 0; i < n_heads; ++i) {
            f.weigh(t + (g + i)*ld_t, n, own.weights + i*4*run_cells, sum[i]);
            run_top(h_kv*a.group + g + i, c) = sum[i].top;
        }
        for (int j = 0; j < a.l.n_v_groups; ++j) {
            f.codes[n_heads - 1](a.l, j, block, n, own.weights, sum, own.sums);
        }
        for (int i = 0; i < n_heads; ++i) {
            partial_of(h_kv*a.group + g + i, c/chunk_cells).add(sum[i].top, sum[i].weight, own.sums + i*a.l.n_v);
            own.seen[g + i].add(sum[i].top, sum[i].weight, nullptr);
        }
    }
}

// Cells of a run whose share of what has been seen of some head is large enough go to candidates `to` and on.
int64_t worker::find_candidates(int64_t h_kv, int64_t c, int n, float * t, int64_t to) const {
    const float log2_least = a.least ? std::log2(a.least[h_kv]) : 0.0f;
    bool any = false;
    for (int64_t g = 0; g < a.group; ++g) {
        const partial & seen = own.seen[g];
        own.bound[g] = -FLT_MAX;
        if (a.least && seen.weight > 0.0) {
            own.bound[g] = std::max(seen.top + floor_log2((float) seen.weight) - log2_one + log2_least - 1e-3f, -FLT_MAX);
        }
        any = any || run_top(h_kv*a.group + g, c) >= own.bound[g];
    }
    if (!any) {
        return 0;
    }
    return f.filter({ own.in_run, t, ld_t, nullptr }, n, (int) a.group, own.bound, 0.0f, (int32_t) c,
                    { all.candidate + h_kv*a.ld + to, all.candidate_t + h_kv*a.group*a.ld + to, a.ld, nullptr });
}

partial worker::cleared(float * v) const {
    partial p;
    p.v   = v;
    p.n_v = a.l.n_v;
    std::fill(v, v + a.l.n_v, 0.0f);
    return p;
}

// Some chunks: first all sums, so that few of their cells seem large enough.
void worker::scan_span(int64_t h_kv, int64_t first, int64_t last) const {
    const int64_t begin = first*chunk_cells, end = std::min(last*chunk_cells, (int64_t) GGML_PAD(n_used, sfi::sketch_cells));
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            partial_of(h, chunk) = cleared(all.sums + (h*a.ld/chunk_cells + chunk)*a.l.n_v);
        }
    }
    for (int64_t c = begin; c < end; c += run_cells) {
        scan_run(h_kv, c, (int) std::min<int64_t>(run_cells, end - c), own.t + c - begin);
    }
    std::fill_n(all.n_candidates + h_kv*a.ld/chunk_cells + first, last - first, 0);
    for (int64_t c = begin; c < end; c += run_cells) {
        const int64_t chunk = c/chunk_cells;
        int32_t & n = all.n_candidates[h_kv*a.ld/chunk_cells + chunk];
        n += (int32_t) find_candidates(h_kv, c, (int) std::min<int64_t>(run_cells, end - c), own.t + c - begin, chunk*chunk_cells + n);
    }
}

// the chunks first .. last of all KV heads'
void worker::scan(int64_t first, int64_t last) const {
    mark_skipped();
    std::iota(own.in_run, own.in_run + run_cells, 0);
    for (int64_t i = first; i < last; ) {
        const int64_t h_kv = i/n_chunks, end = std::min(last, (h_kv + 1)*n_chunks);
        project(h_kv);
        std::fill(own.seen, own.seen + a.group, partial());
        for (; i < end; i = std::min(i + span_chunks, end)) {
            scan_span(h_kv, i % n_chunks, std::min(i + span_chunks, end) - h_kv*n_chunks);
        }
    }
}

// ---- pass 3 ------------------------------------------------------------------------------------------------------------

// The candidates that reach `least`, with the largest log2 of softmax in the group as z; returns how many.
int64_t worker::keep_large(int64_t h_kv) const {
    const float least = a.least ? std::log2(a.least[h_kv]) : -FLT_MAX;
    int64_t n = 0;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const int64_t begin = chunk*chunk_cells;
        n += f.filter({ all.candidate + h_kv*a.ld + begin, all.candidate_t + h_kv*a.group*a.ld + begin, a.ld, nullptr },
                      all.n_candidates[h_kv*a.ld/chunk_cells + chunk], (int) a.group, own.lse, least, 0,
                      { own.cell + n, own.kept + n, a.ld, own.z + n });
    }
    return n;
}

float kth_value(const float * x, int64_t n, int64_t k, uint32_t * key) {
    for (int64_t i = 0; i < n; ++i) {
        key[i] = sfi::sortable(x[i]);
    }
    const sfi::threshold t = sfi::kth_largest_key(key, n, k);
    return sfi::from_sortable(t.n_equal > 0 ? t.key : t.key + 1);
}

// The n_selected best of n. log2 of a cell's score lies between z - log2(group) and z, so with T the n_selected-th largest
// z, those of z < T - log2(group) need not be scored.
int64_t worker::keep_best(int64_t n) const {
    const int64_t k = std::min(a.n_selected, n);
    if (k == n) {
        return n;
    }
    const float least = kth_value(own.z, n, k, own.key), slack = std::log2((float) a.group) + 1e-4f;
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (own.z[i] >= least - slack) {
            move(i, m);
            own.z[m++] = own.z[i];
        }
    }
    for (int64_t i = 0; i < m && a.group > 1; ++i) {
        float score = 0.0f; // over 2^least, lest it underflow
        for (int64_t g = 0; g < a.group; ++g) {
            score += std::exp2(std::min(own.kept[g*a.ld + i] - own.lse[g] - least, 120.0f));
        }
        own.z[i] = score;
    }
    for (int64_t i = 0; i < m; ++i) {
        own.key[i] = sfi::sortable(own.z[i]);
    }
    sfi::threshold best = sfi::kth_largest_key(own.key, m, k);
    int64_t n_out = 0;
    for (int64_t i = 0; n_out < k; ++i) {
        if (own.key[i] > best.key || (own.key[i] == best.key && best.n_equal-- > 0)) {
            move(i, n_out++);
        }
    }
    return k;
}

// what is kept, from one place to an earlier one
void worker::move(int64_t from, int64_t to) const {
    own.cell[to] = own.cell[from];
    for (int64_t g = 0; g < a.group; ++g) {
        own.kept[g*a.ld + to] = own.kept[g*a.ld + from];
    }
}

// Subtract what the n selected cells gave n_heads heads from h on: the same integers again.
void worker::take_out(int64_t h, int n_heads, int64_t n, partial * sum) const {
    const int64_t n_pad = GGML_PAD(n, sfi::max_vector), n_runs = (n_used + run_cells - 1)/run_cells;
    float weight_v[max_heads];
    for (int k = 0; k < n_heads; ++k) {
        for (int64_t run = 0; run < n_runs; ++run) {
            const float top = run_top(h + k, run*run_cells);
            own.shift[run] = log2_one - top;
            own.scale[run] = power_of_two(top - sum[k].top);
        }
        float * w = own.w + k*a.ld;
        for (int64_t i = 0; i < n_pad; ++i) {
            own.y[i] = own.shift[own.cell[i]/run_cells];
        }
        f.exp2(own.kept + ((h + k) % a.group)*a.ld, own.y, n_pad, w);
        std::fill(w + n, w + n_pad, 0.0f);
        double total[16] = {}; // exact, so in any order
        float  of_v [16] = {};
        for (int64_t i = 0; i < n_pad; i += 16) {
            for (int j = 0; j < 16; ++j) {
                const float scale = own.scale[own.cell[i + j]/run_cells];
                total[j] += w[i + j]*scale;
                w[i + j]  = std::floor((w[i + j] + 32.0f)*(1.0f/64.0f))*scale; // as over_64()
                of_v[j]  += w[i + j];
            }
        }
        sum[k].weight -= std::accumulate(total, total + 16, 0.0);
        weight_v[k]    = std::accumulate(of_v, of_v + 16, 0.0f);
    }
    for (int j = 0; j < a.l.n_v_groups; ++j) {
        float out[max_heads*16];
        f.cells[n_heads - 1](a.l, j, a.codes_of(h/a.group), own.cell, n, own.w, a.ld, out);
        const float centre = 0.5f*(float) a.l.v[j][0].mask;
        for (int k = 0; k < n_heads; ++k) {
            for (int d = 0; d < 16; ++d) {
                sum[k].v[16*j + d] -= out[16*k + d] - centre*weight_v[k];
            }
        }
    }
}

void worker::write(int64_t h, const partial & rest, float log2_all) const {
    float * out = (float *) ((char *) a.dst->data + h*a.dst->nb[1]);
    const float log2_rest = rest.log2_sum();
    if (!(log2_rest - log2_all > log2_no_tail)) {
        std::fill(out, out + a.n_embd_v, 0.0f);
        out[a.n_embd_v] = -INFINITY;
        return;
    }
    const auto basis = sfi::sketch_basis::of_v(a.basis, h/a.group, a.l.n_v, a.n_embd_v);
    std::copy(basis.mean, basis.mean + a.n_embd_v, out);
    for (int j = 0; j < a.l.n_v; ++j) {
        const float z = 64.0f*rest.v[j]/(float) rest.weight;
        for (int64_t i = 0; i < a.n_embd_v; ++i) {
            out[i] += z*basis.dec[j*a.n_embd_v + i];
        }
    }
    out[a.n_embd_v] = ln2*log2_rest;
}

void worker::finish(int64_t h_kv) const {
    for (int64_t g = 0; g < a.group; ++g) {
        own.sum[g] = cleared(own.v + g*a.l.n_v);
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
            const partial & x = partial_of(h_kv*a.group + g, chunk);
            own.sum[g].add(x.top, x.weight, x.v);
        }
        own.lse[g] = own.sum[g].log2_sum();
    }
    const int64_t n = keep_best(keep_large(h_kv));
    int32_t * selected = a.selected_of(h_kv);
    std::copy(own.cell, own.cell + n, selected);
    std::fill(own.cell + n, own.cell + GGML_PAD(n, sfi::max_vector), own.cell[0]); // any
    std::fill(selected + n, selected + a.n_selected, -1);
    for (int64_t g = 0; g < a.group && n > 0; g += max_heads) {
        take_out(h_kv*a.group + g, (int) std::min<int64_t>(a.group - g, max_heads), n, own.sum + g);
    }
    for (int64_t g = 0; g < a.group; ++g) {
        write(h_kv*a.group + g, own.sum[g], own.lse[g]);
    }
}

} // namespace

void sfi::sketch_scan(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(dst);
    arena shared = { (char *) params->wdata, 0 };
    const shared_rows all(a, shared);
    arena own = { (char *) params->wdata + shared.used, 0 };
    own_rows(a, own); // for its size
    own = { own.base + params->ith*own.used, 0 };
    const worker w(a, kernels_for(simd_for(params->use_ref)), all, own_rows(a, own), params->use_ref);
    const int64_t ith = params->ith, nth = params->nth, n_items = a.n_head_kv*w.n_chunks;

    w.scan(n_items*ith/nth, n_items*(ith + 1)/nth);
    ggml_barrier(params->threadpool);

    for (int64_t h_kv = ith; h_kv < a.n_head_kv; h_kv += nth) {
        w.finish(h_kv);
    }
}

size_t sfi::sketch_scan_work_size(const ggml_tensor * dst, int n_threads) {
    const task a(dst);
    arena shared = { nullptr, 0 }, own = { nullptr, 0 };
    shared_rows(a, shared);
    own_rows(a, own);
    return shared.used + n_threads*own.used;
}

bool sfi::sketch_scan_supported(const ggml_tensor * dst) {
    return sketch_layout::supported(dst);
}
