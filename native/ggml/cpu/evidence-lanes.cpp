#include "evidence-lanes.h"

#include <algorithm>

namespace sfi {

constexpr float nothing_seen = -1e30f; // finite, so that -INFINITY minus it is no NaN

// ---- how a key meets the queries: elements of a staged key, and one step of the sum over them ----------------------

// F32: an element is one value
template <class S_> struct lanes_f32 {
    using S = S_;
    using E = float;
    static int elements(int n_embd) { return n_embd; }
    static float query_scale(ggml_type) { return 1.0f; }
    static void pack(const float * q, int n_rows, int n_embd, E * packed) {
        for (int d = 0; d < n_embd; ++d) {
            for (int r = 0; r < S::W; ++r) {
                packed[d*S::W + r] = r < n_rows ? q[r*n_embd + d] : 0.0f;
            }
        }
    }
    template <ggml_type T> static void stage(const char * key, int n_embd, E * out) {
        for (int d = 0; d < n_embd; d += S::W) {
            S::store(out + d, row<S, T>::load(key, d));
        }
    }
    static typename S::V step(const E * q, E k, typename S::V acc) { return S::fma(S::load(q), S::set1(k), acc); }
};

#if defined(SFI_AVX512) && defined(__AVX512BF16__)
#define SFI_BF16
// BF16: an element is a pair of values, the instruction multiplies and adds both
struct bf16_pairs {
    using E = uint32_t;
    static int elements(int n_embd) { return n_embd/2; }
    static float query_scale(ggml_type type_k) { return type_k == GGML_TYPE_F16 ? 0x1p112f : 1.0f; }

    // F16 has 5 bits of exponent and 10 of mantissa, BF16 8 and 7. Rounded and moved by 3 bits, the bits of x in F16 are those
    // of 2^-112 x in BF16; what F16 holds as denormal becomes 0.
    static __m512i scaled_down(__m512i x) {
        x = _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(4)), 3);
        return _mm512_and_si512(x, _mm512_set1_epi16((short) 0x8fff));
    }

    static uint32_t bf16(float x) {
        uint32_t u;
        memcpy(&u, &x, sizeof(u));
        return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
    template <int W> static void pack_pairs(const float * q, int n_rows, int n_embd, E * packed) {
        for (int d = 0; d < n_embd; d += 2) {
            for (int r = 0; r < W; ++r) {
                packed[d/2*W + r] = r < n_rows ? bf16(q[r*n_embd + d]) | bf16(q[r*n_embd + d + 1]) << 16 : 0;
            }
        }
    }
    template <ggml_type T> static void stage(const char * key, int n_embd, E * out) {
        if (T == GGML_TYPE_BF16) {
            memcpy(out, key, n_embd*sizeof(uint16_t));
            return;
        }
        int d = 0;
        if (T == GGML_TYPE_F16) {
            for (; d + 32 <= n_embd; d += 32) {
                _mm512_storeu_si512(out + d/2, scaled_down(_mm512_loadu_si512(key + d*sizeof(uint16_t))));
            }
        }
        for (; d + 32 <= n_embd; d += 32) {
            const __m512bh x = _mm512_cvtne2ps_pbh(row<avx512, T>::load(key, d + 16), row<avx512, T>::load(key, d));
            _mm512_storeu_si512(out + d/2, (__m512i) x);
        }
        if (d < n_embd && T == GGML_TYPE_F16) { // n_embd is a multiple of 16
            const __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (key + d*sizeof(uint16_t))));
            _mm256_storeu_si256((__m256i *) (out + d/2), _mm512_castsi512_si256(scaled_down(x)));
        } else if (d < n_embd) {
            _mm256_storeu_si256((__m256i *) (out + d/2), (__m256i) _mm512_cvtneps_pbh(row<avx512, T>::load(key, d)));
        }
    }
};
struct lanes_bf16 : bf16_pairs {
    using S = avx512;
    static void pack(const float * q, int n_rows, int n_embd, E * packed) { pack_pairs<16>(q, n_rows, n_embd, packed); }
    static S::V step(const E * q, E k, S::V acc) {
        return _mm512_dpbf16_ps(acc, (__m512bh) _mm512_loadu_si512(q), (__m512bh) _mm512_set1_epi32((int) k));
    }
};
struct lanes_bf16_half : bf16_pairs { // up to 8 rows
    using S = avx2;
    static void pack(const float * q, int n_rows, int n_embd, E * packed) { pack_pairs<8>(q, n_rows, n_embd, packed); }
    static S::V step(const E * q, E k, S::V acc) {
        return _mm256_dpbf16_ps(acc, (__m256bh) _mm256_loadu_si256((const __m256i *) q), (__m256bh) _mm256_set1_epi32((int) k));
    }
};
#endif

