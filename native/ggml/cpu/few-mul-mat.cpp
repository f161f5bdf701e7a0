// FEW_MUL_MAT on the CPU: products of quantised weights with a few tokens, each bit for bit what the product of that token alone is.
//
// That of a token alone is upstream's vec_dot of a row and the token's rounded activations: eight sums in F32, lane l over the values
// 4l .. 4l+3 of every 32; to these it adds once a block (K quants: once in 256 values) a sum of integers times two scales, and at the
// end it adds up the lanes. Integers may be summed in any order, floats may not: here lanes, blocks and roundings follow each other as
// there, and what concerns a row alone (its codes, scales, minima) is unpacked once for all tokens.
//
// The unit of work is a group of rows and all tokens. A part of each row passes by while the tokens' activations of that part stay
// in a near cache; sums of rows and tokens wait in memory between the parts.
//
//   pass 1  round the activations as upstream does, and lay them out in the order of pass 2 (threads share them)
//   pass 2  unpack a unit of a row into registers, add its products to the sums of every token
//
// Which thread takes which group changes nothing in the result.

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-quants.h"
#include "simd.h"

#include <algorithm>

#if defined(SFI_AVX2)

namespace {

using sfi::avx2;

constexpr int64_t line = 64;
constexpr int     unit = 256;             // most values that a row has in registers
constexpr int64_t part_bytes = 32 << 10;  // of activations: longer runs of a row count more than the nearest cache
constexpr int64_t sum_bytes  = 12 << 10;  // of sums

int64_t pad(int64_t n, int64_t to) { return (n + to - 1)/to*to; }

float half(ggml_half x) { return GGML_CPU_FP16_TO_FP32(x); }

__m256i load(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }

// Upstream leaves it to the compiler whether this is rounded once or twice, and so do we.
__m256 multiply_add(__m256 a, __m256 b, __m256 c) {
#if defined(__GNUC__)
    return a*b + c;
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// ---- what pass 2 reads ------------------------------------------------------------------------------------------------
//
// A unit has n_values of a row. Of every unit all tokens follow each other.

struct activations {
    int8_t  * codes;  // [unit][token][values]
    int16_t * sums;   // [unit][token, padded][16 or 8], K quants: sums of 16 or 32 codes
    float   * scale;  // [unit][token, padded][1 or 8]
    float   * offset; // [block][token, padded], types of blocks with a minimum: scale times the sum of the codes
};

// scale[t] of all tokens times that of a block of a row
void combine(float d, const float * scale, int64_t n_padded, float * out) {
    for (int64_t t = 0; t < n_padded; t += 8) {
        _mm256_store_ps(out + t, _mm256_mul_ps(_mm256_set1_ps(d), _mm256_load_ps(scale + t)));
    }
}

// ---- K quants ---------------------------------------------------------------------------------------------------------
//
// Of 64 codes, two runs of 32 with a scale each (Q6_K: two), the first vector takes of every four codes the first two of both runs,
// the second the other two: beside each other in a lane then lie the sums of both runs, and one multiplication applies both scales.

void interleave(__m256i run0, __m256i run1, __m256i & first, __m256i & second) {
    first  = _mm256_blend_epi16(run0, _mm256_slli_epi32(run1, 16), 0xAA);
    second = _mm256_blend_epi16(_mm256_srli_epi32(run0, 16), run1, 0xAA);
}

struct unpacked {
    __m256i first[4], second[4], scale[4];
};

__m256i four_sums(const unpacked & w, int i, const int8_t * x) {
    const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(w.first[i], load(x + 64*i)), _mm256_maddubs_epi16(w.second[i], load(x + 64*i + 32)));
    return _mm256_madd_epi16(w.scale[i], sum);
}

// Eight scales and minima of 6 bits in 12 bytes: the first four of each lie whole, the bits of the others are spread.
void unpack_scales(const uint8_t * packed, __m128i & scale, __m128i & min) {
    uint32_t s[3];
    memcpy(s, packed, sizeof(s));
    const uint32_t scale_4 = (s[2]      & 0x0f0f0f0f) | (s[0] >> 2 & 0x30303030);
    const uint32_t min_4   = (s[2] >> 4 & 0x0f0f0f0f) | (s[1] >> 2 & 0x30303030);
    scale = _mm_cvtepu8_epi16(_mm_set_epi32(0, 0, scale_4, s[0] & 0x3f3f3f3f));
    min   = _mm_cvtepu8_epi16(_mm_set_epi32(0, 0, min_4,   s[1] & 0x3f3f3f3f));
}

void spread(__m256i scales, __m256i * scale) { // a pair for each 64 codes, in every lane
    scale[0] = _mm256_shuffle_epi32(scales, 0x00);
    scale[1] = _mm256_shuffle_epi32(scales, 0x55);
    scale[2] = _mm256_shuffle_epi32(scales, 0xAA);
    scale[3] = _mm256_shuffle_epi32(scales, 0xFF);
}

struct q4_K {
    using block = block_q4_K;
    static constexpr int n_sums = 8, n_minima = 4;

