#include "sketch-kernels.h"

#include "sketch-simd.h"

#include <algorithm>
#include <cmath>

namespace sfi {
namespace scan {

namespace {

constexpr int ahead_bytes = 8192; // of prefetching codes

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
SFI_INLINE void add_plane(typename B::Q (* q)[M], const typename B::P * plane, const projected * p, const sketch_layout & l, int i) {
    const int first = l.k_first[i];
    switch (l.k_kind[i]) {
        case sketch_layout::kind(2, 0): add_fields<B, N, M, 0, 2, 0>(q, plane, p, first); break;
        case sketch_layout::kind(1, 2): add_fields<B, N, M, 0, 1, 2>(q, plane, p, first); break;
        case sketch_layout::kind(1, 1): add_fields<B, N, M, 0, 1, 1>(q, plane, p, first); break;
        case sketch_layout::kind(1, 0): add_fields<B, N, M, 0, 1, 0>(q, plane, p, first); break;
        case sketch_layout::kind(0, 4): add_fields<B, N, M, 0, 0, 4>(q, plane, p, first); break;
        case sketch_layout::kind(0, 3): add_fields<B, N, M, 0, 0, 3>(q, plane, p, first); break;
        case sketch_layout::kind(0, 2): add_fields<B, N, M, 0, 0, 2>(q, plane, p, first); break;
        case sketch_layout::kind(0, 1): add_fields<B, N, M, 0, 0, 1>(q, plane, p, first); break;
        default:                             add_fields<B, N, M, 0, 0, 0>(q, plane, p, first); break;
    }
}

template <class F>
SFI_INLINE float sum_lanes(typename F::V x) {
    float lanes[F::W], sum = 0.0f;
    F::store(lanes, x);
    for (int i = 0; i < F::W; ++i) {
        sum += lanes[i];
    }
    return sum;
}

// A sum of many vectors. One lane alone would round every term off a sum that is a thousand times as large: it takes double.
template <class F> struct long_sum {
    typename F::V v = F::zero();
    SFI_INLINE void  add(typename F::V x)        { v = F::add(v, x); }
    SFI_INLINE void  add_all(const long_sum & o) { add(o.v); }
    SFI_INLINE float total() const               { return sum_lanes<F>(v); }
};
template <> struct long_sum<scalar> {
    double v = 0.0;
    SFI_INLINE void  add(float x)                { v += x; }
    SFI_INLINE void  add_all(const long_sum & o) { v += o.v; }
    SFI_INLINE float total() const               { return (float) v; }
};

// what is summed up while logits are at hand: nothing ...
struct no_sums {
    template <class V> SFI_INLINE void add(int, V) {}
};

// ... or powers of them, and the largest
template <class F, int N>
struct power_sums {
    typename F::V shift[N], most[N];
    long_sum<F>   sum[N];

    SFI_INLINE void add(int h, typename F::V x) {
        most[h] = F::max(most[h], x);
        sum[h].add(F::exp2(F::add(x, shift[h])));
    }
};

template <class B, int N, int M, class S>
SFI_INLINE void some_logits(const sketch_layout & l, const uint8_t * block, const projected * p, float * t, int64_t ld, S & sums) {
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
    for (int64_t i = 0; i < M*l.block_bytes(); i += sketch_plane) {
        prefetch(block + ahead_bytes + i);
    }
    for (int i = 0; i < l.first_planes; ++i) {
        typename B::P plane[M];
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            plane[m] = B::load(block + m*l.block_bytes() + i*sketch_plane);
        }
        add_plane<B, N, M>(q, plane, p, l, i);
        if (B::narrow && (i % 4 == 3 || i + 1 == l.first_planes)) {
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
            for (int i = 0; i < sketch_cells/F::W; ++i) {
                const typename F::V x = F::fma(F::set1(p[h].factor), B::to_float(sum[h][m], i), F::set1(p[h].base));
                F::store(t + h*ld + m*sketch_cells + i*F::W, x);
                sums.add(h, x);
            }
        }
    }
}

template <class B, int N, class S>
SFI_INLINE void all_logits(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld, S & sums) {
    const int n_blocks = n/sketch_cells;
    int b = 0;
    for (; b + B::M <= n_blocks; b += B::M) {
        some_logits<B, N, B::M>(l, block + b*l.block_bytes(), p, t + b*sketch_cells, ld, sums);
    }
    for (; b < n_blocks; ++b) {
        some_logits<B, N, 1>(l, block + b*l.block_bytes(), p, t + b*sketch_cells, ld, sums);
    }
}

template <class B, int N>
void run_logits(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld) {
    no_sums none;
    all_logits<B, N>(l, block, n, p, t, ld, none);
}

template <class B, int N>
void run_summed(const sketch_layout & l, const uint8_t * block, int n, const projected * p, float * t, int64_t ld, powers * out) {
    using F = typename B::F;
    power_sums<F, N> sums;
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        sums.shift[h] = F::set1(-p[h].most);
        sums.most[h]  = F::set1(-INFINITY);
    }
    all_logits<B, N>(l, block, n, p, t, ld, sums);
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        out[h] = { F::hmax(sums.most[h]), sums.sum[h].total() };
    }
}

