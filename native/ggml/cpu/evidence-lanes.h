// The inner loops of evidence in a pass over all cells. Rows (a query of one head of a GQA group) lie side by side in
// the lanes of vectors, and each key is spread over them: nothing is transposed, nothing is summed across lanes, and a
// key serves up to 16 rows at the price of one.
//
// Evidence only ranks cells, so it is not exact: where the CPU multiplies BF16 pairs, queries and keys are rounded to
// BF16; ggml-sfi.h states the bound.

#pragma once

#include "attn-tile.h"

namespace sfi {

struct lanes_ops {
    int   width;       // lanes of a vector; rows are padded to a multiple of it
    float query_scale; // dot() gives 1/query_scale of the product: multiply the queries before pack()

    // bytes of `n_rows` packed queries, and of one staged key
    size_t (*query_bytes)(int n_rows_padded, int n_embd);
    size_t (*key_bytes)(int n_embd);

    // queries [n_rows, n_embd] -> what dot() reads; the lanes beyond n_rows are zero
    void (*pack)(const float * q, int n_rows, int n_embd, void * packed);

    // rows of the cache -> what dot() reads
    void (*stage)(const row_set & rows, int n_embd, void * keys);

    // out [n_keys, n_rows_padded] = products of all queries with all keys
    void (*dot)(const void * packed, int n_rows_padded, int n_embd, const void * keys, int n_keys, float * out);

    // x [n, n_rows_padded] of base-2 logits: m = largest of each row, x = 2^(x - m), sum of them. Cell i counts for rows
    // r with place[i] < visible[r]; place null: for all. What a row does not see is 2^-126; a row that sees nothing has m = -1e30.
    void (*powers)(float * x, int n, int n_rows_padded, const uint8_t * place, const float * visible, float * max, float * sum);

    // max and sum of n blocks, block b at b*stride; max[b] becomes 2^(max[b] - lse)*share[row], lse over all blocks
    void (*weights)(float * max, const float * sum, int n, int64_t stride, int n_rows_padded, const float * share);

    // out[i] = sum of weight[r]*x[i][r] over the rows, n rounded up to 4
    void (*weigh)(const float * x, int n, int n_rows_padded, const float * weight, float * out);
};

lanes_ops lanes_ops_for(ggml_type type_k, int n_rows, bool reference);

using exp_constants::log2e;

} // namespace sfi