    static void codes(const block & x, unpacked & w) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int i = 0; i < 4; ++i) { // as interleave() of low and high halves
            const __m256i q = load(x.qs + 32*i);
            w.first[i]  = _mm256_and_si256(mask, _mm256_blend_epi16(q, _mm256_slli_epi32(q, 12), 0xAA));
            w.second[i] = _mm256_and_si256(mask, _mm256_blend_epi16(_mm256_srli_epi32(q, 16), _mm256_srli_epi32(q, 4), 0xAA));
        }
    }

    // sums in lanes, as upstream has them before it adds them up
    static void add_minima(const block & x, __m128i min, int64_t n_tokens, const int16_t * x_sums, const float * x_scale, float * out) {
        const __m256i mins = _mm256_broadcastsi128_si256(min), two = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        const __m256  d = _mm256_set1_ps(-half(x.dmin));
        for (int64_t t = 0; t < n_tokens; t += 4) {
            SFI_UNROLL
            for (int i = 0; i < 4; i += 2) { // two tokens
                double scales;
                memcpy(&scales, x_scale + t + i, sizeof(scales));
                const __m256 scale = _mm256_mul_ps(_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(scales)), two), d);
                const __m256 y = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, load(x_sums + 8*(t + i))));
                _mm256_store_ps(out + 4*(t + i), _mm256_fmadd_ps(scale, y, _mm256_load_ps(out + 4*(t + i))));
            }
        }
    }
};

struct q5_K {
    using block = block_q5_K;
    static constexpr int n_sums = 8, n_minima = 1;

    template <int bit> static __m256i fifth(__m256i high) { // 16 where a byte has the bit
        return _mm256_and_si256(_mm256_set1_epi8(16), bit < 4 ? _mm256_slli_epi16(high, bit < 4 ? 4 - bit : 0) : _mm256_srli_epi16(high, bit < 4 ? 0 : bit - 4));
    }

    template <int i> static void codes(const block & x, __m256i high, unpacked & w) {
        const __m256i q = load(x.qs + 32*i), mask = _mm256_set1_epi8(15);
        interleave(_mm256_or_si256(_mm256_and_si256(q, mask), fifth<2*i>(high)),
                   _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q, 4), mask), fifth<2*i + 1>(high)), w.first[i], w.second[i]);
    }

    static void codes(const block & x, unpacked & w) {
        const __m256i high = load(x.qh);
        codes<0>(x, high, w);
        codes<1>(x, high, w);
        codes<2>(x, high, w);
        codes<3>(x, high, w);
    }

    // one sum, as upstream has it
    static void add_minima(const block & x, __m128i min, int64_t n_tokens, const int16_t * x_sums, const float * x_scale, float * out) {
        const __m256i mins = _mm256_broadcastsi128_si256(min), in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256  d = _mm256_set1_ps(-half(x.dmin));
        for (int64_t t = 0; t < n_tokens; t += 8) {
            const auto two = [&](int i) { return _mm256_madd_epi16(mins, load(x_sums + 8*(t + i))); };
            const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(two(0), two(2)), _mm256_hadd_epi32(two(4), two(6)));
            const __m256  y   = _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(sum, in_order));
            _mm256_store_ps(out + t, multiply_add(_mm256_mul_ps(d, _mm256_load_ps(x_scale + t)), y, _mm256_load_ps(out + t)));
        }
    }
};

