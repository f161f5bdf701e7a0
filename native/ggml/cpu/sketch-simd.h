// The vector algebra of the sketch kernels, once per instruction set: what simd.h is for floats, for the 64 bytes of a
// plane and sixteen 32-bit integers.
//
// A kernel is a template over one of these structs; each has
//   F                        the floats of the same instruction set
//   P load(p)                the bytes of a plane
//   field<shift, mask>(p), field(p, f)   some bits of every byte, moved to its lower end
//   Q dot(q, p, w)           sum i grows by bytes 4*i .. 4*i + 3 of p times the four signed bytes of w
//   flush(a, q)              a += q, q = 0: a Q may be narrow. It holds 8 fields of 4 bits, 16 of 2 bits, 4 whole planes
//   A                        sixteen sums
//   store(a, out), to_float(a, i)   as int32 [16]; the i-th vector of floats
//   I round(x)               a vector of floats to integers
//   I add(a, b), sum(a)
//   split(x, lo, hi)         x = 256*hi + lo, both signed bytes; |x| < 2^15 - 128
//
// One code is at most 15 and one weight at most 128 in size, so no sum of bytes' products saturates.

#pragma once

#include "simd.h"
#include "sketch.h"

namespace sfi {

struct bytes_scalar {
    using F = scalar;
    using I = int32_t;
    struct P { uint8_t x[64]; };
    struct A { int32_t x[16]; };
    using Q = A;

    static P load(const uint8_t * p) { P x; memcpy(x.x, p, 64); return x; }
    static P field(const P & p, const sketch_field & f) {
        P y;
        for (int i = 0; i < 64; ++i) { y.x[i] = p.x[i] >> f.shift & f.mask; }
        return y;
    }
    template <int shift, int mask> static P field(const P & p) { return field(p, { 0, shift, mask }); }
    static A zero() { return {}; }
    static Q zero_q() { return {}; }
    static Q dot(Q q, const P & p, int32_t w) {
        int8_t b[4];
        memcpy(b, &w, 4);
        for (int i = 0; i < 64; ++i) { q.x[i/4] += p.x[i]*b[i % 4]; }
        return q;
    }
    static void flush(A & a, Q & q) {
        for (int i = 0; i < 16; ++i) { a.x[i] += q.x[i]; }
        q = {};
    }
    static void  store(const A & a, int32_t * out) { memcpy(out, a.x, sizeof(a.x)); }
    static float to_float(const A & a, int i) { return (float) a.x[i]; }
    static I     round(float x) { return (int32_t) lrintf(x); }
    static I     zero_i() { return 0; }
    static I     add(I a, I b) { return a + b; }
    static int32_t sum(I a) { return a; }
    static void  split(I x, int8_t * lo, int8_t * hi) {
        *lo = (int8_t) (uint8_t) x;
        *hi = (int8_t) ((x - *lo)/256);
    }
};

#if defined(SFI_AVX2)
struct bytes_avx2 {
    using F = avx2;
    using I = __m256i;
    struct P { __m256i x[2]; };
    struct A { __m256i x[2]; };
    using Q = A; // of 32 bits with VNNI, else of 16

