// The vector algebra of the sketch kernels, once per instruction set: what simd.h is for floats, for the 64 bytes of a
// plane and sixteen 32-bit integers.
//
// A kernel is a template over one of these structs; each has
//   F                        the floats of the same instruction set
//   M                        blocks that a kernel handles at once (limited by the registers)
//   narrow                   whether a Q overflows sooner than an A
//   P load(p)                the bytes of a plane
//   P field<shift, mask>(p)  some bits of every byte, moved to its lower end
//   Q dot(q, p, w)           sum i grows by bytes 4*i .. 4*i + 3 of p times the four signed bytes of w
//   flush(a, q)              a += q, q = 0: a narrow Q holds dots of 4 planes
//   A                        sixteen sums
//   to_float(a, i)           the i-th vector of them as floats
//   codes_of_record<bits>(p, v)   as floats, the components W*v .. of 16 of V whose codes begin at p
//   O offsets(cell, stride), P gather(p, o)   four bytes at p + stride*cell for each of 16 cells
//   keep(to, from, offset, lanes)   to[0], to[1] ... = offset + those of the W numbers `from`; returns how many; W may be written
//
// A code is at most 15, so no sum of two products of bytes saturates.

#pragma once

#include "simd.h"
#include "sketch.h"

namespace sfi {

struct bytes_scalar {
    using F = scalar;
    static constexpr int  M = 1;
    static constexpr bool narrow = false;
    struct P { uint8_t x[64]; };
    struct A { int32_t x[16]; };
    using Q = A;

    static P load(const uint8_t * p) { P x; memcpy(x.x, p, 64); return x; }
    template <int shift, int mask> static P field(const P & p) {
        P y;
        for (int i = 0; i < 64; ++i) { y.x[i] = p.x[i] >> shift & mask; }
        return y;
    }
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
    static float to_float(const A & a, int i) { return (float) a.x[i]; }
    static int keep(int32_t * to, const int32_t * from, int32_t offset, uint32_t lanes) {
        if (lanes & 1) { *to = *from + offset; }
        return lanes & 1;
    }
    template <int bits> static float codes_of_record(const uint8_t * p, int v) { return (float) (p[v*bits/8] >> v*bits % 8 & ((1 << bits) - 1)); }
    struct O { int64_t x[16]; };
    static O offsets(const int32_t * cell, int64_t stride) {
        O o;
        for (int i = 0; i < 16; ++i) { o.x[i] = cell[i]*stride; }
        return o;
    }
    static P gather(const uint8_t * p, const O & o) {
        P y;
        for (int i = 0; i < 16; ++i) { memcpy(y.x + 4*i, p + o.x[i], 4); }
        return y;
    }
};

#if defined(SFI_AVX2)
struct bytes_avx2 {
    using F = avx2;
    static constexpr int M = 1;
#if defined(__AVXVNNI__)
    static constexpr bool narrow = false;
#else
    static constexpr bool narrow = true;
#endif
    struct P { __m256i x[2]; };
    struct A { __m256i x[2]; };
    using Q = A; // of 32 bits with VNNI, else of 16

    static __m256i load_half(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
    static P load(const uint8_t * p) { return { { load_half(p), load_half(p + 32) } }; }
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
    static __m256 to_float(const A & a, int i) { return _mm256_cvtepi32_ps(a.x[i]); }
    static int keep(int32_t * to, const int32_t * from, int32_t offset, uint32_t lanes) {
        const __m256i x = _mm256_permutevar8x32_epi32(load_half((const uint8_t *) from), F::front(lanes));
        _mm256_storeu_si256((__m256i *) to, _mm256_add_epi32(x, _mm256_set1_epi32(offset)));
        return _mm_popcnt_u32(lanes & 255);
    }
    template <int bits> static __m256 codes_of_record(const uint8_t * p, int v) { // 8 of 2 bits: half of four bytes
        int32_t w;
        memcpy(&w, bits == 4 ? p + 4*v : p, 4);
        const int first = bits == 4 ? 0 : 16*v;
        const __m256i each = _mm256_add_epi32(_mm256_setr_epi32(0, bits, 2*bits, 3*bits, 4*bits, 5*bits, 6*bits, 7*bits), _mm256_set1_epi32(first));
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(w), each), _mm256_set1_epi32((1 << bits) - 1)));
    }
    struct O { __m256i x[2]; };
    static O offsets(const int32_t * cell, int64_t stride) {
        const __m256i s = _mm256_set1_epi32((int32_t) stride);
        return { { _mm256_mullo_epi32(load_half((const uint8_t *) cell), s), _mm256_mullo_epi32(load_half((const uint8_t *) (cell + 8)), s) } };
    }
    static P gather(const uint8_t * p, const O & o) {
        return { { _mm256_i32gather_epi32((const int *) p, o.x[0], 1), _mm256_i32gather_epi32((const int *) p, o.x[1], 1) } };
    }
};
#endif