// of a type with minima
template <class Type>
void add_256(const typename Type::block & x, int64_t n_tokens, const int8_t * x_codes, const int16_t * x_sums, const float * x_scale,
             const float * scale, float * lanes, float * minima) {
    __m128i scales, mins;
    unpack_scales(x.scales, scales, mins);
    Type::add_minima(x, mins, n_tokens, x_sums, x_scale, minima);
    unpacked w;
    Type::codes(x, w);
    spread(_mm256_broadcastsi128_si256(scales), w.scale);
    for (int64_t t = 0; t < n_tokens; ++t, x_codes += unit) {
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(four_sums(w, 0, x_codes), four_sums(w, 1, x_codes)),
                                             _mm256_add_epi32(four_sums(w, 2, x_codes), four_sums(w, 3, x_codes)));
        _mm256_store_ps(lanes + 8*t, _mm256_fmadd_ps(_mm256_set1_ps(scale[t]), _mm256_cvtepi32_ps(sum), _mm256_load_ps(lanes + 8*t)));
    }
}

struct q6_K {
    using block = block_q6_K;
    static constexpr int n_sums = 16, n_minima = 0;

    static void codes(const block & x, unpacked & w) {
        const __m256i four = _mm256_set1_epi8(15), two = _mm256_set1_epi8(48);
        for (int i = 0; i < 2; ++i) {
            const __m256i low0 = load(x.ql + 64*i), low1 = load(x.ql + 64*i + 32), high = load(x.qh + 32*i);
            const auto code = [&](__m256i low, __m256i high) {
                return _mm256_or_si256(_mm256_and_si256(low, four), _mm256_and_si256(high, two));
            };
            interleave(code(low0, _mm256_slli_epi16(high, 4)), code(low1, _mm256_slli_epi16(high, 2)), w.first[2*i], w.second[2*i]);
            interleave(code(_mm256_srli_epi16(low0, 4), high), code(_mm256_srli_epi16(low1, 4), _mm256_srli_epi16(high, 2)),
                       w.first[2*i + 1], w.second[2*i + 1]);
        }
    }

    static void add(const block & x, int64_t n_tokens, const int8_t * x_codes, const int16_t * x_sums, const float * scale, float * lanes) {
        const __m128i scales = _mm_loadu_si128((const __m128i *) x.scales);
        // a code stands for 32 less
        const __m256i less = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16(_mm256_cvtepi8_epi16(scales), 5));
        unpacked w;
        codes(x, w);
        // lanes 0..3 have the first scale of a run, 4..7 the second
        const __m256i of_lanes = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
        spread(of_lanes, w.scale);
        for (int64_t t = 0; t < n_tokens; ++t, x_codes += unit) {
            __m256i sum = _mm256_madd_epi16(less, load(x_sums + 16*t));
            sum = _mm256_add_epi32(_mm256_add_epi32(sum, four_sums(w, 0, x_codes)), four_sums(w, 1, x_codes));
            sum = _mm256_add_epi32(_mm256_add_epi32(four_sums(w, 2, x_codes), four_sums(w, 3, x_codes)), sum);
            _mm256_store_ps(lanes + 8*t, _mm256_fmadd_ps(_mm256_set1_ps(scale[t]), _mm256_cvtepi32_ps(sum), _mm256_load_ps(lanes + 8*t)));
        }
    }
};