// ---- the loops -----------------------------------------------------------------------------------------------------

template <class L>
static size_t query_bytes(int n_rows_padded, int n_embd) {
    return (size_t) n_rows_padded*L::elements(n_embd)*sizeof(typename L::E);
}

template <class L>
static size_t key_bytes(int n_embd) {
    return L::elements(n_embd)*sizeof(typename L::E);
}

template <class L>
static void pack(const float * q, int n_rows, int n_embd, void * packed) {
    auto * to = (typename L::E *) packed;
    for (int r = 0; r < n_rows; r += L::S::W) {
        L::pack(q + r*n_embd, std::min(n_rows - r, L::S::W), n_embd, to);
        to += L::elements(n_embd)*L::S::W;
    }
}

template <class L, ggml_type T>
static void stage(const row_set & rows, int n_embd, void * keys) {
    auto * to = (typename L::E *) keys;
    for (int i = 0; i < rows.n; ++i) {
        L::template stage<T>(rows.start[i] + rows.offset, n_embd, to + i*L::elements(n_embd));
    }
}

// one vector of rows against N keys
template <class L, int N>
static inline void dot_keys(const typename L::E * q, int n, const typename L::E * keys, float * out, int ld) {
    using S = typename L::S;
    typename S::V acc[N];
    SFI_UNROLL
    for (int i = 0; i < N; ++i) {
        acc[i] = S::zero();
    }
    for (int e = 0; e < n; ++e) {
        SFI_UNROLL
        for (int i = 0; i < N; ++i) {
            acc[i] = L::step(q + e*S::W, keys[i*n + e], acc[i]);
        }
    }
    SFI_UNROLL
    for (int i = 0; i < N; ++i) {
        S::store(out + i*ld, acc[i]);
    }
}

template <class L>
static void dot(const void * packed, int n_rows_padded, int n_embd, const void * keys, int n_keys, float * out) {
    const int n = L::elements(n_embd);
    const auto * q = (const typename L::E *) packed;
    const auto * k = (const typename L::E *) keys;
    for (int r = 0; r < n_rows_padded; r += L::S::W, q += n*L::S::W) {
        int i = 0;
        for (; i + 8 <= n_keys; i += 8) {
            dot_keys<L, 8>(q, n, k + i*n, out + i*n_rows_padded + r, n_rows_padded);
        }
        for (; i + 4 <= n_keys; i += 4) {
            dot_keys<L, 4>(q, n, k + i*n, out + i*n_rows_padded + r, n_rows_padded);
        }
        for (; i < n_keys; ++i) {
            dot_keys<L, 1>(q, n, k + i*n, out + i*n_rows_padded + r, n_rows_padded);
        }
    }
}

template <class S>
static void powers(float * x, int n, int n_rows_padded, const uint8_t * place, const float * visible, float * max, float * sum) {
    for (int r = 0; r < n_rows_padded; r += S::W) {
        typename S::V m = S::set1(nothing_seen);
        for (int i = 0; i < n; ++i) {
            float * at = x + i*n_rows_padded + r;
            if (place) {
                S::store(at, S::below(S::set1(place[i]), S::load(visible + r), S::load(at)));
            }
            m = S::max(m, S::load(at));
        }
        const typename S::V shift = S::mul(m, S::set1(-1.0f));
        typename S::V total = S::zero();
        for (int i = 0; i < n; ++i) {
            float * at = x + i*n_rows_padded + r;
            const typename S::V y = S::exp2(S::add(S::load(at), shift));
            S::store(at, y);
            total = S::add(total, y);
        }
        S::store(max + r, m);
        S::store(sum + r, total);
    }
}

