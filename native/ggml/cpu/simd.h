// The little vector algebra that the kernels are written in, once per instruction set.
//
// A kernel is a template over one of these structs; each has
//   V, W                     vector of W floats
//   NG                       query rows a kernel handles at once (limited by the registers)
//   zero set1 load store add mul max fma(a, b, c) = a*b + c
//   f16 bf16 i8 lo4 hi4      W values of a row converted to float
//   half(x)                  one of them, in every lane
//   sum4(a, b, c, d, out)    out[i] = sum of the lanes of the i-th vector
//   transpose(in, ld, out, ld)  a W x W block
//   exp(x)                   for x <= 0, relative error below 3e-7, 0 below -87
//   hmax(x)                  the largest lane
//   exp2(t)                  for t < 126, relative error below 4e-6; below -126 what it is there: nothing, beside a 1
//   rough_exp2(t)            off by 4 % at most, for t of -100 to 100 and as there beyond; of what is not a number anything
//   ge(a, b)                 a bit per lane: a >= b
//   keep(p, x, lanes)        p[0], p[1] ... = those lanes of x; W values may be written

#pragma once

#include "ggml.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#    include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    include <arm_neon.h>
#    define SFI_NEON
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#    define SFI_AVX512
#endif
#if defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__)))
#    define SFI_AVX2
#endif

// Loops over accumulators must be unrolled before the compiler looks for registers, or they live on the stack.
#if defined(__clang__)
#    define SFI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#    define SFI_UNROLL _Pragma("GCC unroll 16")
#else
#    define SFI_UNROLL
#endif

// Keep a vector in its register: compilers like to load an operand again for every use of it.
#if defined(__GNUC__) && (defined(SFI_AVX512) || defined(SFI_AVX2))
#    define SFI_PIN(x) asm("" : "+v"(x))
#elif defined(__GNUC__) && defined(SFI_NEON)
#    define SFI_PIN(x) asm("" : "+w"(x))
#else
#    define SFI_PIN(x) (void) (x)
#endif

namespace sfi {

// What a kernel may use: the widest path of this build, or the narrower one that SFI_SIMD names; for tests
enum class simd { scalar, avx2, avx512, neon };
simd simd_for(bool reference);

// A function that only prefetches has no effect that GCC knows of, and calls of it are removed; unless they are
// inlined before anybody asks. A build that wants its functions small (sanitizers: check-ops.sh) says SFI_INLINE=inline.
#if defined(SFI_INLINE)
#elif defined(__GNUC__)
#    define SFI_INLINE inline __attribute__((always_inline))
#else
#    define SFI_INLINE inline
#endif

static SFI_INLINE void prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2); // into the second level: what is fetched ahead would push what is at work out of the first
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    _mm_prefetch((const char *) p, _MM_HINT_T1);
#else
    (void) p;
#endif
}

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by a polynomial of degree 6
namespace exp_constants {
    constexpr float log2e = 1.44269504f;
    constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f; // ln 2 = hi + lo, hi exact in few bits
    constexpr float min_x = -87.0f;                                  // below: 0 (the result would be denormal)
    constexpr float c[6] = { 1.0f, 0.5f, 1.6666667e-1f, 4.1666482e-2f, 8.3338463e-3f, 1.3934438e-3f };
}

// 2^t = 2^n * 2^f, n = floor(t), 2^f by a polynomial of degree 4
namespace exp2_constants {
    constexpr float min_t = -126.0f;
    constexpr float c[5]  = { 1.00000262f, 0.693003833f, 0.241442755f, 0.0520114638f, 0.0135341678f };
}

// 2^t = the float whose bits are t*2^23 + bias: its exponent is right, and 2^f taken to be 1 + f, less 3 % so that the error is centred
namespace rough_exp2_constants {
    constexpr float most = 100.0f, unit = 1 << 23, bias = 1064992512.0f;
}

// For every set of lanes, the numbers of those that are in it, one a byte: what moves them to the front.
template <int W> struct front_lanes {
    uint8_t of[1 << W][W];

    constexpr front_lanes() : of() {
        for (int set = 0; set < 1 << W; ++set) {
            for (int lane = 0, n = 0; lane < W; ++lane) {
                if (set >> lane & 1) {
                    of[set][n++] = (uint8_t) lane;
                }
            }
        }
    }
};

