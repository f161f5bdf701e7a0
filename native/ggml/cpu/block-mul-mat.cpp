// BLOCK_MUL_MAT on the CPU: products of quantised weights with many tokens, in integers.
//
// Of all these types a block of 32 values is codes of a few bits, and one or two scales and minima: w = scale*code + min. Activations
// are rounded to 8 bits in blocks of 32, w.x = scale*x_scale*(codes . x_codes) + min*x_scale*(sum of x_codes).
//
// The unit of work is a group of 16 rows of weights and all tokens. A chunk of these rows is unpacked once and interleaved, so that a
// vector holds four codes of each of its rows, then all tokens pass by: weights stay in the nearest cache, activations come in order
// from the next ones.
//
//   pass 1  round the activations (threads share the tokens)
//   pass 2  unpack and interleave a chunk of a group
//   pass 3  add its products to the result of every token
//
// Which thread takes which group changes nothing in the result.

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "ggml-quants.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int block = 32, group = 16;
constexpr int chunk = 512;  // values of a row; a multiple of every type's block
constexpr int n_blocks_of_chunk = chunk/block;
constexpr int64_t line = 64;

// ---- pass 2: codes, scales and minima of one row ----------------------------------------------------------------------
//
// n values from value i of a row, n a multiple of 32: q[n], scale and min [n/32][scales]

struct unpacked_row {
    uint8_t q[chunk];
    float   scale[2*n_blocks_of_chunk], min[2*n_blocks_of_chunk];
};

float half(ggml_half x) { return GGML_CPU_FP16_TO_FP32(x); }

void low_and_high(const uint8_t * packed, uint8_t * q) { // 16 bytes: values 0..15 in low halves, 16..31 in high ones
    for (int j = 0; j < 16; ++j) {
        q[j]      = packed[j] & 15;
        q[j + 16] = packed[j] >> 4;
    }
}

void fifth_bits(const uint8_t * packed, uint8_t * q) {
    uint32_t bits;
    memcpy(&bits, packed, sizeof(bits));
    for (int j = 0; j < 32; ++j) {
        q[j] |= (bits >> j & 1) << 4;
    }
}

float min_of(const block_q4_0 & x) { return -8*half(x.d); }
float min_of(const block_q4_1 & x) { return half(x.m); }
float min_of(const block_q5_0 & x) { return -16*half(x.d); }
float min_of(const block_q5_1 & x) { return half(x.m); }

void add_fifth_bits(const block_q4_0 &, uint8_t *) {}
void add_fifth_bits(const block_q4_1 &, uint8_t *) {}
void add_fifth_bits(const block_q5_0 & x, uint8_t * q) { fifth_bits(x.qh, q); }
void add_fifth_bits(const block_q5_1 & x, uint8_t * q) { fifth_bits(x.qh, q); }

template <class Block> // of 32 values
void unpack(const Block * x, int n, unpacked_row & to) {
    for (int b = 0; b < n/32; ++b) {
        low_and_high(x[b].qs, to.q + 32*b);
        add_fifth_bits(x[b], to.q + 32*b);
        to.scale[b] = half(x[b].d);
        to.min[b]   = min_of(x[b]);
    }
}

// Eight scales and minima of 6 bits in 12 bytes: the first four of each lie whole, the bits of the others are spread.
void unpack_scales(const uint8_t * s, float d, float dmin, float * scale, float * min) {
    for (int j = 0; j < 4; ++j) {
        scale[j]     = d*(s[j] & 63);
        min[j]       = -dmin*(s[j + 4] & 63);
        scale[j + 4] = d*((s[j + 8] & 15) | (s[j] >> 6) << 4);
        min[j + 4]   = -dmin*((s[j + 8] >> 4) | (s[j + 4] >> 6) << 4);
    }
}

void unpack(const block_q4_K * x, int n, unpacked_row & to) {
    for (int b = 0; b < n/QK_K; ++b) {
        unpack_scales(x[b].scales, half(x[b].d), half(x[b].dmin), to.scale + 8*b, to.min + 8*b);
        for (int j = 0; j < 4; ++j) {
            uint8_t * q = to.q + QK_K*b + 64*j;
            for (int l = 0; l < 32; ++l) {
                q[l]      = x[b].qs[32*j + l] & 15;
                q[l + 32] = x[b].qs[32*j + l] >> 4;
            }
        }
    }
}

