// ggml-sfi.h: the ggml operations of sfi-local.
//
// A *support* is the list of cells one KV head attends to. It has two parts: `always` (sink + recent, shared
// by all heads) and `selected` (chosen per KV head). Lists hold cell numbers in any order, each cell at most
// once; an entry outside [0, n_cells) is a pad (write -1) and is skipped. The cost of every operation depends
// on the length of its lists, never on the size of the cache.
//
// Shapes are written as ggml stores them: [ne0, ne1, ne2, ne3], ne0 innermost.

#pragma once

#include "ggml.h"
#include "sketch-layout.h"

#ifdef  __cplusplus
extern "C" {
#endif

// All are nodes of GGML_OP_SFI; which of them a node is, its parameters say.
enum ggml_sfi_op {
    GGML_SFI_OP_SPARSE_ATTN,
    GGML_SFI_OP_SUPPORT_EVIDENCE,
    GGML_SFI_OP_SUPPORT_SELECT,
    GGML_SFI_OP_SUPPORT_STABILITY,
    GGML_SFI_OP_SKETCH_ENCODE,
    GGML_SFI_OP_SKETCH_SCAN,
    GGML_SFI_OP_BLOCK_MUL_MAT,
    GGML_SFI_OP_FEW_MUL_MAT,

    GGML_SFI_OP_COUNT,
};

GGML_API enum ggml_sfi_op ggml_get_sfi_op (const struct ggml_tensor * node); // of a GGML_OP_SFI
GGML_API const char *     ggml_sfi_op_desc(const struct ggml_tensor * node); // "SPARSE_ATTN"; of another operation ggml_op_desc()

// Attention of each query over its support.
//
//   q         F32 [n_embd_k, n_tokens, n_head,    n_stream]
//   k         *   [n_embd_k, n_cells,  n_head_kv, n_stream]     // n_head % n_head_kv == 0
//   v         *   [n_embd_v, n_cells,  n_head_kv, n_stream]     !! not transposed !!
//   always    I32 [n_always, n_tokens | 1, 1, n_stream]         // NULL: no shared part
//   selected  I32 [n_selected, n_head_kv, n_tokens | 1, n_stream]  // NULL: no per-head part
//   tail      F32 [n_embd_v + 1, n_head, n_tokens, n_stream]    // NULL: no tail
//   sinks     F32 [n_head]                                      // NULL: no learned sinks
//   result    F32 [n_embd_v, n_head, n_tokens, n_stream]        !! permuted, like flash attention !!
//
//   * F32, F16, BF16, Q8_0 or Q4_0; n_embd_k and n_embd_v are multiples of 16, at most 512.
//
// logit(c) = scale * q.k(c); with logit_softcap > 0: logit_softcap * tanh(scale * q.k(c) / logit_softcap).
// result = softmax over the support (and the head's learned sink, which has no value) of logit, times v.
// A tail row is the normalised output for some other cells followed by the log-sum-exp of their logits;
// it is merged as if those cells had been listed; one whose log-sum-exp is -INFINITY counts for nothing. An empty
// support gives the tail (a learned sink still competes with it), or zeros.
GGML_API struct ggml_tensor * ggml_sparse_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * always,
        struct ggml_tensor  * selected,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 logit_softcap);

// Tokens of one text: token t sees only the first visible[t] entries of `always` (pads count). The result of each is bit for
// bit that of the operation for it alone whose `always` has pads from visible[t] on. The CPU reads the rows of K and V once
// for all tokens, and there `always` may also be cut at visible[t].
//
//   attn      result of ggml_sparse_attn() whose `always` is the same for all tokens, without `selected`
//   visible   I32 [n_tokens, n_stream]
GGML_API void ggml_sparse_attn_set_visible(
        struct ggml_tensor * attn,
        struct ggml_tensor * visible);

// The same for many tokens, as in prefill: tiles of K and V are converted once and serve all tokens and heads of a group, so a
// result is rounded otherwise than that of the token alone (each weight of the softmax may be off by 1e-5 of itself). What a token
// does not see does not touch it. attn has `visible` and no tail; it is not asked for its mass. A backend may refuse it.
GGML_API void ggml_sparse_attn_set_blocks(struct ggml_tensor * attn);
GGML_API bool ggml_sparse_attn_in_blocks (const struct ggml_tensor * node);