template <class Type> struct k_quant {
    using block = typename Type::block;
    static constexpr int  max_blocks = 1;  // of a unit
    static constexpr int  n_values   = QK_K; // of a block
    static constexpr int  n_sums     = Type::n_sums;
    static constexpr int  n_scales   = 1;
    static constexpr int  n_minima   = Type::n_minima; // sums of a token
    static constexpr bool has_offset = false;

    static void round(const float * x, const activations & to, int64_t unit, int, int64_t n_padded, int64_t, int64_t t, int8_t * codes) {
        block_q8_K y = {};
        ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float(x, &y, QK_K);
        for (int i = 0; i < 4; ++i) {
            __m256i first, second;
            interleave(load(y.qs + 64*i), load(y.qs + 64*i + 32), first, second);
            _mm256_storeu_si256((__m256i *) (codes + 64*i),      first);
            _mm256_storeu_si256((__m256i *) (codes + 64*i + 32), second);
        }
        int16_t * sums = to.sums + (unit*n_padded + t)*n_sums;
        for (int i = 0; i < n_sums; ++i) {
            sums[i] = n_sums == 16 ? y.bsums[i] : (int16_t) (y.bsums[2*i] + y.bsums[2*i + 1]);
        }
        to.scale[unit*n_padded + t] = y.d;
    }

    static void add(const block * w, int, int64_t unit, int64_t, const int8_t * codes, const activations & x, int64_t n_tokens, int64_t n_padded,
                    float * scale, float * lanes, float * minima) {
        const float * x_scale = x.scale + unit*n_padded;
        combine(half(w->d), x_scale, n_padded, scale);
        const int16_t * sums = x.sums + unit*n_padded*n_sums;
        if constexpr (n_minima > 0) {
            add_256<Type>(*w, n_tokens, codes, sums, x_scale, scale, lanes, minima);
        } else {
            Type::add(*w, n_tokens, codes, sums, scale, lanes);
        }
    }
};

// ---- blocks of 32 -----------------------------------------------------------------------------------------------------

__m256i low_and_high(const uint8_t * packed) { // 16 bytes: values 0..15 in low halves, 16..31 in high ones
    const __m128i q = _mm_loadu_si128((const __m128i *) packed);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
}

__m256i fifth_bits(const uint8_t * packed) { // 16 where the bit is set
    int32_t bits;
    memcpy(&bits, packed, sizeof(bits));
    const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit     = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    const __m256i mine    = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), of_byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(mine, bit), _mm256_set1_epi8(16));
}

struct q4_0 {
    using block = block_q4_0;
    static constexpr bool is_signed = true;
    static __m256i codes(const block & x) { return _mm256_sub_epi8(low_and_high(x.qs), _mm256_set1_epi8(8)); }
};
struct q5_0 {
    using block = block_q5_0;
    static constexpr bool is_signed = true;
    static __m256i codes(const block & x) {
        return _mm256_sub_epi8(_mm256_or_si256(low_and_high(x.qs), fifth_bits(x.qh)), _mm256_set1_epi8(16));
    }
};
struct q8_0 {
    using block = block_q8_0;
    static constexpr bool is_signed = true;
    static __m256i codes(const block & x) { return load(x.qs); }
};
struct q4_1 {
    using block = block_q4_1;
    static constexpr bool is_signed = false;
    static __m256i codes(const block & x) { return low_and_high(x.qs); }
};
struct q5_1 {
    using block = block_q5_1;
    static constexpr bool is_signed = false;
    static __m256i codes(const block & x) { return _mm256_or_si256(low_and_high(x.qs), fifth_bits(x.qh)); }
};

