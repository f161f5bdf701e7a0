// The portable path: the support of a layer whose device has ggml's own operations only.
//
// Such an operation cannot follow a list of cells, so K and V of the support lie in a *compact cache* of the layer, one row
// after the other:
//
//     rows [0, n_selected)           the selected cells of each KV head; a refresh copies them
//     rows n_selected + slot(i)      always: cell i of the text, slot(i) = i for the sink, else a ring of the latest
//
// A step writes the row of its own cell, and a fast step is ggml_flash_attn_ext() over the compact cache with a mask for the
// rows that are not in use. Dense and slow steps take upstream's own path; what a refresh does then is a graph of its own,
// llama_support::refresh_portable(). Evidence and selection are made as
// ggml_support_evidence() and ggml_support_select() say, but over all cells in the order of their numbers; of equal scores
// any may win. Policies frozen and window, selector topk.

#pragma once

#include "policy.h"

#include <array>
#include <memory>

// The inputs of the portable part of a step; those that a graph does not need are null or without a buffer. Lists of cells are
// repeated for each of n_head_kv KV heads, the most that a layer has.
struct llama_portable_input {
    void set(const llama_sequence & seq, const llama_support_params & params, int64_t n_always, std::pair<int32_t, int32_t> window) const;

    ggml_tensor * cells   = nullptr; // I32 [n_append, n_head_kv]  whose rows are written ...
    ggml_tensor * slots   = nullptr; // I64 [n_append]             ... here
    ggml_tensor * in_use  = nullptr; // F16 [n_compact, 1]         fast: 0, or -INFINITY for rows that are not
};

// Whether these parameters can do without our operations.
bool llama_portable_has(const llama_support_params & params);

// The nodes of one refresh and one fast step, on tensors without data.
std::vector<ggml_tensor *> llama_portable_operations(ggml_context * ctx, const llama_path_shape & shape, const llama_support_params & params);

// Gives a layer its compact cache, for n_always cells beside the selected ones, and what a refresh leaves behind of n_ctx cells.
void llama_portable_allocate(ggml_context * ctx, llama_support_layer & layer, const llama_path_shape & shape,
                             const llama_support_params & params, int64_t n_always, int64_t n_ctx, int64_t n_stream);

// Cells that the evidence of a refresh is made of, in a context of n_ctx.
int64_t llama_portable_scan_size(const llama_sequence & seq, int64_t n_ctx);

// Whether rows that a sliding window needs without the last n tokens are gone: the ring holds n_grow cells more than it shows.
bool llama_portable_overwritten(const llama_support_params & params, int64_t n_always, int32_t n);

// Rows of always that n_tokens write.
int64_t llama_portable_append(const llama_support_params & params, int64_t n_always, int32_t n_tokens);

std::unique_ptr<llama_portable_input> llama_portable_new_input(ggml_context * ctx, const llama_support_key & key, const llama_support_params & params,
                                                               const std::vector<llama_support_layer> & layers, int64_t n_always);

// As llama_support_build_attn(), whose arguments it takes; k and v are all cells of the stream.
ggml_tensor * llama_portable_build_attn(const llm_graph_context & g, const llama_portable_input & inp, const llama_support_key & key,
        const llama_support_layer & layer, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale, float softcap, int il);

// After a refresh: chooses the support in all portable layers, by the evidence of a slow step or of a batch. False: computing failed.
bool llama_portable_refresh(llama_side_graph & side, ggml_backend_sched_t sched, const llama_kv_cache & kv, const llama_support_params & params,
        const std::vector<llama_support_layer> & layers, const llama_sequence & seq, uint32_t stream, int64_t n_always, bool slow, float softcap);

// Of one KV head, from the device: the selected cells, and what ggml_support_stability() would say of the last refresh.
std::vector<int32_t> llama_portable_selected (const llama_support_layer & layer, const llama_sequence & seq, uint32_t stream, int32_t head_kv);
std::array<float, 4> llama_portable_stability(const llama_support_layer & layer, const llama_sequence & seq, uint32_t stream, int32_t head_kv);
