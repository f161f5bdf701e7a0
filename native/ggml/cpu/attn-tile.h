// The two inner loops of attention over a tile of rows gathered from the cache, and the table that
// picks their instruction set and row type once per operation.

#pragma once

#include "simd.h"

namespace sfi {

// Rows of the cache: row i starts at start[i] + offset. `next` are the rows that will be needed after these; they are
// fetched along the way (n_next may be 0).
struct row_set {
    const char * const * start;
    size_t               offset;
    int                  n;
    const char * const * next;
    size_t               next_offset, next_size;
    int                  n_next;
};

// out[g*ld + c] = q_g . k_c      for g < n_q rows of q [n_q, n_embd] and c < rows.n
using dot_fn = void (*)(const float * q, int n_q, int n_embd, const row_set & rows, float * out, int ld);

// o[g*ld_o + d] += sum_c p[g*ld + c] v_c[d]   for g < n_q, d < n_embd
using mad_fn = void (*)(const float * p, int ld, int n_q, int n_embd, const row_set & rows, float * o, int64_t ld_o);

// x[i] = exp(x[i] - max), returns the sum; n is rounded up to a vector, the excess must be -INFINITY
using exp_fn = float (*)(float * x, int n, float max);

// the largest of x[0 .. n), n >= 1, rounded up to a vector; the excess must be -INFINITY
using max_fn = float (*)(const float * x, int n);

// out [n_embd, ld] = the gathered rows, transposed, in F32; columns beyond rows.n are zero up to a vector
using transpose_fn = void (*)(int n_embd, const row_set & rows, float * out, int ld, float * scratch);

// out[g*ld + c] = sum_d q[g*n_embd + d] * kt[d*ld_kt + c]   for c < n (rounded up to a vector)
using gemm_fn = void (*)(const float * q, int n_q, int n_embd, const float * kt, int ld_kt, int n, float * out, int64_t ld);

struct tile_ops {
    dot_fn       dot;
    mad_fn       mad;
    exp_fn       exp;
    max_fn       max;
    transpose_fn transpose;
    gemm_fn      gemm;
};

// rows of type_k feed dot and transpose, rows of type_v feed mad; reference: the scalar path
bool     tile_ops_supported(ggml_type type);
tile_ops tile_ops_for(ggml_type type_k, ggml_type type_v, bool reference);

// the widest vector any path uses, in floats: pad tiles to a multiple of it
constexpr int max_vector = 16;

} // namespace sfi