    static __m256i load_half(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
    static P load(const uint8_t * p) { return { { load_half(p), load_half(p + 32) } }; }
    static P field(const P & p, const sketch_field & f) {
        const __m128i shift = _mm_cvtsi32_si128(f.shift);
        const __m256i mask  = _mm256_set1_epi8((char) f.mask);
        return { { _mm256_and_si256(_mm256_srl_epi16(p.x[0], shift), mask), _mm256_and_si256(_mm256_srl_epi16(p.x[1], shift), mask) } };
    }
    template <int shift, int mask> static P field(const P & p) {
        const __m256i m = _mm256_set1_epi8(mask);
        return { { _mm256_and_si256(_mm256_srli_epi16(p.x[0], shift), m), _mm256_and_si256(_mm256_srli_epi16(p.x[1], shift), m) } };
    }
    static A zero() { return { { _mm256_setzero_si256(), _mm256_setzero_si256() } }; }
    static Q zero_q() { return zero(); }
    static A dot(A q, const P & p, int32_t w) {
        const __m256i four = _mm256_set1_epi32(w);
        for (int i = 0; i < 2; ++i) {
#if defined(__AVXVNNI__)
            q.x[i] = _mm256_dpbusd_avx_epi32(q.x[i], p.x[i], four);
#else
            q.x[i] = _mm256_add_epi16(q.x[i], _mm256_maddubs_epi16(p.x[i], four));
#endif
        }
        return q;
    }
    static void flush(A & a, Q & q) {
        for (int i = 0; i < 2; ++i) {
#if defined(__AVXVNNI__)
            a.x[i] = _mm256_add_epi32(a.x[i], q.x[i]);
#else
            a.x[i] = _mm256_add_epi32(a.x[i], _mm256_madd_epi16(q.x[i], _mm256_set1_epi16(1)));
#endif
        }
        q = zero();
    }
    static void store(const A & a, int32_t * out) {
        _mm256_storeu_si256((__m256i *) out, a.x[0]);
        _mm256_storeu_si256((__m256i *) (out + 8), a.x[1]);
    }
    static __m256 to_float(const A & a, int i) { return _mm256_cvtepi32_ps(a.x[i]); }
    static I      round(__m256 x) { return _mm256_cvtps_epi32(x); }
    static I      zero_i() { return _mm256_setzero_si256(); }
    static I      add(I a, I b) { return _mm256_add_epi32(a, b); }
    static int32_t sum(I a) {
        __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
    }
    static void split(I x, int8_t * lo, int8_t * hi) {
        // the two lower bytes of x + 128: hi is right, lo 128 too much
        const __m256i y = _mm256_add_epi32(x, _mm256_set1_epi32(128));
        const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                              0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i z = _mm256_shuffle_epi8(y, pick); // per half: 4 bytes lo, 4 bytes hi
        const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1));
        const __m128i fixed = _mm_xor_si128(both, _mm_setr_epi32(INT32_C(-0x7F7F7F80), INT32_C(-0x7F7F7F80), 0, 0));
        _mm_storel_epi64((__m128i *) lo, fixed);
        _mm_storel_epi64((__m128i *) hi, _mm_unpackhi_epi64(fixed, fixed));
    }
};
#endif

#if defined(SFI_AVX512)
struct bytes_avx512 {
    using F = avx512;
    using I = __m512i;
    using P = __m512i;
    using A = __m512i;
    using Q = __m512i; // of 32 bits with VNNI, else of 16

    static P load(const uint8_t * p) { return _mm512_loadu_si512(p); }
    static P field(P p, const sketch_field & f) {
        return _mm512_and_si512(_mm512_srl_epi16(p, _mm_cvtsi32_si128(f.shift)), _mm512_set1_epi8((char) f.mask));
    }
    template <int shift, int mask> static P field(P p) {
        return _mm512_and_si512(_mm512_srli_epi16(p, shift), _mm512_set1_epi8(mask));
    }
    static A zero()   { return _mm512_setzero_si512(); }
    static Q zero_q() { return _mm512_setzero_si512(); }
    static Q dot(Q q, P p, int32_t w) {
#if defined(__AVX512VNNI__)
        return _mm512_dpbusd_epi32(q, p, _mm512_set1_epi32(w));
#else
        return _mm512_add_epi16(q, _mm512_maddubs_epi16(p, _mm512_set1_epi32(w)));
#endif
    }
    static void flush(A & a, Q & q) {
#if defined(__AVX512VNNI__)
        a = _mm512_add_epi32(a, q);
#else
        a = _mm512_add_epi32(a, _mm512_madd_epi16(q, _mm512_set1_epi16(1)));
#endif
        q = zero_q();
    }
    static void   store(A a, int32_t * out) { _mm512_storeu_si512(out, a); }
    static __m512 to_float(A a, int) { return _mm512_cvtepi32_ps(a); }
    static I      round(__m512 x) { return _mm512_cvtps_epi32(x); }
    static I      zero_i() { return _mm512_setzero_si512(); }
    static I      add(I a, I b) { return _mm512_add_epi32(a, b); }
    static int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
    static void   split(I x, int8_t * lo, int8_t * hi) {
        _mm_storeu_si128((__m128i *) lo, _mm512_cvtepi32_epi8(x));
        _mm_storeu_si128((__m128i *) hi, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8)));
    }
};
#endif

