#include "attn-block.h"

#include <type_traits>

namespace sfi {

// The shape of a product: N rows times M vectors are held in registers, and with them M vectors of a line and one value.
template <class S> struct shape       { static constexpr int N = 2,  M = 4; }; // scalar
#if defined(SFI_AVX2)
template <> struct shape<avx2>        { static constexpr int N = 6,  M = 2; }; // 12 + 2 + 1 of 16
#endif
#if defined(SFI_AVX512)
template <> struct shape<avx512>      { static constexpr int N = 12, M = 2; }; // 24 + 2 + 1 of 32
#endif
#if defined(SFI_NEON)
template <> struct shape<neon>        { static constexpr int N = 6,  M = 4; }; // 24 + 4 + 1 of 32
#endif

template <class S> constexpr int panel_of = shape<S>::M*S::W;

// acc[r, panel] += sum over i < n of a[r*ld_a + i]*b[i, panel]
template <class S, int N>
static SFI_INLINE void add_products(const float * a, int64_t ld_a, const float * b, int n, typename S::V (&acc)[N][shape<S>::M]) {
    constexpr int M = shape<S>::M;
    for (int i = 0; i < n; ++i) {
        typename S::V x[M];
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            x[m] = S::load(b + (i*M + m)*S::W);
            SFI_PIN(x[m]);
        }
        SFI_UNROLL
        for (int r = 0; r < N; ++r) {
            const typename S::V y = S::set1(a[r*ld_a + i]);
            SFI_UNROLL
            for (int m = 0; m < M; ++m) {
                acc[r][m] = S::fma(y, x[m], acc[r][m]);
            }
        }
    }
}

// Calls run(r, number) for rows r .. r + number of all n, N at a time; what is left over goes in halves of N. The number is a type.
template <int N, class F>
static inline void by_rows(int r, int n, F run) {
    for (; r + N <= n; r += N) {
        run(r, std::integral_constant<int, N>());
    }
    if constexpr (N > 1) {
        if (r < n) {
            by_rows<N/2>(r, n, run);
        }
    }
}

// out[r, panel] = (keep ? out[r, panel]*keep[r] : 0) + sum over i < n of a[r*ld_a + i]*b[i, panel]
template <class S, int N>
static inline void product(const float * a, int64_t ld_a, const float * b, int n, const float * keep, float * out, int64_t ld) {
    constexpr int M = shape<S>::M;
    typename S::V acc[N][M];
    SFI_UNROLL
    for (int r = 0; r < N; ++r) {
        const typename S::V k = S::set1(keep ? keep[r] : 0.0f);
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            acc[r][m] = keep ? S::mul(k, S::load(out + r*ld + m*S::W)) : S::zero();
        }
    }
    add_products<S, N>(a, ld_a, b, n, acc);
    SFI_UNROLL
    for (int r = 0; r < N; ++r) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            S::store(out + r*ld + m*S::W, acc[r][m]);
        }
    }
}

// The same for any number of rows.
template <class S>
static inline void product_rows(const float * a, int64_t ld_a, const float * b, int n, const float * keep, float * out, int64_t ld, int n_rows) {
    by_rows<shape<S>::N>(0, n_rows, [&](int r, auto number) {
        product<S, number>(a + r*ld_a, ld_a, b, n, keep ? keep + r : nullptr, out + r*ld, ld);
    });
}

template <class S>
static void block_dot(const float * q, int n_q, int n_embd, const float * k, int n, float * out, int64_t ld) {
    constexpr int P = panel_of<S>;
    for (int c = 0; c < n; c += P) {
        product_rows<S>(q, n_embd, k + c*n_embd, n_embd, nullptr, out + c, ld, n_q);
    }
}

template <class S>
static void block_mad(const float * p, int64_t ld, int n_q, int n, const float * v, int n_v, int n_embd, const float * keep,
                      float * o, int64_t ld_o) {
    constexpr int P = panel_of<S>;
    for (int d = 0; d < n_embd; d += P) {
        product_rows<S>(p, ld, v + (int64_t) d*n_v, n, keep, o + d, ld_o, n_q);
    }
}

template <class S, ggml_type T>
static void pack_k(int n_embd, const row_set & rows, float * out, float * scratch) {
    constexpr int P = panel_of<S>;
    for (int c0 = 0; c0 < (int) GGML_PAD(rows.n, P); c0 += S::W) {
        for (int c = 0; c < S::W; ++c) {
            float * to = scratch + c*n_embd;
            if (c0 + c >= rows.n) {
                memset(to, 0, n_embd*sizeof(float));
                continue;
            }
            for (int d = 0; d < n_embd; d += S::W) {
                S::store(to + d, row<S, T>::load(rows.start[c0 + c] + rows.offset, d));
            }
        }
        float * panel = out + (c0/P)*P*n_embd + c0 % P;
        for (int d = 0; d < n_embd; d += S::W) {
            S::transpose(scratch + d, n_embd, panel + d*P, P);
        }
    }
}