// ... and leave out what hardly counts. `always` is cut into tiles of 64 entries. A query head passes over a tile for a run of
// tokens if each of them gives it less than `least` of its attention, as estimated from 16 values of each key: those that tell most of
// its logits with the operation's own queries of the group. It never passes over the first tile, those from 128 entries before what the
// first of the tokens sees on, and any where the estimate is not a number. With a soft cap, or least = 0, nothing is left out.
GGML_API void ggml_sparse_attn_skip_tiles(struct ggml_tensor * attn, float least);

// Have the operation also say where the attention went, for one token:
//
//   mass      F32 [2, n_head]                           // written
//
// mass(0, h) = the log-sum-exp of all logits of head h, tail and learned sink included; -INFINITY if it had none;
// mass(1, h) = the share of the softmax that the tail took.
GGML_API void ggml_sparse_attn_set_mass(struct ggml_tensor * result, struct ggml_tensor * mass);

// What evidence is normalised over.
enum ggml_support_softmax {
    GGML_SUPPORT_SOFTMAX_VISIBLE    = 0, // every cell the query sees: evidence is true attention mass
    GGML_SUPPORT_SOFTMAX_CANDIDATES = 1, // the candidates alone (the paper's evidence)
};

// Evidence: how much attention a few recent queries pay to each candidate cell.
//
//   q       F32 [n_embd_k, n_head, n_queries]          // n_queries <= 64, any order
//   k       *   [n_embd_k, n_cells, n_head_kv]
//   cells   I32 [n_list]                               // the cells of one sequence in position order
//   plan    I32 [2 + n_queries] = { j0, j1, n_visible... }  // 0 <= j0 <= j1 <= n_list
//   result  F32 [n_list, n_head_kv]
//
// The candidates are cells[j0 .. j1). Query i sees cells[0 .. n_visible[i]); 0 means the row is not used.
// With p_r(j) the softmax of row r (a query of a head of the group), result(j) = mean over the used rows of
// p_r(j)^alpha for candidates j, 0 elsewhere; a used row that sees no candidate counts in the mean. Pads among the
// cells get evidence 0.
GGML_API struct ggml_tensor * ggml_support_evidence(
        struct ggml_context     * ctx,
        struct ggml_tensor      * q,
        struct ggml_tensor      * k,
        struct ggml_tensor      * cells,
        struct ggml_tensor      * plan,
        float                     scale,
        float                     logit_softcap,
        float                     alpha,
        enum ggml_support_softmax over);

// Attention over all cells of a sequence and the evidence of it in one pass: a slow step, in which K is read once.
//
//   q, k, v, sinks as above, n_tokens = n_stream = 1; cells as of ggml_support_evidence()
//   plan    I32 [>= 2] = { j0, j1, ... }
//   result  F32 [n_embd_v*n_head + n_list*n_head_kv]
//
// The first part of the result is ggml_sparse_attn() with always = cells: [n_embd_v, n_head]. The second, [n_list,
// n_head_kv], is ggml_support_evidence() with alpha = 1 over every visible cell of q, which sees them all.
//
// The node is a SPARSE_ATTN with the plan in src[8]. A backend that has only the plain operation must refuse it:
// ggml_sparse_attn_has_evidence().
GGML_API struct ggml_tensor * ggml_sparse_attn_evidence(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * plan,
        float                 scale,
        float                 logit_softcap);

GGML_API bool ggml_sparse_attn_has_evidence(const struct ggml_tensor * node);

enum ggml_support_selector_kind {
    GGML_SUPPORT_SELECTOR_TOPK  = 0, // top-K of the pooled evidence
    GGML_SUPPORT_SELECTOR_PAPER = 1, // arXiv 2603.12038: power mean, prior, fusion, soft NMS, cross-head
};

