// Policies frozen and window for layers whose device has ggml's own operations only.
//
// Such an operation cannot follow a list of cells, so K and V of the support lie in a *compact cache* of the layer, one row
// after the other:
//
//     rows [0, n_selected)           the selected cells of each KV head; a refresh copies them
//     rows n_selected + slot(i)      always: cell i of the text, slot(i) = i for the sink, else a ring of the latest
//
// A step writes the row of its own cell, and a fast step is ggml_flash_attn_ext() over the compact cache with a mask for the
// rows that are not in use. Dense and slow steps take upstream's own path; what a refresh does then is a graph of its own.
// Evidence and selection are made as ggml_support_evidence() and ggml_support_select() say, but over all cells in the order of
// their numbers; of equal scores any may win. Selector topk.

#pragma once

#include "llama-path.h"
#include "policy.h"

// Whether these parameters can do without our operations.
bool llama_portable_has(const llama_support_params & params);

// The nodes of one refresh and one fast step, on tensors without data.
std::vector<ggml_tensor *> llama_portable_operations(ggml_context * ctx, const llama_path_shape & shape, const llama_support_params & params);

class llama_portable : public llama_policy {
public:
    // window_of: the policy whose support this one computes
    llama_portable(llama_support_core & core, std::unique_ptr<llama_policy> window_of);

    void    allocate(ggml_context * ctx, const std::vector<int32_t> & ils) override;
    uint8_t blank() const override { return 0; } // lists have no pads, and rows must be numbers though they are masked
    std::pair<int32_t, int32_t> window(const llama_sequence & st) const override { return window_of->window(st); }
    int32_t window_room(const llama_sequence & st) const override { return window_of->window_room(st); }
    bool cut(llama_sequence & st, int32_t left) const override;
    bool refresh(llama_context & lctx, uint32_t stream, bool slow) override;
    void key(llama_support_part & part) const override;
    void new_inputs(ggml_context * ctx, llama_part_input & in) const override;
    void set_inputs(const llama_part_input & in) const override;
    ggml_tensor * attend(const llama_layer_graph & a) const override;
    void report(uint32_t stream, int32_t i, int32_t n, llama_support_report & out) const override { window_of->report(stream, i, n, out); }
    bool reads_keys(llama_support_kind kind, bool refresh) const override { (void) kind; return refresh && core.params.refreshes(); }
    bool has_selected() const override { return core.params.selects(); }
    std::vector<int32_t> selected (uint32_t stream, int32_t il, int32_t head_kv) const override;
    std::array<float, 4> stability(uint32_t stream, int32_t il, int32_t head_kv) const override;

private:
    friend struct portable_refresh;

    struct layer_tensors {
        ggml_tensor * compact_k = nullptr; // [n_embd_k, n_compact, n_head_kv, n_stream], and the same of V
        ggml_tensor * compact_v = nullptr;
        ggml_tensor * selected  = nullptr; // I32 [n_selected, n_head_kv, n_stream]
        ggml_tensor * previous  = nullptr; // the set before
        ggml_tensor * evidence  = nullptr; // F32 [n_ctx, n_head_kv, n_stream], of the last refresh
    };
    struct last_refresh {
        int32_t n_chosen = 0, n_previous = 0; // cells that were selected, and by the one before ...
        int64_t n_scanned = 0;                // ... and cells of the evidence
    };
    std::unique_ptr<llama_policy> window_of;
    std::vector<layer_tensors>    tensors;   // by layer
    std::vector<last_refresh>     refreshes; // by stream

    bool    is_pinned() const { return core.params.policy == LLAMA_SUPPORT_FROZEN; }
    int64_t selected_rows() const { return core.params.refreshes() ? core.params.n_selected : 0; }
    int64_t compact_rows() const;
    int64_t slot_of(int64_t place) const;
    int64_t most_heads() const; // KV heads of a layer
    void    set_always(ggml_tensor * cells, ggml_tensor * slots, uint32_t stream, const std::vector<int64_t> & places) const;
};