template <class Type> struct small_blocks {
    using block = typename Type::block;
    static constexpr int  max_blocks = 8; // of a unit
    static constexpr int  n_values   = 32;
    static constexpr int  n_sums     = 0;
    static constexpr int  n_scales   = max_blocks;
    static constexpr int  n_minima   = Type::is_signed ? 0 : 1;
    static constexpr bool has_offset = !Type::is_signed;

    static void round(const float * x, const activations & to, int64_t unit, int b, int64_t n_padded, int64_t first, int64_t t, int8_t * codes) {
        float & scale = to.scale[(unit*n_padded + t)*n_scales + b];
        if constexpr (Type::is_signed) {
            block_q8_0 y;
            ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(x, &y, n_values);
            memcpy(codes, y.qs, n_values);
            scale = half(y.d);
        } else {
            block_q8_1 y;
            ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float(x, &y, n_values);
            memcpy(codes, y.qs, n_values);
            scale = half(y.d);
            to.offset[(first + b)*n_padded + t] = half(y.s);
        }
    }

    template <int N>
    static void add_minima(const block * w, const float * offset, int64_t n_padded, float * minima) {
        for (int64_t t = 0; t < n_padded; t += 8) {
            __m256 sum = _mm256_load_ps(minima + t);
            SFI_UNROLL
            for (int b = 0; b < N; ++b) {
                sum = multiply_add(avx2::half(w[b].m), _mm256_load_ps(offset + b*n_padded + t), sum);
            }
            _mm256_store_ps(minima + t, sum);
        }
    }

    template <int N>
    static void add_blocks(const block * w, const int8_t * codes, const float * x_scale, int64_t n_tokens, float * scale, float * lanes) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i q[N], size[N];
        alignas(16) ggml_half d[max_blocks] = {};
        SFI_UNROLL
        for (int b = 0; b < N; ++b) {
            q[b]    = Type::codes(w[b]);
            size[b] = _mm256_abs_epi8(q[b]);
            d[b]    = w[b].d;
        }
        const __m256 w_scale = _mm256_cvtph_ps(_mm_load_si128((const __m128i *) d));
        for (int64_t t = 0; t < n_tokens; ++t, codes += N*n_values, scale += n_scales) {
            _mm256_store_ps(scale, _mm256_mul_ps(w_scale, _mm256_load_ps(x_scale + t*n_scales)));
            __m256 sum = _mm256_load_ps(lanes + 8*t);
            SFI_UNROLL
            for (int b = 0; b < N; ++b) {
                const __m256i x = load(codes + b*n_values);
                const __m256i dot = Type::is_signed ? _mm256_maddubs_epi16(size[b], _mm256_sign_epi8(x, q[b])) : _mm256_maddubs_epi16(q[b], x);
                sum = _mm256_fmadd_ps(_mm256_set1_ps(scale[b]), _mm256_cvtepi32_ps(_mm256_madd_epi16(ones, dot)), sum);
            }
            _mm256_store_ps(lanes + 8*t, sum);
        }
    }

    template <int N>
    static void add_unit(const block * w, int64_t unit, int64_t first, const int8_t * codes, const activations & x, int64_t n_tokens,
                         int64_t n_padded, float * scale, float * lanes, float * minima) {
        add_blocks<N>(w, codes, x.scale + unit*n_padded*n_scales, n_tokens, scale, lanes);
        if constexpr (has_offset) {
            add_minima<N>(w, x.offset + first*n_padded, n_padded, minima);
        }
    }

    static void add(const block * w, int n, int64_t unit, int64_t first, const int8_t * codes, const activations & x, int64_t n_tokens,
                    int64_t n_padded, float * scale, float * lanes, float * minima) {
        using add_unit_of = decltype(&add_unit<1>);
        static constexpr add_unit_of of[max_blocks] = {
            add_unit<1>, add_unit<2>, add_unit<3>, add_unit<4>, add_unit<5>, add_unit<6>, add_unit<7>, add_unit<8>,
        };
        of[n - 1](w, unit, first, codes, x, n_tokens, n_padded, scale, lanes, minima);
    }
};

// ---- the lanes of a sum, added up as upstream does ----------------------------------------------------------------------

// Of four vectors (0 + 2) + (1 + 3)
__m128 add_lanes(__m128 a, __m128 b, __m128 c, __m128 d) {
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)), cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    return _mm_hadd_ps(ab, cd);
}

__m128 halves(const float * eight) { return _mm_add_ps(_mm_load_ps(eight + 4), _mm_load_ps(eight)); }

// ---- the operation ----------------------------------------------------------------------------------------------------

template <class Kernel>
struct operation {
    using block = typename Kernel::block;
    static constexpr int n_values = Kernel::n_values;

    const ggml_tensor * w, * x;
    float * out;
    int64_t n_in, n_out, n_tokens, n_padded, n_blocks, n_units, n_rows, units_of_part;

