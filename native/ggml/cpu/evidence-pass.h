// Evidence made while SPARSE_ATTN passes over all cells, so that their keys are read once.
//
// The weights of the query at work are computed anyway: they are kept, with the maximum they were taken against. Further
// queries cost a product of their own per cell:
//
//   prepare()       before the pass: those queries, scaled to base-2 logits, packed by KV head
//   add_keys()      their logits of a few cells of one KV head, while the keys are in the cache
//   finish_tile()   logits become 2^(x - m), m the tile's maximum of each row
//   keep_max()      what the weights of one head of the query at work were taken against
//   finish_head()   after all tiles: the weight of each tile in each row of a KV head
//   finish_own()    the same for a head of the query at work
//   write_tile()    after all heads: the evidence of the tile's cells
//
// Rows and powers lie as evidence-lanes.h says; the contract is ggml_sparse_attn_evidence() in ggml-sfi.h.

#pragma once

#include "evidence-lanes.h"

#include <algorithm>

namespace sfi {

constexpr int tile_cells = 64; // logits of a group and the rows' addresses stay in L1

struct evidence_pass {
    const ggml_tensor * queries, * k;
    const int32_t * cells, * plan;
    int64_t n_list, n_tiles, n_head, n_head_kv, group;
    int     n_embd;
    float   scale, softcap;
    int64_t j0, j1;
    int64_t all_see;          // every used query sees cells[0 .. all_see)
    int     n_used = 0, rows, rows_padded;
    int32_t query[64];        // the used ones
    lanes_ops ops;

    float * own;              // [n_tiles, n_head, tile_cells]  weights of the query at work
    float * own_max;          // [n_head, tiles_padded]         finish_own() turns it into weights of the tiles
    int64_t tiles_padded;
    float * powers;           // [n_tiles, n_head_kv, tile_cells, rows_padded]
    float * max, * sum;       // [n_tiles, n_head_kv, rows_padded]
    char  * packed;           // [n_head_kv, query_bytes]
    char  * keys;             // scratch of this thread: staged keys of a tile, later a head's rows before packing
    size_t  query_bytes, key_bytes;
    float * result;           // [n_head_kv, n_list]

    static constexpr int padding = 64; // bytes; what the buffers are aligned to

    // the result of the pass lies behind n_output floats of attention
    evidence_pass(const ggml_compute_params * params, const ggml_tensor * dst, char * work, int64_t n_output);

    static bool   supported(const ggml_tensor * dst);
    static size_t work_size(const ggml_tensor * dst, int n_threads);

    void prepare(int ith, int nth);
    void add_keys(int64_t tile, int64_t h, const row_set & rows, int at) const;
    void finish_tile(int64_t tile, int64_t h, const uint8_t * place, int n) const;
    void keep_max(int64_t tile, int64_t head, float max) const { own_max[head*tiles_padded + tile] = max; }
    void finish_head(int64_t h) const;
    void finish_own(int64_t head, float max, float sum, exp_fn exp) const; // sum of exp(x - max) over all cells
    void write_tile(int64_t tile) const;

    bool    has_rows() const { return rows > 0; } // beside those of the query at work
    float   share() const { return 1.0f/(rows + group); }
    float * own_of(int64_t tile) const { return own + tile*n_head*tile_cells; }
    float * powers_of(int64_t tile, int64_t h) const { return powers + (tile*n_head_kv + h)*tile_cells*rows_padded; }
    float * max_of(int64_t tile, int64_t h) const { return max + (tile*n_head_kv + h)*rows_padded; }
    float * sum_of(int64_t tile, int64_t h) const { return sum + (tile*n_head_kv + h)*rows_padded; }
};

} // namespace sfi