void unpack(const block_q5_K * x, int n, unpacked_row & to) {
    for (int b = 0; b < n/QK_K; ++b) {
        unpack_scales(x[b].scales, half(x[b].d), half(x[b].dmin), to.scale + 8*b, to.min + 8*b);
        for (int j = 0; j < 4; ++j) {
            uint8_t * q = to.q + QK_K*b + 64*j;
            for (int l = 0; l < 32; ++l) {
                q[l]      = (x[b].qs[32*j + l] & 15) | (x[b].qh[l] >> (2*j)     & 1) << 4;
                q[l + 32] = (x[b].qs[32*j + l] >> 4) | (x[b].qh[l] >> (2*j + 1) & 1) << 4;
            }
        }
    }
}

void unpack(const block_q6_K * x, int n, unpacked_row & to) { // two scales of 16 values each in a block
    for (int b = 0; b < n/QK_K; ++b) {
        for (int j = 0; j < 16; ++j) {
            to.scale[16*b + j] = half(x[b].d)*x[b].scales[j];
            to.min[16*b + j]   = -32*to.scale[16*b + j];
        }
        for (int j = 0; j < 2; ++j) {
            const uint8_t * low = x[b].ql + 64*j, * high = x[b].qh + 32*j;
            uint8_t * q = to.q + QK_K*b + 128*j;
            for (int l = 0; l < 32; ++l) {
                q[l]      = (low[l]      & 15) | (high[l]      & 3) << 4;
                q[l + 32] = (low[l + 32] & 15) | (high[l] >> 2 & 3) << 4;
                q[l + 64] = (low[l]      >> 4) | (high[l] >> 4 & 3) << 4;
                q[l + 96] = (low[l + 32] >> 4) | (high[l] >> 6    ) << 4;
            }
        }
    }
}

// ---- the product ------------------------------------------------------------------------------------------------------

// A block of a group of rows. Scales: of a block.
template <int Scales> struct group_block {
    uint8_t codes[block/4][group][4];
    float   scale[Scales][group], min[Scales][group];
};

// A chunk of a token's activations, rounded. All tokens of a chunk follow each other.
template <int Scales> struct token_chunk {
    int8_t codes[chunk];
    float  scale[n_blocks_of_chunk];
    float  sum[n_blocks_of_chunk][Scales]; // scale times the sum of the codes that share a scale of the weights
};

// out [n_tokens, group] += the products of a chunk. Sums: how many products of two codes fit in 16 bits, one beside the other:
// 15*127*2*8, 31*127*2*4 and 63*127*2*2 do.
template <int Sums, int Scales>
void multiply_scalar(const group_block<Scales> * w, int n_blocks, const token_chunk<Scales> * x, int64_t n_tokens, float * out) {
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int r = 0; r < group; ++r) {
            float y = out[t*group + r];
            for (int b = 0; b < n_blocks; ++b) {
                for (int s = 0; s < Scales; ++s) {
                    int sum = 0;
                    for (int i = s*block/Scales; i < (s + 1)*block/Scales; ++i) {
                        sum += w[b].codes[i/4][r][i % 4]*x[t].codes[b*block + i];
                    }
                    y += sum*w[b].scale[s][r]*x[t].scale[b] + w[b].min[s][r]*x[t].sum[b][s];
                }
            }
            out[t*group + r] = y;
        }
    }
}

#if defined(SFI_AVX2)

// Compilers like to take all products first and then their sums, which needs more registers than there are: what was marked before is
// computed before what is marked after.
#if defined(__GNUC__)
#    define IN_TURN(x) asm volatile("" : "+x"(x))
#else
#    define IN_TURN(x) (void) (x)
#endif

