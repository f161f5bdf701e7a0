// BLOCK_MUL_MAT on the CPU: products of weights with many tokens.
//
// The unit of work is a strip of rows of weights and all tokens. A chunk of these rows is converted to F32 and packed into panels
// once (block-product.h), then all tokens pass by: a panel stays in the nearest cache, activations come from the second one.
//
//   pass 1  convert and pack a chunk of the strip
//   pass 2  add its products to the result of every token
//
// Which thread takes which strip changes nothing in the result.

#include "sfi-ops.h"

#include "block-product.h"
#include "ggml-cpu-impl.h"

#include <algorithm>

namespace {

constexpr int64_t chunk      = 256; // values of a row; whole blocks of every type
constexpr int64_t max_strip  = 64, min_strip = 32; // rows; whole panels of every instruction set
constexpr int64_t some_tokens = 192; // that stay in the second level for all panels of a strip
constexpr int64_t line_floats = 16;

struct task {
    const ggml_tensor * w, * x;
    float * out;
    ggml_to_float_t to_float; // null: F32
    int64_t n_in, n_out, n_tokens, ld_x, strip;

    explicit task(const ggml_tensor * dst) :
        w(dst->src[0]), x(dst->src[1]), out((float *) dst->data), to_float(ggml_get_type_traits(w->type)->to_float),
        n_in(w->ne[0]), n_out(w->ne[1]), n_tokens(x->ne[1]), ld_x(x->nb[1]/sizeof(float)),
        strip(n_out/max_strip >= 8 && n_out % max_strip == 0 ? max_strip : min_strip) {}
};

constexpr int64_t scratch_floats = max_strip*chunk + 16*chunk; // panels, rows

// pass 1: values [i0, i0 + n) of the rows from row0
template <class S>
void pack(const task & a, int64_t row0, int64_t i0, int64_t n, float * panels, float * rows) {
    constexpr int P = sfi::panel_of<S>;
    for (int64_t r = 0; r < a.strip; r += S::W) {
        for (int64_t j = 0; j < S::W; ++j) {
            const char * from = (const char *) a.w->data + (row0 + r + j)*a.w->nb[1] + ggml_row_size(a.w->type, i0);
            if (a.to_float) {
                a.to_float(from, rows + j*chunk, n);
            } else {
                memcpy(rows + j*chunk, from, n*sizeof(float));
            }
        }
        float * panel = panels + r/P*P*n + r % P;
        for (int64_t i = 0; i < n; i += S::W) {
            S::transpose(rows + i, chunk, panel + i*P, P);
        }
    }
}

// pass 2
template <class S>
void multiply(const task & a, int64_t row0, int64_t i0, int64_t n, const float * panels) {
    constexpr int P = sfi::panel_of<S>;
    static const struct all_ones {
        float x[some_tokens];
        all_ones() { std::fill(x, x + some_tokens, 1.0f); }
    } ones;
    for (int64_t t = 0; t < a.n_tokens; t += some_tokens) {
        const int n_rows = (int) std::min(some_tokens, a.n_tokens - t);
        const float * x = (const float *) a.x->data + t*a.ld_x + i0;
        for (int64_t r = 0; r < a.strip; r += P) {
            sfi::product_rows<S, sfi::shape<S>::N>(x, a.ld_x, panels + r*n, (int) n, i0 > 0 ? ones.x : nullptr,
                                                   a.out + t*a.n_out + row0 + r, a.n_out, n_rows);
        }
    }
}

template <class S>
void compute_strip(const task & a, int64_t row0, float * scratch) {
    for (int64_t i = 0; i < a.n_in; i += chunk) {
        const int64_t n = std::min(chunk, a.n_in - i);
        pack<S>(a, row0, i, n, scratch, scratch + max_strip*chunk);
        multiply<S>(a, row0, i, n, scratch);
    }
}

using compute_fn = void (*)(const task & a, int64_t row0, float * scratch);

compute_fn compute_for(bool reference) {
    switch (sfi::simd_for(reference)) {
#if defined(SFI_AVX512)
        case sfi::simd::avx512: return compute_strip<sfi::avx512>;
#endif
#if defined(SFI_AVX2)
        case sfi::simd::avx2:   return compute_strip<sfi::avx2>;
#endif
#if defined(SFI_NEON)
        case sfi::simd::neon:   return compute_strip<sfi::neon>;
#endif
        default:                return compute_strip<sfi::scalar>;
    }
}

} // namespace

void sfi::block_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(dst);
    const compute_fn compute = compute_for(params->use_ref);
    float * scratch = (float *) GGML_PAD((uintptr_t) params->wdata, line_floats*sizeof(float)) + params->ith*scratch_floats;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < a.n_out/a.strip; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        compute(a, i*a.strip, scratch);
    }
}

size_t sfi::block_mul_mat_work_size(const ggml_tensor *, int n_threads) {
    return (n_threads*scratch_floats + line_floats)*sizeof(float);
}

bool sfi::block_mul_mat_supported(const ggml_tensor * dst) {
    return chunk % ggml_blck_size(dst->src[0]->type) == 0;
}