struct scalar {
    using V = float;
    static constexpr int W  = 1;
    static constexpr int NG = 1;

    static V    zero()                  { return 0.0f; }
    static V    set1(float x)           { return x; }
    static V    load(const float * p)   { return *p; }
    static void store(float * p, V x)   { *p = x; }
    static V    add(V a, V b)           { return a + b; }
    static V    mul(V a, V b)           { return a * b; }
    static V    max(V a, V b)           { return a > b ? a : b; }
    static V    fma(V a, V b, V c)      { return a * b + c; }
    static V    f16(const uint16_t * p) { return GGML_CPU_FP16_TO_FP32(*p); }
    static V    bf16(const uint16_t * p) {
        const uint32_t bits = (uint32_t) *p << 16;
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    }
    static V    half(uint16_t x)        { return GGML_CPU_FP16_TO_FP32(x); }
    static V    i8 (const int8_t  * p)  { return *p; }
    static V    lo4(const uint8_t * p)  { return (int) (*p & 15) - 8; }
    static V    hi4(const uint8_t * p)  { return (int) (*p >> 4) - 8; }
    static void sum4(V a, V b, V c, V d, float * out) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; }
    static void transpose(const float * in, int, float * out, int) { *out = *in; }
    static V    exp(V x)                { return x < exp_constants::min_x ? 0.0f : std::exp(x); }
    static float hmax(V x)              { return x; }
    static V    exp2(V t)               { return std::exp2(max(t, exp2_constants::min_t)); }
    static V    rough_exp2(V t) {
        using namespace rough_exp2_constants;
        t = t > -most ? t < most ? t : most : -most;
        const int32_t bits = (int32_t) (t*unit + bias);
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    }
    static uint32_t ge(V a, V b)        { return a >= b; }
    static void keep(float * p, V x, uint32_t lanes) { if (lanes & 1) { *p = x; } }
};

#if defined(SFI_AVX2)
struct avx2 {
    using V = __m256;
    static constexpr int W  = 8;
    static constexpr int NG = 3; // times 4 cells are 12 of 16 registers