struct ggml_support_selector {
    int32_t kind;        // enum ggml_support_selector_kind
    int32_t pool_after;  // topk: an important cell also brings this many cells after it ...
    int32_t pool_before; // topk: ... and this many before it, in position order
    int32_t nms_radius;  // paper: soft non-maximum suppression looks this many cells to either side
    float   alpha;       // paper: exponent of the power mean; the evidence must have been made with it
    float   gamma;       // paper: prior falls with the key's norm to this power
    float   beta;        // paper: prior falls as exp(-beta u^p), u = rank among the candidates in [0, 1]
    float   p;           //
    float   eta;         // paper: prior falls as (1 - u)^eta
    float   lambda_clip; // paper: largest weight of the prior
    float   a_soft;      // paper: strength of the soft non-maximum suppression
    float   a_cross;     // paper: strength of the competition between KV heads (none at <= 2 heads)
    float   temperature; // paper: temperature of that competition
};

// Selection: the n_selected best candidates of each KV head.
//
//   evidence  F32 [n_list, n_head_kv]
//   cells     I32 [n_list]
//   plan      I32 [>= 2] = { j0, j1, ... }
//   k         *   [n_embd_k, n_cells, n_head_kv]       // paper only (norms of the keys), else NULL
//   result    I32 [n_selected, n_head_kv]              // order not promised, padded with -1
//
// topk: score(j) = max of evidence(i) over the candidates i with j - pool_after <= i <= j + pool_before.
// Equal scores: the earlier position wins. A pad keeps its place among the positions, but has neither evidence nor
// prior and is never selected.
GGML_API struct ggml_tensor * ggml_support_select(
        struct ggml_context                * ctx,
        struct ggml_tensor                 * evidence,
        struct ggml_tensor                 * cells,
        struct ggml_tensor                 * plan,
        struct ggml_tensor                 * k,
        int32_t                              n_selected,
        const struct ggml_support_selector * selector);

// Support stability: how the new selected set compares with the one before, by the new evidence.
//
//   evidence  F32 [n_list, n_head_kv]
//   cells     I32 [n_list]
//   plan      I32 [>= 2]
//   selected  I32 [n_selected, n_head_kv]
//   previous  I32 [n_selected, n_head_kv]
//   result    F32 [4, n_head_kv] = { evidence on all candidates, on selected, on previous, jaccard(selected, previous) }
//
// Cells of `previous` that are no candidates any more hold no evidence, but count in the jaccard. Two empty sets have
// jaccard 1.
GGML_API struct ggml_tensor * ggml_support_stability(
        struct ggml_context * ctx,
        struct ggml_tensor  * evidence,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * selected,
        struct ggml_tensor  * previous);

// ---- the sketch: a low-rank, few-bit copy of K and V ------------------------------------------------------------
//
// A sketch keeps some bits of every cell of one KV head, so that a step can look at all cells for a fraction of the
// bytes: which of them it should attend to, and what the others, the *tail*, would have contributed.
//
// A row x of K (or V) has n components: code_j = clamp(round(enc_j . (x - mean) + centre_j), 0, 2^bits_j - 1), with
// centre_j = (2^bits_j - 1)/2, and stands for x' = mean + sum_j (code_j - centre_j) dec_j.
//
// The first planes of K are looked at for every cell, the rest only for cells that seem to matter, as are the codes of V. How the
// codes lie in memory: sketch-layout.h, which also has struct ggml_sketch_format.

GGML_API int64_t ggml_sketch_cell_bytes (const struct ggml_sketch_format * format); // codes of one cell and KV head

// The basis of one KV head: its size in floats
GGML_API int64_t ggml_sketch_basis_size(const struct ggml_sketch_format * format, int64_t n_embd_k, int64_t n_embd_v);

// Writes the codes of some cells.
//
//   codes   I8  [16*cell_bytes, n_blocks, n_head_kv]   // contiguous; in place: the result is a view of it
//   basis   F32 [basis_size, n_head_kv]
//   k       *   [n_embd_k, n_cells, n_head_kv]         // 16*n_blocks >= n_cells
//   v       *   [n_embd_v, n_cells, n_head_kv]
//   cells   I32 [n]                                    // each at most once, outside [0, n_cells): a pad
GGML_API struct ggml_tensor * ggml_sketch_encode(
        struct ggml_context             * ctx,
        struct ggml_tensor              * codes,
        struct ggml_tensor              * basis,
        struct ggml_tensor              * k,
        struct ggml_tensor              * v,
        struct ggml_tensor              * cells,
        const struct ggml_sketch_format * format);

