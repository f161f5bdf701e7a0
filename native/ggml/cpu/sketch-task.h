// What the passes of SKETCH_SCAN share: what is to be done, the projection of queries, the choice of the best cells.

#pragma once

#include "arena.h"
#include "attn-tile.h"
#include "sketch-kernels.h"

#include <algorithm>

namespace sfi {
namespace scan {

constexpr float ln2          = 0.693147181f;
constexpr float log2_no_tail = -20.0f; // a share below which the tail is nothing but rounding errors

struct task {
    const ggml_tensor * dst, * q, * codes, * basis, * skip;
    const float * least; // [n_head_kv] or null
    sketch_layout l;
    int64_t n_list, n_head, n_head_kv, group, n_selected, n_embd_v;
    int64_t ld;          // n_list, padded to chunks
    float   scale, softcap, second_look;

    explicit task(const ggml_tensor * dst) :
            dst(dst), q(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), skip(dst->src[3]), l(dst) {
        least      = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
        const auto params = params_of<sfi_scan_params>(dst);
        n_list     = params.n_list;
        n_head     = q->ne[1];
        n_head_kv  = codes->ne[2];
        group      = n_head/n_head_kv;
        n_selected = dst->src[6]->ne[0];
        n_embd_v   = dst->ne[0] - 1;
        ld         = GGML_PAD(n_list, chunk_cells);
        scale       = params.scale;
        softcap     = params.softcap;
        second_look = params.second_look;
    }

    int64_t   n_used() const { return std::clamp<int64_t>(*(const int32_t *) dst->src[4]->data, 0, n_list); }
    int32_t * selected_of(int64_t h_kv) const { return (int32_t *) ((char *) dst->src[6]->data + h_kv*dst->src[6]->nb[1]); }
    void write_counts(int64_t h_kv, int64_t n_selected, int64_t n_looked) const {
        int32_t * counts = (int32_t *) dst->src[7]->data + 2*h_kv;
        counts[0] = (int32_t) n_selected;
        counts[1] = (int32_t) n_looked;
    }
    const uint8_t * codes_of(int64_t h_kv) const { return (const uint8_t *) codes->data + h_kv*codes->nb[2]; }
    const uint8_t * records_of(int64_t h_kv) const { return codes_of(h_kv) + sketch_record_at(l.format, codes->ne[1], 0); }
};

// inner loops over the rows of a basis
struct basis_ops {
    dot_fn mean, dec;  // of queries
    mad_fn decode;

    explicit basis_ops(bool use_ref) :
            mean(tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, use_ref).dot), dec(tile_ops_for(GGML_TYPE_F16, GGML_TYPE_F16, use_ref).dot),
            decode(tile_ops_for(GGML_TYPE_F16, GGML_TYPE_F16, use_ref).mad) {}
};

// The queries of a KV head's group as weights of its components. q, products: [group, n_embd_k], [group, n_k + 1, padded]
void project(const task & a, int64_t h_kv, const basis_ops & ops, float * q, float * products, projected * p);

// The result of a head: V of these components [n_v], and the log-sum-exp of the tail as a base-2 logarithm.
void write_tail(const task & a, int64_t h, const basis_ops & ops, const float * z, float log2_sum);
void write_no_tail(const task & a, int64_t h);

// a bit for each cell that is left out, 16 cells a word; also for those behind the last that is in use, up to the end of its block
void mark_skipped(const task & a, int64_t n_used, uint16_t * skipped);

// those of the n cells from c on get logits of -INFINITY, in rows of ld
void hide_skipped(const uint16_t * skipped, int64_t c, int n, int64_t group, float * t, int64_t ld);

// the cells of one KV head that may be selected, each with its logits in the heads of the group: rows of t [group, ld]
struct choice {
    int32_t     * cell;
    float       * t;
    int64_t       ld, group;
    float       * z;   // of a cell: the largest of its t - lse
    uint32_t    * key; // work memory
    const float * lse; // [group]

    // The k best of n move to the front, in order; returns how many there are.
    int64_t keep_best(int64_t n, int64_t k) const;
    void    move(int64_t from, int64_t to) const;
};

} // namespace scan
} // namespace sfi