    static V    zero()                  { return _mm256_setzero_ps(); }
    static V    set1(float x)           { return _mm256_set1_ps(x); }
    static V    load(const float * p)   { return _mm256_loadu_ps(p); }
    static void store(float * p, V x)   { _mm256_storeu_ps(p, x); }
    static V    add(V a, V b)           { return _mm256_add_ps(a, b); }
    static V    mul(V a, V b)           { return _mm256_mul_ps(a, b); }
    static V    max(V a, V b)           { return _mm256_max_ps(a, b); }
    static V    fma(V a, V b, V c)      { return _mm256_fmadd_ps(a, b, c); }
    static V    f16(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
    static V    half(uint16_t x)        { return _mm256_cvtph_ps(_mm_set1_epi16((short) x)); }
    static V    bf16(const uint16_t * p) {
        const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    }
    static V    i8(const int8_t * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
    }
    static V    nibbles(__m256i x) {
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(x, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
    }
    static __m256i bytes(const uint8_t * p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }
    static V    lo4(const uint8_t * p)  { return nibbles(bytes(p)); }
    static V    hi4(const uint8_t * p)  { return nibbles(_mm256_srli_epi32(bytes(p), 4)); }
    static void sum4(V a, V b, V c, V d, float * out) {
        const V x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    }
    static void transpose(const float * in, int ld_in, float * out, int ld_out) {
        V r[8], t[8];
        for (int i = 0; i < 8; ++i) { r[i] = load(in + i*ld_in); }
        for (int i = 0; i < 8; i += 2) {
            t[i]     = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i]     = _mm256_shuffle_ps(t[i],     t[i + 2], 0x44);
            r[i + 1] = _mm256_shuffle_ps(t[i],     t[i + 2], 0xEE);
            r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
        }
        for (int i = 0; i < 4; ++i) {
            store(out + (i + 0)*ld_out, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            store(out + (i + 4)*ld_out, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }
    static V    exp(V x) {
        using namespace exp_constants;
        const V n = _mm256_round_ps(mul(x, set1(log2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const V r = fma(n, set1(-ln2_lo), fma(n, set1(-ln2_hi), x));
        V y = set1(c[5]);
        for (int i = 4; i >= 0; --i) { y = fma(y, r, set1(c[i])); }
        y = fma(y, r, set1(1.0f));
        const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        const V result = mul(y, _mm256_castsi256_ps(e));
        return _mm256_and_ps(result, _mm256_cmp_ps(x, set1(min_x), _CMP_GE_OQ));
    }
    static float hmax(V x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
    }
    static V    exp2(V t) {
        using namespace exp2_constants;
        t = max(t, set1(min_t));
        const V n = _mm256_round_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const V f = _mm256_sub_ps(t, n);
        V y = set1(c[4]);
        for (int i = 3; i >= 0; --i) { y = fma(y, f, set1(c[i])); }
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    }
    static V    rough_exp2(V t) {
        using namespace rough_exp2_constants;
        const V in = _mm256_min_ps(set1(most), _mm256_max_ps(set1(-most), t));
        return _mm256_castsi256_ps(_mm256_cvtps_epi32(fma(in, set1(unit), set1(bias))));
    }
    static uint32_t ge(V a, V b)        { return (uint32_t) _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
    static __m256i front(uint32_t lanes) {
        static constexpr front_lanes<W> table;
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) table.of[lanes & 255]));
    }
    static void keep(float * p, V x, uint32_t lanes) { store(p, _mm256_permutevar8x32_ps(x, front(lanes))); }
};
#endif

#if defined(SFI_AVX512)
struct avx512 {
    using V = __m512;
    static constexpr int W  = 16;
    static constexpr int NG = 4;

    static V    zero()                  { return _mm512_setzero_ps(); }
    static V    set1(float x)           { return _mm512_set1_ps(x); }
    static V    load(const float * p)   { return _mm512_loadu_ps(p); }
    static void store(float * p, V x)   { _mm512_storeu_ps(p, x); }
    static V    add(V a, V b)           { return _mm512_add_ps(a, b); }
    static V    mul(V a, V b)           { return _mm512_mul_ps(a, b); }
    static V    max(V a, V b)           { return _mm512_max_ps(a, b); }
    static V    fma(V a, V b, V c)      { return _mm512_fmadd_ps(a, b, c); }
    static V    f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static V    half(uint16_t x)        { return _mm512_cvtph_ps(_mm256_set1_epi16((short) x)); }
    static V    bf16(const uint16_t * p) {
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    }
    static V    i8(const int8_t * p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
    }
    static V    nibbles(__m512i x) {
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(x, _mm512_set1_epi32(15)), _mm512_set1_epi32(8)));
    }
    static __m512i bytes(const uint8_t * p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }
    static V    lo4(const uint8_t * p)  { return nibbles(bytes(p)); }
    static V    hi4(const uint8_t * p)  { return nibbles(_mm512_srli_epi32(bytes(p), 4)); }
    static void sum4(V a, V b, V c, V d, float * out) {
        // fold to one vector whose 128-bit lanes are a, b, c, d, then sum within the lanes
        const V ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const V cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        V x = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
        x = add(x, _mm512_permute_ps(x, 0x4E));
        x = add(x, _mm512_permute_ps(x, 0xB1));
        const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
    }
    static void transpose(const float * in, int ld_in, float * out, int ld_out) {
        V r[16], t[16];
        for (int i = 0; i < 16; ++i) { r[i] = load(in + i*ld_in); }
        for (int i = 0; i < 16; i += 2) {
            t[i]     = _mm512_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i]     = _mm512_shuffle_ps(t[i],     t[i + 2], 0x44);
            r[i + 1] = _mm512_shuffle_ps(t[i],     t[i + 2], 0xEE);
            r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
        }
        // now the 4x4 blocks are transposed; lane l of r[4b + j] is column 4l + j of rows 4b .. 4b + 3
        for (int j = 0; j < 4; ++j) {
            const V a = _mm512_shuffle_f32x4(r[j],     r[j + 4],  0x88); // lanes 0, 2 of blocks 0, 1
            const V b = _mm512_shuffle_f32x4(r[j],     r[j + 4],  0xDD); // lanes 1, 3
            const V c = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
            const V d = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xDD);
            store(out + (j +  0)*ld_out, _mm512_shuffle_f32x4(a, c, 0x88));
            store(out + (j +  4)*ld_out, _mm512_shuffle_f32x4(b, d, 0x88));
            store(out + (j +  8)*ld_out, _mm512_shuffle_f32x4(a, c, 0xDD));
            store(out + (j + 12)*ld_out, _mm512_shuffle_f32x4(b, d, 0xDD));
        }
    }
    static V    exp(V x) {
        using namespace exp_constants;
        const V n = _mm512_roundscale_ps(mul(x, set1(log2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const V r = fma(n, set1(-ln2_lo), fma(n, set1(-ln2_hi), x));
        V y = set1(c[5]);
        for (int i = 4; i >= 0; --i) { y = fma(y, r, set1(c[i])); }
        y = fma(y, r, set1(1.0f));
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(min_x), _CMP_GE_OQ), y, n);
    }
    static float hmax(V x)              { return _mm512_reduce_max_ps(x); }
    static V    exp2(V t) {
        using namespace exp2_constants;
        t = max(t, set1(min_t));
        const V f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); // t - floor(t)
        V y = set1(c[4]);
        for (int i = 3; i >= 0; --i) { y = fma(y, f, set1(c[i])); }
        return _mm512_scalef_ps(y, t); // y * 2^floor(t)
    }
    static V    rough_exp2(V t) {
        using namespace rough_exp2_constants;
        const V in = _mm512_min_ps(set1(most), _mm512_max_ps(set1(-most), t));
        return _mm512_castsi512_ps(_mm512_cvtps_epi32(fma(in, set1(unit), set1(bias))));
    }
    static uint32_t ge(V a, V b)        { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static void keep(float * p, V x, uint32_t lanes) { // a compressing or masked store is slow: on some CPUs, or to untouched pages
        store(p, _mm512_maskz_compress_ps((__mmask16) lanes, x));
    }
};
#endif

#if defined(SFI_NEON)
struct neon {
    using V = float32x4_t;
    static constexpr int W  = 4;
    static constexpr int NG = 4;

    static V    zero()                  { return vdupq_n_f32(0.0f); }
    static V    set1(float x)           { return vdupq_n_f32(x); }
    static V    load(const float * p)   { return vld1q_f32(p); }
    static void store(float * p, V x)   { vst1q_f32(p, x); }
    static V    add(V a, V b)           { return vaddq_f32(a, b); }
    static V    mul(V a, V b)           { return vmulq_f32(a, b); }
    static V    max(V a, V b)           { return vmaxq_f32(a, b); }
    static V    fma(V a, V b, V c)      { return vfmaq_f32(c, a, b); }
    static V    f16(const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static V    half(uint16_t x)        { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))); }
    static V    bf16(const uint16_t * p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static V    i8(const int8_t * p) {
        int32_t four;
        memcpy(&four, p, 4);
        const int16x8_t x = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
    }
    static V    nibbles(uint32_t four, int shift) {
        const uint8x8_t b = vand_u8(vshl_u8(vreinterpret_u8_u32(vdup_n_u32(four)), vdup_n_s8((int8_t) -shift)), vdup_n_u8(15));
        const int32x4_t x = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(b))));
        return vcvtq_f32_s32(vsubq_s32(x, vdupq_n_s32(8)));
    }
    static uint32_t bytes(const uint8_t * p) { uint32_t x; memcpy(&x, p, 4); return x; }
    static V    lo4(const uint8_t * p)  { return nibbles(bytes(p), 0); }
    static V    hi4(const uint8_t * p)  { return nibbles(bytes(p), 4); }
    static void sum4(V a, V b, V c, V d, float * out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
    static void transpose(const float * in, int ld_in, float * out, int ld_out) {
        const V r0 = load(in), r1 = load(in + ld_in), r2 = load(in + 2*ld_in), r3 = load(in + 3*ld_in);
        const float64x2_t t0 = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), t1 = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
        const float64x2_t t2 = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), t3 = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
        store(out,            vreinterpretq_f32_f64(vtrn1q_f64(t0, t2)));
        store(out +   ld_out, vreinterpretq_f32_f64(vtrn1q_f64(t1, t3)));
        store(out + 2*ld_out, vreinterpretq_f32_f64(vtrn2q_f64(t0, t2)));
        store(out + 3*ld_out, vreinterpretq_f32_f64(vtrn2q_f64(t1, t3)));
    }
    static V    exp(V x) {
        using namespace exp_constants;
        const V n = vrndnq_f32(mul(x, set1(log2e)));
        const V r = fma(n, set1(-ln2_lo), fma(n, set1(-ln2_hi), x));
        V y = set1(c[5]);
        for (int i = 4; i >= 0; --i) { y = fma(y, r, set1(c[i])); }
        y = fma(y, r, set1(1.0f));
        const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
        const V result = mul(y, vreinterpretq_f32_s32(e));
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(result), vcgeq_f32(x, set1(min_x))));
    }
    static float hmax(V x)              { return vmaxvq_f32(x); }
    static V    exp2(V t) {
        using namespace exp2_constants;
        t = max(t, set1(min_t));
        const V n = vrndmq_f32(t);
        const V f = vsubq_f32(t, n);
        V y = set1(c[4]);
        for (int i = 3; i >= 0; --i) { y = fma(y, f, set1(c[i])); }
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
    }
    static V    rough_exp2(V t) {
        using namespace rough_exp2_constants;
        const V in = vminq_f32(vdupq_n_f32(most), vmaxq_f32(vdupq_n_f32(-most), t));
        return vreinterpretq_f32_s32(vcvtq_s32_f32(fma(in, set1(unit), set1(bias))));
    }
    static uint32_t ge(V a, V b) {
        const uint32_t bit[4] = { 1, 2, 4, 8 };
        return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
    }
    static uint8x16_t front(uint32_t lanes) { // of bytes
        static constexpr front_lanes<W> table;
        uint32_t four;
        memcpy(&four, table.of[lanes & 15], 4);
        const uint8x16_t lane = vreinterpretq_u8_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
        const uint8x16_t each = vreinterpretq_u8_u32(vmulq_n_u32(vreinterpretq_u32_u8(lane), 0x04040404u));
        return vaddq_u8(each, vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u)));
    }
    static void keep(float * p, V x, uint32_t lanes) {
        vst1q_u8((uint8_t *) p, vqtbl1q_u8(vreinterpretq_u8_f32(x), front(lanes)));
    }
};
#endif