// N tokens and 16 rows
template <int N, int Sums, int Scales>
inline void multiply_tokens(const group_block<Scales> * w, int n_blocks, const token_chunk<Scales> * x, float * out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[N][2];
    SFI_UNROLL
    for (int t = 0; t < N; ++t) {
        acc[t][0] = _mm256_loadu_ps(out + t*group);
        acc[t][1] = _mm256_loadu_ps(out + t*group + 8);
    }
    for (int b = 0; b < n_blocks; ++b) {
        SFI_UNROLL
        for (int s = 0; s < Scales; ++s) {
            __m256i sum[N][2];
            constexpr int of_scale = block/4/Scales;
            SFI_UNROLL
            for (int k0 = 0; k0 < of_scale; k0 += Sums) {
                __m256i part[N][2];
                SFI_UNROLL
                for (int k = k0; k < k0 + Sums; ++k) {
                    const __m256i * codes = (const __m256i *) w[b].codes[s*of_scale + k];
                    __m256i w0 = _mm256_loadu_si256(codes), w1 = _mm256_loadu_si256(codes + 1);
                    IN_TURN(w0);
                    IN_TURN(w1);
                    SFI_UNROLL
                    for (int t = 0; t < N; ++t) {
                        int32_t four;
                        memcpy(&four, x[t].codes + b*block + (s*of_scale + k)*4, sizeof(four));
                        const __m256i y  = _mm256_set1_epi32(four);
                        const __m256i p0 = _mm256_maddubs_epi16(w0, y), p1 = _mm256_maddubs_epi16(w1, y);
                        part[t][0] = k > k0 ? _mm256_add_epi16(part[t][0], p0) : p0;
                        part[t][1] = k > k0 ? _mm256_add_epi16(part[t][1], p1) : p1;
                        IN_TURN(part[t][0]);
                        IN_TURN(part[t][1]);
                    }
                }
                SFI_UNROLL
                for (int t = 0; t < N; ++t) {
                    SFI_UNROLL
                    for (int m = 0; m < 2; ++m) {
                        const __m256i wide = _mm256_madd_epi16(part[t][m], ones);
                        sum[t][m] = k0 > 0 ? _mm256_add_epi32(sum[t][m], wide) : wide;
                    }
                }
            }
            SFI_UNROLL
            for (int m = 0; m < 2; ++m) {
                const __m256 scale = _mm256_loadu_ps(w[b].scale[s] + 8*m), min = _mm256_loadu_ps(w[b].min[s] + 8*m);
                SFI_UNROLL
                for (int t = 0; t < N; ++t) {
                    const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[t][m]), scale);
                    acc[t][m] = _mm256_fmadd_ps(y,   _mm256_set1_ps(x[t].scale[b]),  acc[t][m]);
                    acc[t][m] = _mm256_fmadd_ps(min, _mm256_set1_ps(x[t].sum[b][s]), acc[t][m]);
                }
            }
        }
    }
    SFI_UNROLL
    for (int t = 0; t < N; ++t) {
        _mm256_storeu_ps(out + t*group,     acc[t][0]);
        _mm256_storeu_ps(out + t*group + 8, acc[t][1]);
    }
}

template <int Sums, int Scales>
void multiply_avx2(const group_block<Scales> * w, int n_blocks, const token_chunk<Scales> * x, int64_t n_tokens, float * out) {
    int64_t t = 0;
    for (; t + 4 <= n_tokens; t += 4) {
        multiply_tokens<4, Sums, Scales>(w, n_blocks, x + t, out + t*group);
    }
    for (; t < n_tokens; ++t) {
        multiply_tokens<1, Sums, Scales>(w, n_blocks, x + t, out + t*group);
    }
}

#endif

// ---- the operation ----------------------------------------------------------------------------------------------------

struct task {
    const ggml_tensor * w, * x;
    float * out;
    int64_t n_in, n_out, n_tokens, n_chunks;

    explicit task(const ggml_tensor * dst) :
        w(dst->src[0]), x(dst->src[1]), out((float *) dst->data), n_in(w->ne[0]), n_out(w->ne[1]), n_tokens(x->ne[1]),
        n_chunks((n_in + chunk - 1)/chunk) {}

    int n_of(int64_t c) const { return (int) std::min<int64_t>(chunk, n_in - c*chunk); } // values of a chunk
};

template <class Block, int Sums, int Scales>
struct kernel {
    using weights     = group_block<Scales>;
    using activations = token_chunk<Scales>;

    // of a thread: a chunk of weights, the results of a group
    static size_t thread_bytes(const task & a) {
        return sizeof(weights)*n_blocks_of_chunk + a.n_tokens*group*sizeof(float);
    }

    static size_t work_size(const task & a, int n_threads) {
        return sizeof(activations)*a.n_chunks*a.n_tokens + n_threads*thread_bytes(a) + line;
    }

    // pass 1
    static void round_token(const task & a, int64_t t, activations * all) {
        const float * x = (const float *) ((const char *) a.x->data + t*a.x->nb[1]);
        for (int64_t c = 0; c < a.n_chunks; ++c) {
            activations & to = all[c*a.n_tokens + t];
            for (int b = 0; b < a.n_of(c)/block; ++b) {
                round_block(x + c*chunk + b*block, to.codes + b*block, to.scale[b], to.sum[b]);
            }
        }
    }

