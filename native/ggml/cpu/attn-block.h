// The inner loops of attention of many queries over a tile of cells, and the table that picks their instruction set and
// row types once per operation.
//
// A tile of K and of V is converted to F32 once and packed into panels, so that the products with it are those of small
// matrices: a panel's line is as wide as the registers of one pass, and lines follow each other in memory.
//
//   K   [panels of cells][n_embd_k][panel]    line d of a panel: value d of its cells
//   V   [panels of n_embd_v][n_cells][panel]  line c of a panel: its values of cell c
//
// What a panel has beyond the cells or values of the tile is zero.

#pragma once

#include "attn-tile.h"

namespace sfi {

// out: GGML_PAD(rows.n, panel)*n_embd floats; scratch: max_vector*n_embd floats
using pack_k_fn = void (*)(int n_embd, const row_set & rows, float * out, float * scratch);

// out: GGML_PAD(n_embd, panel)*rows.n floats
using pack_v_fn = void (*)(int n_embd, const row_set & rows, float * out);

// out[r*ld + c] = q_r . k_c    for r < n_q rows of q [n_q, n_embd] and c < GGML_PAD(n, panel), k packed
using block_dot_fn = void (*)(const float * q, int n_q, int n_embd, const float * k, int n, float * out, int64_t ld);

// o[r*ld_o + d] = o[r*ld_o + d]*keep[r] + sum_c p[r*ld + c] v_c[d]    for r < n_q, c < n, d < GGML_PAD(n_embd, panel); v is
// packed for n_v cells
using block_mad_fn = void (*)(const float * p, int64_t ld, int n_q, int n, const float * v, int n_v, int n_embd, const float * keep,
                              float * o, int64_t ld_o);

// Weights of a tile: x[i] = 2^(x[i] - m) with m the larger of *max and every x; *max becomes m, and what was summed up before is
// to be multiplied with the result, 0 at first. *sum = *sum*result + the sum of the weights. n is a multiple of max_vector.
// If all is -INFINITY the weights are 0 and the result is 1.
using weigh_fn = float (*)(float * x, int n, float * max, float * sum);

// A rough sum of weights: out[r*ld] = sum over c < n of 2^(q_r . k_c - shift[r]), off by 4 % at most, for r < n_q rows of q [n_q, n_embd]
// and n cells of k, which is packed and has whole panels
using mass_fn = void (*)(const float * q, int n_q, int n_embd, const float * k, int n, const float * shift, float * out, int64_t ld);

struct block_ops {
    int          panel;
    pack_k_fn    pack_k;
    pack_v_fn    pack_v;
    block_dot_fn dot;
    block_mad_fn mad;
    weigh_fn     weigh;
    mass_fn      mass;
};

// the widest panel of any path, in floats: pad rows of outputs to a multiple of it
constexpr int max_panel = 32;

block_ops block_ops_for(ggml_type type_k, ggml_type type_v, bool reference);

} // namespace sfi