// ---- rows of K and V ----------------------------------------------------------------------------------------

// W floats of a row of ggml type T, starting at element i (a multiple of W, W <= 16)
template <class S, ggml_type T> struct row;

template <class S> struct row<S, GGML_TYPE_F32> {
    static typename S::V load(const char * p, int i) { return S::load((const float *) p + i); }
};
template <class S> struct row<S, GGML_TYPE_F16> {
    static typename S::V load(const char * p, int i) { return S::f16((const uint16_t *) p + i); }
};
template <class S> struct row<S, GGML_TYPE_BF16> {
    static typename S::V load(const char * p, int i) { return S::bf16((const uint16_t *) p + i); }
};

// blocks of 32: a scale (half), then 32 bytes / 16 bytes with element j in the low and j + 16 in the high nibble
template <class S> static inline typename S::V block_scale(const char * block) {
    uint16_t d;
    memcpy(&d, block, sizeof(d));
    return S::half(d);
}
template <class S> struct row<S, GGML_TYPE_Q8_0> {
    static typename S::V load(const char * p, int i) {
        const char * block = p + (i/32)*34;
        return S::mul(block_scale<S>(block), S::i8((const int8_t *) block + 2 + i%32));
    }
};
template <class S> struct row<S, GGML_TYPE_Q4_0> {
    static typename S::V load(const char * p, int i) {
        const char    * block = p + (i/32)*18;
        const uint8_t * bytes = (const uint8_t *) block + 2 + i%16;
        return S::mul(block_scale<S>(block), i%32 < 16 ? S::lo4(bytes) : S::hi4(bytes));
    }
};

} // namespace sfi