    explicit operation(const ggml_tensor * dst) :
        w(dst->src[0]), x(dst->src[1]), out((float *) dst->data), n_in(w->ne[0]), n_out(w->ne[1]), n_tokens(x->ne[1]),
        n_padded(pad(n_tokens, 8)), n_blocks(n_in/n_values), n_units((n_blocks + Kernel::max_blocks - 1)/Kernel::max_blocks),
        n_rows(std::clamp<int64_t>(sum_bytes/(n_padded*32), 2, 16)), units_of_part(std::max<int64_t>(1, part_bytes/(n_tokens*unit))) {}

    int64_t first_of(int64_t unit) const { return unit*n_blocks/n_units; } // the first block of a unit

    int8_t * codes_of(const activations & a, int64_t unit) const { return a.codes + first_of(unit)*n_values*n_tokens; }

    size_t codes_bytes() const { return pad(n_in*n_tokens, line); }
    size_t sums_bytes()  const { return pad(n_units*n_padded*Kernel::n_sums*sizeof(int16_t), line); }
    size_t scale_bytes() const { return pad(n_units*n_padded*Kernel::n_scales*sizeof(float), line); }
    size_t all_bytes()   const { return codes_bytes() + sums_bytes() + scale_bytes() + (Kernel::has_offset ? n_blocks*n_padded*sizeof(float) : 0); }

    size_t lanes_floats()  const { return n_rows*n_padded*8; }
    size_t minima_floats() const { return n_rows*n_padded*Kernel::n_minima; }
    size_t thread_bytes()  const { return pad((lanes_floats() + minima_floats() + Kernel::n_scales*n_padded)*sizeof(float), line); }

    size_t work_size(int n_threads) const { return all_bytes() + n_threads*thread_bytes() + line; }

    activations in(char * memory) const {
        activations a;
        a.codes  = (int8_t  *) memory;
        a.sums   = (int16_t *) (memory + codes_bytes());
        a.scale  = (float   *) (memory + codes_bytes() + sums_bytes());
        a.offset = (float   *) (memory + codes_bytes() + sums_bytes() + scale_bytes());
        return a;
    }

    // pass 1
    void round(const activations & to, int64_t unit) const {
        const int64_t first = first_of(unit), n = first_of(unit + 1) - first;
        for (int64_t t = 0; t < n_tokens; ++t) {
            const float * row = (const float *) ((const char *) x->data + t*x->nb[1]) + first*n_values;
            for (int64_t b = 0; b < n; ++b) {
                Kernel::round(row + b*n_values, to, unit, (int) b, n_padded, first, t, codes_of(to, unit) + (t*n + b)*n_values);
            }
        }
    }

    // what belongs to no token is read, though nothing comes of it
    void clear_padding(const activations & to) const {
        for (int64_t t = n_tokens; t < n_padded; ++t) {
            for (int64_t u = 0; u < n_units; ++u) {
                std::fill_n(to.scale + (u*n_padded + t)*Kernel::n_scales, Kernel::n_scales, 0.0f);
                std::fill_n(to.sums  + (u*n_padded + t)*Kernel::n_sums,   Kernel::n_sums,   (int16_t) 0);
            }
            for (int64_t b = 0; Kernel::has_offset && b < n_blocks; ++b) {
                to.offset[b*n_padded + t] = 0.0f;
            }
        }
    }

    // pass 2
    void compute_group(const activations & from, int64_t row0, float * scratch) const {
        const int64_t n = std::min(n_rows, n_out - row0);
        float * lanes = scratch, * minima = lanes + lanes_floats(), * scale = minima + minima_floats();
        std::fill_n(lanes, lanes_floats() + minima_floats(), 0.0f);
        for (int64_t part = 0; part < n_units; part += units_of_part) {
            const int64_t end = std::min(n_units, part + units_of_part);
            for (int64_t r = 0; r < n; ++r) {
                const block * row = (const block *) ((const char *) w->data + (row0 + r)*w->nb[1]);
                for (int64_t u = part; u < end; ++u) {
                    const int64_t first = first_of(u);
                    Kernel::add(row + first, (int) (first_of(u + 1) - first), u, first, codes_of(from, u), from, n_tokens, n_padded, scale,
                                lanes + r*n_padded*8, minima + r*n_padded*Kernel::n_minima);
                }
            }
        }
        for (int64_t r = 0; r < n; ++r) {
            finish(lanes + r*n_padded*8, minima + r*n_padded*Kernel::n_minima, out + row0 + r);
        }
    }