template <class S>
static void weights(float * max, const float * sum, int n, int64_t stride, int n_rows_padded, const float * share) {
    for (int r = 0; r < n_rows_padded; r += S::W) {
        typename S::V top = S::set1(nothing_seen);
        for (int b = 0; b < n; ++b) {
            top = S::max(top, S::load(max + b*stride + r));
        }
        const typename S::V shift = S::mul(top, S::set1(-1.0f));
        typename S::V total = S::zero();
        for (int b = 0; b < n; ++b) {
            float * at = max + b*stride + r;
            const typename S::V y = S::exp2(S::add(S::load(at), shift));
            S::store(at, y);
            total = S::fma(y, S::load(sum + b*stride + r), total);
        }
        float scale[S::W];
        S::store(scale, total);
        for (int i = 0; i < S::W; ++i) {
            scale[i] = scale[i] > 0.0f ? share[r + i]/scale[i] : 0.0f; // a row that sees nothing has no evidence
        }
        const typename S::V factor = S::load(scale);
        for (int b = 0; b < n; ++b) {
            float * at = max + b*stride + r;
            S::store(at, S::mul(S::load(at), factor));
        }
    }
}

template <class S>
static void weigh(const float * x, int n, int n_rows_padded, const float * weight, float * out) {
    for (int i = 0; i < n; i += 4) {
        typename S::V acc[4] = { S::zero(), S::zero(), S::zero(), S::zero() };
        for (int r = 0; r < n_rows_padded; r += S::W) {
            const typename S::V w = S::load(weight + r);
            SFI_UNROLL
            for (int j = 0; j < 4; ++j) {
                acc[j] = S::fma(w, S::load(x + (i + j)*n_rows_padded + r), acc[j]);
            }
        }
        S::sum4(acc[0], acc[1], acc[2], acc[3], out + i);
    }
}

// ---- the tables ----------------------------------------------------------------------------------------------------

template <class L>
static lanes_ops ops_of(ggml_type type_k) {
    using S = typename L::S;
    lanes_ops ops = { S::W, L::query_scale(type_k), query_bytes<L>, key_bytes<L>, pack<L>, nullptr, dot<L>, powers<S>, weights<S>, weigh<S> };
    switch (type_k) {
        case GGML_TYPE_F32:  ops.stage = stage<L, GGML_TYPE_F32>;  break;
        case GGML_TYPE_F16:  ops.stage = stage<L, GGML_TYPE_F16>;  break;
        case GGML_TYPE_BF16: ops.stage = stage<L, GGML_TYPE_BF16>; break;
        case GGML_TYPE_Q8_0: ops.stage = stage<L, GGML_TYPE_Q8_0>; break;
        case GGML_TYPE_Q4_0: ops.stage = stage<L, GGML_TYPE_Q4_0>; break;
        default: break;
    }
    return ops;
}

lanes_ops lanes_ops_for(ggml_type type_k, int n_rows, bool reference) {
    switch (simd_for(reference)) {
#if defined(SFI_AVX512)
        case simd::avx512:
#if defined(SFI_BF16)
            return n_rows <= 8 ? ops_of<lanes_bf16_half>(type_k) : ops_of<lanes_bf16>(type_k);
#else
            return ops_of<lanes_f32<avx512>>(type_k);
#endif
#endif
#if defined(SFI_AVX2)
        case simd::avx2: return ops_of<lanes_f32<avx2>>(type_k);
#endif
#if defined(SFI_NEON)
        case simd::neon: return ops_of<lanes_f32<neon>>(type_k);
#endif
        default: break;
    }
    (void) n_rows;
    return ops_of<lanes_f32<scalar>>(type_k);
}

} // namespace sfi
