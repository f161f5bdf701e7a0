// The product that attention in blocks and products of weights with many tokens are made of: rows times a panel.
//
// A panel is a matrix [n][panel] whose lines are as wide as the registers of one pass and follow each other in memory.

#pragma once

#include "simd.h"

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
    SFI_UNROLL
    for (int r = 0; r < N; ++r) {
        SFI_UNROLL
        for (int m = 0; m < M; ++m) {
            S::store(out + r*ld + m*S::W, acc[r][m]);
        }
    }
}

// The same for any number of rows; what is left over goes in halves of N.
template <class S, int N>
static inline void product_rows(const float * a, int64_t ld_a, const float * b, int n, const float * keep, float * out, int64_t ld, int n_rows) {
    int r = 0;
    for (; r + N <= n_rows; r += N) {
        product<S, N>(a + r*ld_a, ld_a, b, n, keep ? keep + r : nullptr, out + r*ld, ld);
    }
    if constexpr (N > 1) {
        if (r < n_rows) {
            product_rows<S, N/2>(a + r*ld_a, ld_a, b, n, keep ? keep + r : nullptr, out + r*ld, ld, n_rows - r);
        }
    }
}

} // namespace sfi