// By value, and the bounds in registers: what is written might be any of these, as far as the compiler knows.
template <class B, int N> // 0: any number of heads
SFI_INLINE int64_t filter_heads(const filtered from, int64_t n, int any, const float * bound, float threshold, int32_t offset, const filtered to) {
    using F = typename B::F;
    const int n_heads = N ? N : any;
    typename F::V less[N ? N : 1];
    for (int h = 0; h < N; ++h) {
        less[h] = F::set1(-bound[h]);
    }
    const auto above = [&](int h, int64_t i) { return F::add(F::load(from.t + h*from.ld + i), N ? less[h] : F::set1(-bound[h])); };
    const typename F::V limit = F::set1(threshold);
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += F::W) {
        typename F::V most = above(0, i);
        for (int h = 1; h < n_heads; ++h) {
            most = F::max(most, above(h, i));
        }
        const uint32_t lanes = n - i < F::W ? (1u << (n - i)) - 1 : UINT32_MAX;
        const uint32_t hits  = F::ge(most, limit) & lanes;
        if (hits == 0) { // most vectors, where there are many cells
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

template <class B>
int64_t filter(const filtered & from, int64_t n, int n_heads, const float * bound, float threshold, int32_t offset, const filtered & to) {
    switch (n_heads) {
        case 1:  return filter_heads<B, 1>(from, n, n_heads, bound, threshold, offset, to);
        case 2:  return filter_heads<B, 2>(from, n, n_heads, bound, threshold, offset, to);
        case 3:  return filter_heads<B, 3>(from, n, n_heads, bound, threshold, offset, to);
        case 4:  return filter_heads<B, 4>(from, n, n_heads, bound, threshold, offset, to);
        default: return filter_heads<B, 0>(from, n, n_heads, bound, threshold, offset, to);
    }
}

// single cells, whose weights are rows of w [N, ld]
template <class B, int N, int bits>
SFI_INLINE void add_cells(const uint8_t * codes, int64_t record_bytes, const int32_t * cell, int64_t n, const float * w, int64_t ld, float * out) {
    using F = typename B::F;
    constexpr int n_vectors = sketch_cells/F::W;
    typename F::V sum[N][n_vectors];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int v = 0; v < n_vectors; ++v) {
            sum[h][v] = F::zero();
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t * at = codes + cell[i]*record_bytes;
        SFI_UNROLL
        for (int v = 0; v < n_vectors; ++v) {
            const typename F::V code = B::template codes_of_record<bits>(at, v);
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
            F::store(out + h*sketch_cells + v*F::W, sum[h][v]);
        }
    }
}

template <class B, int N>
void cells_codes(const sketch_layout & l, int group, const uint8_t * records, const int32_t * cell, int64_t n, const float * w, int64_t ld,
                 float * out) {
    const uint8_t * codes = records + l.record_v(16*group);
    if (l.v_mask(16*group) == 15) {
        add_cells<B, N, 4>(codes, l.record_bytes, cell, n, w, ld, out);
    } else {
        add_cells<B, N, 2>(codes, l.record_bytes, cell, n, w, ld, out);
    }
}

// 16 cells: each further plane is gathered from their records
template <class B, int N>
SFI_INLINE void look_again(const sketch_layout & l, const uint8_t * records, const int32_t * cell, const projected * p, float * t, int64_t ld) {
    using F = typename B::F;
    typename B::A sum[N][1];
    typename B::Q q[N][1];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        sum[h][0] = B::zero();
        q[h][0]   = B::zero_q();
    }
    const auto offsets = B::offsets(cell, l.record_bytes);
    for (int i = l.first_planes; i < l.k_planes; ++i) {
        const typename B::P plane[1] = { B::gather(records + l.record_k(i), offsets) };
        add_plane<B, N, 1>(q, plane, p, l, i);
        if (B::narrow || i + 1 == l.k_planes) {
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                B::flush(sum[h][0], q[h][0]);
            }
        }
    }
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        SFI_UNROLL
        for (int i = 0; i < sketch_cells/F::W; ++i) {
            float * to = t + h*ld + i*F::W;
            F::store(to, F::fma(F::set1(p[h].factor), B::to_float(sum[h][0], i), F::add(F::load(to), F::set1(p[h].again))));
        }
    }
}

