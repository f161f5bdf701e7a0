#include "attn-tile.h"

namespace sfi {

static SFI_INLINE void prefetch_next(const row_set & rows, int i) {
    if (i < rows.n_next) {
        const char * p = rows.next[i] + rows.next_offset;
        for (size_t b = 0; b < rows.next_size; b += 64) {
            prefetch(p + b);
        }
    }
}

// N query rows against 4 cells: N*4 accumulators, each K vector is loaded and converted once
template <class S, ggml_type T, int N>
static inline void dot_4(const float * q, int n_embd, const char * const * k_rows, size_t offset, float * out, int ld) {
    typename S::V acc[N][4];
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        SFI_UNROLL
        for (int c = 0; c < 4; ++c) {
            acc[g][c] = S::zero();
        }
    }
    for (int d = 0; d < n_embd; d += S::W) {
        typename S::V x[N];
        SFI_UNROLL
        for (int g = 0; g < N; ++g) {
            x[g] = S::load(q + g*n_embd + d);
            SFI_PIN(x[g]);
        }
        SFI_UNROLL
        for (int c = 0; c < 4; ++c) {
            typename S::V k = row<S, T>::load(k_rows[c] + offset, d);
            SFI_PIN(k);
            SFI_UNROLL
            for (int g = 0; g < N; ++g) {
                acc[g][c] = S::fma(x[g], k, acc[g][c]);
            }
        }
    }
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        S::sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3], out + g*ld);
    }
}

template <class S, ggml_type T, int N>
static inline void dot_rows(const float * q, int n_embd, const row_set & rows, bool first, float * out, int ld) {
    int c = 0;
    for (; c + 4 <= rows.n; c += 4) {
        for (int i = c; first && i < c + 4; ++i) {
            prefetch_next(rows, i);
        }
        dot_4<S, T, N>(q, n_embd, rows.start + c, rows.offset, out + c, ld);
    }
    if (c < rows.n) {
        const char * last[4];
        for (int i = 0; i < 4; ++i) {
            last[i] = rows.start[c + i < rows.n ? c + i : rows.n - 1];
        }
        float tmp[N*4];
        dot_4<S, T, N>(q, n_embd, last, rows.offset, tmp, 4);
        SFI_UNROLL
        for (int g = 0; g < N; ++g) {
            for (int i = 0; c + i < rows.n; ++i) {
                out[g*ld + c + i] = tmp[g*4 + i];
            }
        }
        c = rows.n;
    }
    for (; first && c < rows.n_next; ++c) {
        prefetch_next(rows, c);
    }
}

template <class S, ggml_type T>
static void dot(const float * q, int n_q, int n_embd, const row_set & rows, float * out, int ld) {
    for (int g = 0; g < n_q; ) {
        const float * qg = q + g*n_embd;
        float * og = out + g*ld;
        const bool first = g == 0;
        switch (n_q - g < S::NG ? n_q - g : S::NG) {
            case 1:  dot_rows<S, T, 1>                  (qg, n_embd, rows, first, og, ld); g += 1; break;
            case 2:  dot_rows<S, T, S::NG >= 2 ? 2 : 1> (qg, n_embd, rows, first, og, ld); g += 2; break;
            case 3:  dot_rows<S, T, S::NG >= 3 ? 3 : 1> (qg, n_embd, rows, first, og, ld); g += 3; break;
            default: dot_rows<S, T, S::NG >= 4 ? 4 : 1> (qg, n_embd, rows, first, og, ld); g += 4; break;
        }
    }
}

// N output rows, M vectors of them: N*M accumulators over all cells of the tile
template <class S, ggml_type T, int N, int M>
static inline void mad_block(const float * p, int ld, int d, const row_set & rows, bool first, float * o, int64_t ld_o) {
    typename S::V acc[N][M];
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            acc[g][m] = S::load(o + g*ld_o + d + m*S::W);
        }
    }
    for (int c = 0; c < rows.n; ++c) {
        const char * v_row = rows.start[c] + rows.offset;
        if (first) {
            prefetch_next(rows, c);
        }
        typename S::V w[N];
        SFI_UNROLL
        for (int g = 0; g < N; ++g) {
            w[g] = S::set1(p[g*ld + c]);
            SFI_PIN(w[g]);
        }
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            typename S::V v = row<S, T>::load(v_row, d + m*S::W);
            SFI_PIN(v);
            SFI_UNROLL
            for (int g = 0; g < N; ++g) {
                acc[g][m] = S::fma(w[g], v, acc[g][m]);
            }
        }
    }
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            S::store(o + g*ld_o + d + m*S::W, acc[g][m]);
        }
    }
}