#if defined(SFI_AVX512)
struct bytes_avx512 {
    using F = avx512;
    static constexpr int M = 4;
#if defined(__AVX512VNNI__)
    static constexpr bool narrow = false;
#else
    static constexpr bool narrow = true;
#endif
    using P = __m512i;
    using A = __m512i;
    using Q = __m512i; // of 32 bits with VNNI, else of 16

    static P load(const uint8_t * p) { return _mm512_loadu_si512(p); }
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
    static __m512 to_float(A a, int) { return _mm512_cvtepi32_ps(a); }
    static int keep(int32_t * to, const int32_t * from, int32_t offset, uint32_t lanes) {
        const __mmask16 m = (__mmask16) lanes;
        const __m512i x = _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(from));
        _mm512_storeu_si512(to, _mm512_add_epi32(x, _mm512_set1_epi32(offset)));
        return _mm_popcnt_u32(m);
    }
    template <int bits> static __m512 codes_of_record(const uint8_t * p, int) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512  code = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << bits) - 1))); // by its lower bits and any above
        int32_t w[2];
        memcpy(w, p, 2*bits);
        if (bits == 2) {
            return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(w[0]), _mm512_slli_epi32(lane, 1)), code);
        }
        const __m512i x = _mm512_mask_set1_epi32(_mm512_set1_epi32(w[0]), 0xff00, w[1]);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(x, _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2)), code);
    }
    using O = __m512i;
    static O offsets(const int32_t * cell, int64_t stride) { return _mm512_mullo_epi32(_mm512_loadu_si512(cell), _mm512_set1_epi32((int32_t) stride)); }
    static P gather(const uint8_t * p, O o) { return _mm512_i32gather_epi32(o, p, 1); }
};
#endif

#if defined(SFI_NEON)
struct bytes_neon {
    using F = neon;
    static constexpr int M = 1;
#if defined(__ARM_FEATURE_DOTPROD)
    static constexpr bool narrow = false;
#else
    static constexpr bool narrow = true;
#endif
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
    template <int shift, int mask> static P field(const P & p) {
        P y;
        SFI_UNROLL
        for (int i = 0; i < 4; ++i) { y.x[i] = vandq_u8(vshlq_u8(p.x[i], vdupq_n_s8(-shift)), vdupq_n_u8(mask)); }
        return y;
    }
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
    static float32x4_t to_float(const A & a, int i) { return vcvtq_f32_s32(a.x[i]); }
    static int keep(int32_t * to, const int32_t * from, int32_t offset, uint32_t lanes) {
        const uint8x16_t x = vqtbl1q_u8(vld1q_u8((const uint8_t *) from), F::front(lanes));
        vst1q_s32(to, vaddq_s32(vreinterpretq_s32_u8(x), vdupq_n_s32(offset)));
        return vaddv_u8(vcnt_u8(vcreate_u8(lanes & 15)));
    }
    template <int bits> static float32x4_t codes_of_record(const uint8_t * p, int v) {
        const int32_t each[4] = { 0, -bits, -2*bits, -3*bits };
        uint32_t w = 0;
        memcpy(&w, p + v*bits/2, bits/2); // of 4 components
        const uint32x4_t x = vshlq_u32(vdupq_n_u32(w), vld1q_s32(each));
        return vcvtq_f32_u32(vandq_u32(x, vdupq_n_u32((1u << bits) - 1)));
    }
    struct O { int64_t x[16]; };
    static O offsets(const int32_t * cell, int64_t stride) {
        O o;
        for (int i = 0; i < 16; ++i) { o.x[i] = cell[i]*stride; }
        return o;
    }
    static P gather(const uint8_t * p, const O & o) {
        uint32_t y[16];
        for (int i = 0; i < 16; ++i) { memcpy(y + i, p + o.x[i], 4); }
        return load((const uint8_t *) y);
    }
};
#endif

} // namespace sfi