template <class B, int N>
void cells_again(const sketch_layout & l, const uint8_t * records, const int32_t * cell, int64_t n, const projected * p, float * t, int64_t ld) {
    for (int64_t i = 0; i < n; i += sketch_cells) {
        for (int j = 0; j < sketch_cells && i + ahead_cells < n; ++j) {
            prefetch_record(records + (int64_t) cell[i + ahead_cells + j]*l.record_bytes, l.record_bytes);
        }
        look_again<B, N>(l, records, cell + i, p, t + i, ld);
    }
}

template <class B>
float shares(const float * t, int64_t n, float log2_sum, float * out) {
    using F = typename B::F;
    const typename F::V shift = F::set1(-log2_sum);
    long_sum<F> sum;
    for (int64_t i = 0; i < n; i += F::W) {
        const typename F::V x = F::exp2(F::add(F::load(t + i), shift));
        F::store(out + i, x);
        sum.add(x);
    }
    return sum.total();
}

template <class F>
SFI_INLINE float largest(const float * t, int64_t n) {
    typename F::V most = F::load(t);
    for (int64_t i = F::W; i < n; i += F::W) {
        most = F::max(most, F::load(t + i));
    }
    return F::hmax(most);
}

template <class B>
powers powers_of(const float * t, int64_t n) {
    using F = typename B::F;
    const float top = largest<F>(t, n);
    if (top == -INFINITY) {
        return { top, 0.0f };
    }
    const typename F::V shift = F::set1(-top);
    long_sum<F> sum[2];
    int64_t i = 0;
    for (; i + 2*F::W <= n; i += 2*F::W) {
        sum[0].add(F::exp2(F::add(F::load(t + i), shift)));
        sum[1].add(F::exp2(F::add(F::load(t + i + F::W), shift)));
    }
    if (i < n) {
        sum[0].add(F::exp2(F::add(F::load(t + i), shift)));
    }
    sum[0].add_all(sum[1]);
    return { top, sum[0].total() };
}

template <class B>
powers weights_of(const float * t, int64_t n, float * out) {
    const float top = largest<typename B::F>(t, n);
    if (top == -INFINITY) {
        std::fill(out, out + n, 0.0f);
        return { top, 0.0f };
    }
    return { top, shares<B>(t, n, top, out) };
}

template <class B> kernels kernels_of() {
    return {
        { run_logits<B, 1>, run_logits<B, 2>, run_logits<B, 3>, run_logits<B, 4> },
        { run_summed<B, 1>, run_summed<B, 2>, run_summed<B, 3>, run_summed<B, 4> },
        { cells_codes<B, 1>, cells_codes<B, 2>, cells_codes<B, 3>, cells_codes<B, 4> },
        { cells_again<B, 1>, cells_again<B, 2>, cells_again<B, 3>, cells_again<B, 4> },
        filter<B>, shares<B>, powers_of<B>, weights_of<B>,
    };
}

} // namespace

kernels kernels_for(simd path) {
    switch (path) {
#if defined(SFI_AVX512)
        case simd::avx512: return kernels_of<bytes_avx512>();
#endif
#if defined(SFI_AVX2)
        case simd::avx2:   return kernels_of<bytes_avx2>();
#endif
#if defined(SFI_NEON)
        case simd::neon:   return kernels_of<bytes_neon>();
#endif
        default:                return kernels_of<bytes_scalar>();
    }
}

} // namespace scan
} // namespace sfi