template <class S, ggml_type T, int N>
static inline void mad_rows(const float * p, int ld, int n_embd, const row_set & rows, bool first, float * o, int64_t ld_o) {
    int d = 0;
    for (; d + 4*S::W <= n_embd; d += 4*S::W) {
        mad_block<S, T, N, 4>(p, ld, d, rows, first && d == 0, o, ld_o);
    }
    for (; d < n_embd; d += S::W) {
        mad_block<S, T, N, 1>(p, ld, d, rows, first && d == 0, o, ld_o);
    }
}

template <class S, ggml_type T>
static void mad(const float * p, int ld, int n_q, int n_embd, const row_set & rows, float * o, int64_t ld_o) {
    for (int g = 0; g < n_q; ) {
        const float * pg = p + g*ld;
        float * og = o + g*ld_o;
        const bool first = g == 0;
        switch (n_q - g < S::NG ? n_q - g : S::NG) {
            case 1:  mad_rows<S, T, 1>                  (pg, ld, n_embd, rows, first, og, ld_o); g += 1; break;
            case 2:  mad_rows<S, T, S::NG >= 2 ? 2 : 1> (pg, ld, n_embd, rows, first, og, ld_o); g += 2; break;
            case 3:  mad_rows<S, T, S::NG >= 3 ? 3 : 1> (pg, ld, n_embd, rows, first, og, ld_o); g += 3; break;
            default: mad_rows<S, T, S::NG >= 4 ? 4 : 1> (pg, ld, n_embd, rows, first, og, ld_o); g += 4; break;
        }
    }
    for (int c = rows.n; c < rows.n_next; ++c) {
        prefetch_next(rows, c);
    }
}

template <class S>
static float exp_sum(float * x, int n, float max) {
    const typename S::V shift = S::set1(-max);
    typename S::V sum = S::zero();
    for (int i = 0; i < n; i += S::W) {
        const typename S::V y = S::exp(S::add(S::load(x + i), shift));
        S::store(x + i, y);
        sum = S::add(sum, y);
    }
    float out[4];
    S::sum4(sum, S::zero(), S::zero(), S::zero(), out);
    return out[0];
}

template <class S>
static float max_of(const float * x, int n) {
    typename S::V max = S::load(x);
    for (int i = S::W; i < n; i += S::W) {
        max = S::max(max, S::load(x + i));
    }
    return S::hmax(max);
}

template <class S, ggml_type T>
static void transpose(int n_embd, const row_set & rows, float * out, int ld, float * scratch) {
    for (int c0 = 0; c0 < rows.n; c0 += S::W) {
        for (int c = 0; c < S::W; ++c) {
            float * to = scratch + c*n_embd;
            if (c0 + c >= rows.n) {
                memset(to, 0, n_embd*sizeof(float));
                continue;
            }
            prefetch_next(rows, c0 + c);
            for (int d = 0; d < n_embd; d += S::W) {
                S::store(to + d, row<S, T>::load(rows.start[c0 + c] + rows.offset, d));
            }
        }
        for (int d = 0; d < n_embd; d += S::W) {
            S::transpose(scratch + d, n_embd, out + d*ld + c0, ld);
        }
    }
}