template <class S, ggml_type T>
static void pack_v(int n_embd, const row_set & rows, float * out) {
    constexpr int P = panel_of<S>;
    for (int c = 0; c < rows.n; ++c) {
        for (int d = 0; d < (int) GGML_PAD(n_embd, P); d += S::W) {
            float * to = out + (d/P)*P*rows.n + c*P + d % P;
            S::store(to, d < n_embd ? row<S, T>::load(rows.start[c] + rows.offset, d) : S::zero());
        }
    }
}

template <class S>
static float weigh(float * x, int n, float * max, float * sum) {
    typename S::V most = S::load(x);
    for (int i = S::W; i < n; i += S::W) {
        most = S::max(most, S::load(x + i));
    }
    const float before = *max, now = before > S::hmax(most) ? before : S::hmax(most);
    if (now == -INFINITY) {
        memset(x, 0, n*sizeof(float));
        return 1.0f;
    }
    const typename S::V shift = S::set1(-now);
    typename S::V total = S::zero();
    for (int i = 0; i < n; i += S::W) {
        const typename S::V y = S::exp2(S::add(S::load(x + i), shift));
        S::store(x + i, y);
        total = S::add(total, y);
    }
    float added[4];
    S::sum4(total, S::zero(), S::zero(), S::zero(), added);
    const float keep = before == now ? 1.0f : std::exp2(before - now);
    *max = now;
    *sum = *sum*keep + added[0];
    return keep;
}

// So many rows at a time that beside their sums of products those of weights fit into registers.
template <class S> constexpr int mass_rows = shape<S>::N > 4 ? shape<S>::N*2/3 : shape<S>::N;

template <class S, int N>
static inline void rough_mass(const float * q, int n_embd, const float * k, int n, const float * shift, float * out, int64_t ld) {
    constexpr int M = shape<S>::M;
    typename S::V total[N];
    SFI_UNROLL
    for (int r = 0; r < N; ++r) {
        total[r] = S::zero();
    }
    for (int c = 0; c < n; c += panel_of<S>) {
        typename S::V acc[N][M];
        SFI_UNROLL
        for (int r = 0; r < N; ++r) {
            SFI_UNROLL
            for (int m = 0; m < M; ++m) {
                acc[r][m] = S::set1(-shift[r]);
            }
        }
        add_products<S, N>(q, n_embd, k + c*n_embd, n_embd, acc);
        SFI_UNROLL
        for (int r = 0; r < N; ++r) {
            SFI_UNROLL
            for (int m = 0; m < M; ++m) {
                total[r] = S::add(total[r], S::rough_exp2(acc[r][m]));
            }
        }
    }
    for (int r = 0; r < N; ++r) {
        float sum[4];
        S::sum4(total[r], S::zero(), S::zero(), S::zero(), sum);
        out[r*ld] = sum[0];
    }
}

template <class S>
static void mass(const float * q, int n_q, int n_embd, const float * k, int n, const float * shift, float * out, int64_t ld) {
    by_rows<mass_rows<S>>(0, n_q, [&](int r, auto number) {
        rough_mass<S, number>(q + r*n_embd, n_embd, k, n, shift + r, out + r*ld, ld);
    });
}

template <class S>
static block_ops ops_of(ggml_type type_k, ggml_type type_v) {
    block_ops ops = { panel_of<S>, nullptr, nullptr, block_dot<S>, block_mad<S>, weigh<S>, mass<S> };
    switch (type_k) {
        case GGML_TYPE_F32:  ops.pack_k = pack_k<S, GGML_TYPE_F32>;  break;
        case GGML_TYPE_F16:  ops.pack_k = pack_k<S, GGML_TYPE_F16>;  break;
        case GGML_TYPE_BF16: ops.pack_k = pack_k<S, GGML_TYPE_BF16>; break;
        case GGML_TYPE_Q8_0: ops.pack_k = pack_k<S, GGML_TYPE_Q8_0>; break;
        case GGML_TYPE_Q4_0: ops.pack_k = pack_k<S, GGML_TYPE_Q4_0>; break;
        default: break;
    }
    switch (type_v) {
        case GGML_TYPE_F32:  ops.pack_v = pack_v<S, GGML_TYPE_F32>;  break;
        case GGML_TYPE_F16:  ops.pack_v = pack_v<S, GGML_TYPE_F16>;  break;
        case GGML_TYPE_BF16: ops.pack_v = pack_v<S, GGML_TYPE_BF16>; break;
        case GGML_TYPE_Q8_0: ops.pack_v = pack_v<S, GGML_TYPE_Q8_0>; break;
        case GGML_TYPE_Q4_0: ops.pack_v = pack_v<S, GGML_TYPE_Q4_0>; break;
        default: break;
    }
    return ops;
}

block_ops block_ops_for(ggml_type type_k, ggml_type type_v, bool reference) {
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