    void finish(const float * lanes, const float * minima, float * to) const {
        for (int64_t t = 0; t < n_tokens; t += 4) {
            const float * l = lanes + t*8, * m = minima + t*Kernel::n_minima;
            __m128 y = add_lanes(halves(l), halves(l + 8), halves(l + 16), halves(l + 24));
            if (Kernel::n_minima == 4) {
                y = _mm_add_ps(y, add_lanes(_mm_load_ps(m), _mm_load_ps(m + 4), _mm_load_ps(m + 8), _mm_load_ps(m + 12)));
            } else if (Kernel::n_minima == 1) {
                y = _mm_add_ps(y, _mm_load_ps(m));
            }
            alignas(16) float four[4];
            _mm_store_ps(four, y);
            for (int64_t i = 0; i < std::min<int64_t>(4, n_tokens - t); ++i) {
                to[(t + i)*n_out] = four[i];
            }
        }
    }

    static void compute(const ggml_compute_params * params, ggml_tensor * dst) {
        const operation a(dst);
        char * memory = (char *) GGML_PAD((uintptr_t) params->wdata, line);
        const activations x = a.in(memory);

        for (int64_t u = params->ith; u < a.n_units; u += params->nth) {
            a.round(x, u);
        }
        if (params->ith == 0) {
            a.clear_padding(x);
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        float * scratch = (float *) (memory + a.all_bytes() + params->ith*a.thread_bytes());
        for (int64_t i = params->ith; i*a.n_rows < a.n_out; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            a.compute_group(x, i*a.n_rows, scratch);
        }
    }

    static size_t work_size_of(const ggml_tensor * dst, int n_threads) { return operation(dst).work_size(n_threads); }
};

struct kernel_functions {
    void   (*compute)  (const ggml_compute_params * params, ggml_tensor * dst);
    size_t (*work_size)(const ggml_tensor * dst, int n_threads);
};

template <class Kernel> kernel_functions functions_of() {
    return { operation<Kernel>::compute, operation<Kernel>::work_size_of };
}

kernel_functions kernel_for(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return functions_of<small_blocks<q4_0>>();
        case GGML_TYPE_Q4_1: return functions_of<small_blocks<q4_1>>();
        case GGML_TYPE_Q5_0: return functions_of<small_blocks<q5_0>>();
        case GGML_TYPE_Q5_1: return functions_of<small_blocks<q5_1>>();
        case GGML_TYPE_Q8_0: return functions_of<small_blocks<q8_0>>();
        case GGML_TYPE_Q4_K: return functions_of<k_quant<q4_K>>();
        case GGML_TYPE_Q5_K: return functions_of<k_quant<q5_K>>();
        case GGML_TYPE_Q6_K: return functions_of<k_quant<q6_K>>();
        default:             return { nullptr, nullptr };
    }
}

} // namespace

void sfi::few_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    kernel_for(dst->src[0]->type).compute(params, dst);
}

size_t sfi::few_mul_mat_work_size(const ggml_tensor * dst, int n_threads) {
    return kernel_for(dst->src[0]->type).work_size(dst, n_threads);
}

bool sfi::few_mul_mat_supported(const ggml_tensor * dst) {
    return kernel_for(dst->src[0]->type).compute;
}

#else // upstream's products are computed otherwise, and asked for

void sfi::few_mul_mat(const ggml_compute_params *, ggml_tensor *) { GGML_ABORT("FEW_MUL_MAT without AVX2"); }
size_t sfi::few_mul_mat_work_size(const ggml_tensor *, int) { return 0; }
bool sfi::few_mul_mat_supported(const ggml_tensor *) { return false; }

#endif