#if defined(SFI_NEON)
struct bytes_neon {
    using F = neon;
    using I = int32x4_t;
    struct P { uint8x16_t x[4]; };
    struct A { int32x4_t x[4]; };
#if defined(__ARM_FEATURE_DOTPROD)
    using Q = A;
    static Q zero_q() { return zero(); }
#else
    struct Q { int16x8_t x[8]; };
    static Q zero_q() {
        Q q;
        SFI_UNROLL
        for (int i = 0; i < 8; ++i) { q.x[i] = vdupq_n_s16(0); }
        return q;
    }
#endif

    static P load(const uint8_t * p) { return { { vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48) } }; }
    static P field(const P & p, const sketch_field & f) {
        const int8x16_t shift = vdupq_n_s8((int8_t) -f.shift);
        P y;
        SFI_UNROLL
        for (int i = 0; i < 4; ++i) { y.x[i] = vandq_u8(vshlq_u8(p.x[i], shift), vdupq_n_u8((uint8_t) f.mask)); }
        return y;
    }
    template <int shift, int mask> static P field(const P & p) { return field(p, { 0, shift, mask }); }
    static A zero() { return { { vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0) } }; }
    static Q dot(Q q, const P & p, int32_t w) {
        const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(w));
        SFI_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int8x16_t x = vreinterpretq_s8_u8(p.x[i]);
#if defined(__ARM_FEATURE_DOTPROD)
            q.x[i] = vdotq_s32(q.x[i], x, four);
#else
            q.x[2*i]     = vmlal_s8(q.x[2*i],     vget_low_s8(x), vget_low_s8(four));
            q.x[2*i + 1] = vmlal_high_s8(q.x[2*i + 1], x, four);
#endif
        }
        return q;
    }
    static void flush(A & a, Q & q) {
        SFI_UNROLL
        for (int i = 0; i < 4; ++i) {
#if defined(__ARM_FEATURE_DOTPROD)
            a.x[i] = vaddq_s32(a.x[i], q.x[i]);
#else
            a.x[i] = vaddq_s32(a.x[i], vpaddq_s32(vpaddlq_s16(q.x[2*i]), vpaddlq_s16(q.x[2*i + 1])));
#endif
        }
        q = zero_q();
    }
    static void store(const A & a, int32_t * out) {
        for (int i = 0; i < 4; ++i) { vst1q_s32(out + 4*i, a.x[i]); }
    }
    static float32x4_t to_float(const A & a, int i) { return vcvtq_f32_s32(a.x[i]); }
    static I       round(float32x4_t x) { return vcvtnq_s32_f32(x); }
    static I       zero_i() { return vdupq_n_s32(0); }
    static I       add(I a, I b) { return vaddq_s32(a, b); }
    static int32_t sum(I a) { return vaddvq_s32(a); }
    static void    split(I x, int8_t * lo, int8_t * hi) {
        const int16x4_t y = vmovn_s32(x);
        const int8x8_t l = vmovn_s16(vcombine_s16(y, y));
        const int8x8_t h = vshrn_n_s16(vaddq_s16(vcombine_s16(y, y), vdupq_n_s16(128)), 8);
        vst1_lane_s32((int32_t *) lo, vreinterpret_s32_s8(l), 0);
        vst1_lane_s32((int32_t *) hi, vreinterpret_s32_s8(h), 0);
    }
};
#endif

} // namespace sfi