template <class S, int N, int M>
static inline void gemm_block(const float * q, int n_embd, const float * kt, int ld_kt, float * out, int64_t ld) {
    typename S::V acc[N][M];
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            acc[g][m] = S::zero();
        }
    }
    for (int d = 0; d < n_embd; ++d) {
        typename S::V k[M];
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            k[m] = S::load(kt + d*ld_kt + m*S::W);
            SFI_PIN(k[m]);
        }
        SFI_UNROLL
        for (int g = 0; g < N; ++g) {
            const typename S::V x = S::set1(q[g*n_embd + d]);
            SFI_UNROLL
            for (int m = 0; m < M; ++m) {
                acc[g][m] = S::fma(x, k[m], acc[g][m]);
            }
        }
    }
    SFI_UNROLL
    for (int g = 0; g < N; ++g) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            S::store(out + g*ld + m*S::W, acc[g][m]);
        }
    }
}

template <class S>
static void gemm(const float * q, int n_q, int n_embd, const float * kt, int ld_kt, int n, float * out, int64_t ld) {
    constexpr int N = S::NG >= 4 ? 4 : 2;
    constexpr int M = S::NG >= 4 ? 4 : 3;
    int g = 0;
    for (; g + N <= n_q; g += N) {
        int c = 0;
        for (; c + M*S::W <= n; c += M*S::W) {
            gemm_block<S, N, M>(q + g*n_embd, n_embd, kt + c, ld_kt, out + g*ld + c, ld);
        }
        for (; c < n; c += S::W) {
            gemm_block<S, N, 1>(q + g*n_embd, n_embd, kt + c, ld_kt, out + g*ld + c, ld);
        }
    }
    for (; g < n_q; ++g) {
        for (int c = 0; c < n; c += S::W) {
            gemm_block<S, 1, 1>(q + g*n_embd, n_embd, kt + c, ld_kt, out + g*ld + c, ld);
        }
    }
}

template <class S>
static tile_ops ops_of(ggml_type type_k, ggml_type type_v) {
    tile_ops ops = { nullptr, nullptr, exp_sum<S>, max_of<S>, nullptr, gemm<S> };
    switch (type_k) {
        case GGML_TYPE_F32:  ops.dot = dot<S, GGML_TYPE_F32>;  ops.transpose = transpose<S, GGML_TYPE_F32>;  break;
        case GGML_TYPE_F16:  ops.dot = dot<S, GGML_TYPE_F16>;  ops.transpose = transpose<S, GGML_TYPE_F16>;  break;
        case GGML_TYPE_BF16: ops.dot = dot<S, GGML_TYPE_BF16>; ops.transpose = transpose<S, GGML_TYPE_BF16>; break;
        case GGML_TYPE_Q8_0: ops.dot = dot<S, GGML_TYPE_Q8_0>; ops.transpose = transpose<S, GGML_TYPE_Q8_0>; break;
        case GGML_TYPE_Q4_0: ops.dot = dot<S, GGML_TYPE_Q4_0>; ops.transpose = transpose<S, GGML_TYPE_Q4_0>; break;
        default: break;
    }
    switch (type_v) {
        case GGML_TYPE_F32:  ops.mad = mad<S, GGML_TYPE_F32>;  break;
        case GGML_TYPE_F16:  ops.mad = mad<S, GGML_TYPE_F16>;  break;
        case GGML_TYPE_BF16: ops.mad = mad<S, GGML_TYPE_BF16>; break;
        case GGML_TYPE_Q8_0: ops.mad = mad<S, GGML_TYPE_Q8_0>; break;
        case GGML_TYPE_Q4_0: ops.mad = mad<S, GGML_TYPE_Q4_0>; break;
        default: break;
    }
    return ops;
}

bool tile_ops_supported(ggml_type type) {
    return ops_of<scalar>(type, GGML_TYPE_F32).dot != nullptr;
}

tile_ops tile_ops_for(ggml_type type_k, ggml_type type_v, bool reference) {
    switch (simd_for(reference)) {
#if defined(SFI_AVX512)
        case simd::avx512: return ops_of<avx512>(type_k, type_v);
#endif
#if defined(SFI_AVX2)
        case simd::avx2:   return ops_of<avx2>(type_k, type_v);
#endif
#if defined(SFI_NEON)
        case simd::neon:   return ops_of<neon>(type_k, type_v);
#endif
        default:           return ops_of<scalar>(type_k, type_v);
    }
}

} // namespace sfi
