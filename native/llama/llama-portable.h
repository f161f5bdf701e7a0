// The portable path: the support of a layer whose device has ggml's own operations only.
//
// Such an operation cannot follow a list of cells, so K and V of the support lie in a *compact cache* of the layer, one row
// after the other:
//
//     rows [0, n_selected)           the selected cells of each KV head; a refresh copies them
//     rows n_selected + slot(i)      always: cell i of the text, slot(i) = i for the sink, else a ring of the latest
//
// A step writes the row of its own cell, and a fast step is ggml_flash_attn_ext() over the compact cache with a mask for the
// rows that are not in use. Dense and slow steps take upstream's own path. Evidence and selection are made as
// ggml_support_evidence() and ggml_support_select() say, but over all cells in the order of their numbers; of equal scores
// any may win. Policies frozen and window, selector topk.

#pragma once

#include "llama-path.h"

// The inputs of the portable part; those that a graph does not need are null or without a buffer. Lists of cells are
// repeated for each of n_head_kv KV heads, the most that a layer has.
struct llama_portable_input : public llm_graph_input_i {
    explicit llama_portable_input(std::shared_ptr<llama_support> support);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    std::shared_ptr<llama_support> support;
    const llama_support::key built;
    const llama_portable_key key;

    ggml_tensor * cells   = nullptr; // I32 [n_append, n_head_kv]  whose rows are written ...
    ggml_tensor * slots   = nullptr; // I64 [n_append]             ... here
    ggml_tensor * in_use  = nullptr; // F16 [n_compact, 1]         fast: 0, or -INFINITY for rows that are not
    ggml_tensor * visible = nullptr; // F16 [n_scan, n_q]          refresh: 0, or -INFINITY for cells that a query does not see
    ggml_tensor * weights = nullptr; // F32 [1, n_q]               ... of the queries, 0 for those not used; null: there is one
    ggml_tensor * is_candidate = nullptr; // F32 [n_scan]          ... 1 for candidates, else 0
    ggml_tensor * own_head = nullptr; // F32 [1, n_head_kv, 1, n_head_kv] ... the unit matrix; null: K is not quantised
    ggml_tensor * handicap = nullptr; // F32 [n_scan]              ... 0 for candidates, else so much that they are never selected
    ggml_tensor * order   = nullptr; // I32 [n_scan, n_head_kv]    ... cells in the order of the text; null: `ordered`
    ggml_tensor * place   = nullptr; // I32 [n_scan, n_head_kv]    ... their places in it
    ggml_tensor * top     = nullptr; // I64 [n_top] = 0, 1, ...    ... the rows of the selected cells

private:
    void set_append();
    void set_in_use();
    void set_evidence();
    void set_order();
    std::vector<int32_t> n_visible() const;
};

// Whether these parameters can do without our operations.
bool llama_portable_has(const llama_support_params & params);

// The nodes of one refresh and one fast step, on tensors without data.
std::vector<ggml_tensor *> llama_portable_operations(ggml_context * ctx, const llama_path_shape & shape, const llama_support_params & params);

// Gives a layer its compact cache, for n_always cells beside the selected ones, and what a refresh leaves behind of n_ctx cells.
void llama_portable_allocate(ggml_context * ctx, llama_support_layer & layer, const llama_path_shape & shape,
                             const llama_support_params & params, int64_t n_always, int64_t n_ctx, int64_t n_stream);

// Adds the inputs to the graph; null if no layer is portable.
llama_portable_input * llama_portable_build_input(const llm_graph_context & g, const std::shared_ptr<llama_support> & support);

// As llama_support_build_attn(), whose arguments it takes; k and v are all cells of the stream, q_kept the ring of queries.
ggml_tensor * llama_portable_build_attn(const llm_graph_context & g, const llama_portable_input * inp, ggml_tensor * q, ggml_tensor * q_kept,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale, float softcap, int il);