    static void round_block(const float * from, int8_t * codes, float & scale, float * sums) {
        float most = 0.0f, nothing = 0.0f;
        for (int i = 0; i < block; ++i) {
            most = std::max(most, std::fabs(from[i]));
            nothing += 0.0f*from[i]; // NaN if one is not finite
        }
        scale = most/127.0f + nothing;
        const float inverse = scale > 0.0f ? 1.0f/scale : 0.0f; // 0 of NaN too
        for (int s = 0; s < Scales; ++s) {
            int sum = 0;
            for (int i = s*block/Scales; i < (s + 1)*block/Scales; ++i) {
                codes[i] = inverse > 0.0f ? (int8_t) std::lrint(from[i]*inverse) : 0;
                sum += codes[i];
            }
            sums[s] = scale*sum;
        }
    }

    // pass 2
    static void fill(const task & a, int64_t row0, int64_t c, weights * to) {
        unpacked_row rows[group];
        const int n = a.n_of(c);
        for (int r = 0; r < group; ++r) {
            unpack((const Block *) ((const char *) a.w->data + (row0 + r)*a.w->nb[1] + ggml_row_size(a.w->type, c*chunk)), n, rows[r]);
        }
        for (int b = 0; b < n/block; ++b) {
            for (int r = 0; r < group; ++r) {
                for (int k = 0; k < block/4; ++k) {
                    memcpy(to[b].codes[k][r], rows[r].q + b*block + 4*k, 4);
                }
                for (int s = 0; s < Scales; ++s) {
                    to[b].scale[s][r] = rows[r].scale[b*Scales + s];
                    to[b].min[s][r]   = rows[r].min[b*Scales + s];
                }
            }
        }
    }

    // pass 3
    static void multiply(const weights * w, int n_blocks, const activations * x, int64_t n_tokens, float * out, bool reference) {
#if defined(SFI_AVX2)
        if (sfi::simd_for(reference) != sfi::simd::scalar) {
            return multiply_avx2<Sums, Scales>(w, n_blocks, x, n_tokens, out);
        }
#else
        GGML_UNUSED(reference);
#endif
        multiply_scalar<Sums, Scales>(w, n_blocks, x, n_tokens, out);
    }

    static void compute_group(const task & a, int64_t row0, const activations * x, char * scratch, bool reference) {
        weights * w   = (weights *) scratch;
        float   * out = (float *) (w + n_blocks_of_chunk);
        std::fill_n(out, a.n_tokens*group, 0.0f);
        for (int64_t c = 0; c < a.n_chunks; ++c) {
            fill(a, row0, c, w);
            multiply(w, a.n_of(c)/block, x + c*a.n_tokens, a.n_tokens, out, reference);
        }
        for (int64_t t = 0; t < a.n_tokens; ++t) {
            std::copy_n(out + t*group, group, a.out + t*a.n_out + row0);
        }
    }

    static void compute(const ggml_compute_params * params, ggml_tensor * dst) {
        const task a(dst);
        activations * x = (activations *) GGML_PAD((uintptr_t) params->wdata, line);
        char * scratch  = (char *) (x + a.n_chunks*a.n_tokens) + params->ith*thread_bytes(a);

        for (int64_t t = params->ith; t < a.n_tokens; t += params->nth) {
            round_token(a, t, x);
        }
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t i = params->ith; i < a.n_out/group; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            compute_group(a, i*group, x, scratch, params->use_ref);
        }
    }
};

struct kernel_functions {
    void   (*compute)  (const ggml_compute_params * params, ggml_tensor * dst);
    size_t (*work_size)(const task & a, int n_threads);
};

template <class Kernel> kernel_functions functions_of() {
    return { Kernel::compute, Kernel::work_size };
}

kernel_functions kernel_for(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return functions_of<kernel<block_q4_0, 8, 1>>();
        case GGML_TYPE_Q4_1: return functions_of<kernel<block_q4_1, 8, 1>>();
        case GGML_TYPE_Q4_K: return functions_of<kernel<block_q4_K, 8, 1>>();
        case GGML_TYPE_Q5_0: return functions_of<kernel<block_q5_0, 4, 1>>();
        case GGML_TYPE_Q5_1: return functions_of<kernel<block_q5_1, 4, 1>>();
        case GGML_TYPE_Q5_K: return functions_of<kernel<block_q5_K, 4, 1>>();
        case GGML_TYPE_Q6_K: return functions_of<kernel<block_q6_K, 2, 2>>();
        default:             return { nullptr, nullptr };
    }
}

} // namespace

void sfi::block_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    kernel_for(dst->src[0]->type).compute(params, dst);
}

size_t sfi::block_mul_mat_work_size(const ggml_tensor * dst, int n_threads) {
    return kernel_for(dst->src[0]->type).work_size(task(dst), n_threads);
}

bool sfi::block_mul_mat_supported(const ggml_tensor * dst) {
    return kernel_for(dst->src[0]->type).compute;
}