// One query looks at the cells 0 .. n_list - 1 through the sketch: which of them it should attend to, and what all
// others contribute.
//
//   q         F32 [n_embd_k, n_head]                   // n_head % n_head_kv == 0
//   codes     I8  [16*cell_bytes, n_blocks, n_head_kv] // 16*n_blocks >= n_list
//   basis     F32 [basis_size, n_head_kv]
//   skip      I32 [n_skip]                             // cells that are left out, in any order; -1: a pad
//   plan      I32 [1] = { n_used }                     // so are cells from n_used on; n_used <= n_list
//   least     F32 [n_head_kv]                          // NULL: none
//   selected  I32 [n_selected, n_head_kv]              // written; order not promised, padded with -1
//   counts    I32 [2, n_head_kv]                       // written: the cells that were selected, and those that were looked at again
//   result    F32 [n_embd_v + 1, n_head]               // a `tail` of ggml_sparse_attn()
//
// With w_j = dec_k_j . q, s = max_j |w_j|/127 and W_j = round(w_j/s):
// logit(c) = scale*(q . mean_k + s * sum_j W_j (code_j - centre_j)), soft-capped as in ggml_sparse_attn(). A cell's share in
// a head is the softmax of these, over the cells that are not left out; its score is the mean share over the heads of its group.
//
// The first look takes the sum over the components of the first planes alone. A cell is looked at again if its share by that is at
// least second_look/min(n_used, 8192) in one head of the group. All others keep their logits of the first look, in shares as in the
// tail. A soft cap needs a first look at all planes.
//
// selected: of the cells that are looked at again the n_selected best scores, without those whose share is below least(h_kv) in every
// head of the group. Equal logits in all heads: the lower cell wins. A share or score may be off by 1e-4 of itself.
// result: the sketched V of the cells that were not selected, weighted by the softmax of their logits, then the log-sum-exp of
// these. Without such cells: zeros and -INFINITY; also if their share is below 2^-20. With u the share of the tail that was looked at
// once, the V of these is taken to be 1 - u times that of the rest of the tail and u times the mean of the basis; the sum of their
// weights may be off by 2^-18 of that of all weights of the first look. A format without components of V gives its mean.
//
// What is not finite spreads no further than it must: a query head whose projection is not finite has no logits, that is no share in
// any cell, and no tail; a `least` that is not a number selects nothing.
GGML_API struct ggml_tensor * ggml_sketch_scan(
        struct ggml_context             * ctx,
        struct ggml_tensor              * q,
        struct ggml_tensor              * codes,
        struct ggml_tensor              * basis,
        struct ggml_tensor              * skip,
        struct ggml_tensor              * plan,
        struct ggml_tensor              * least,
        struct ggml_tensor              * selected,
        struct ggml_tensor              * counts,
        int64_t                           n_list,
        int64_t                           n_embd_v,
        float                             scale,
        float                             logit_softcap,
        float                             second_look,
        const struct ggml_sketch_format * format);

// Product of quantised weights with the activations of many tokens, on the CPU: weights are unpacked once for all of them. As in
// ggml_mul_mat() activations are rounded to 8 bits, here in blocks of 32 by their largest; all else is exact to the rounding of F32.
// A token that has a value which is not finite has a result which is not.
//
//   w       *   [n_in, n_out]       // Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K or Q6_K; n_out % 32 == 0
//   x       F32 [n_in, n_tokens]
//   result  F32 [n_out, n_tokens]
GGML_API struct ggml_tensor * ggml_block_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * w,
        struct ggml_tensor  * x);
GGML_API bool ggml_can_block_mul_mat(const struct ggml_tensor * w, const struct ggml_tensor * x);

// The same product with the activations of a few tokens, on a CPU with AVX2: the result of each token is bit for bit that of
// ggml_mul_mat() for it alone (a NaN may be another NaN). Weights are unpacked once for all tokens.
//
//   w       *   [n_in, n_out]       // Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K or Q8_0, as they lie in a file
//   x       F32 [n_in, n_tokens]
//   result  F32 [n_out, n_tokens]
GGML_API struct ggml_tensor * ggml_few_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * w,
        struct ggml_tensor  * x);
GGML_API bool ggml_can_few_mul_mat(const struct ggml_tensor * w, const struct ggml_tensor * x);

#ifdef  __cplusplus
}
#endif
