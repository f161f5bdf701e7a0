// Policies whose support is cells alone: what is not in it counts for nothing.

#pragma once

#include "policy.h"

// The first cells and the latest ones.
class llama_window : public llama_policy {
public:
    using llama_policy::llama_policy;

    void allocate(ggml_context * ctx, const std::vector<int32_t> & ils) override { (void) ctx; (void) ils; }
    std::pair<int32_t, int32_t> window(const llama_sequence & st) const override { return core.params.candidates(st.mirror.size()); }
    bool cut(llama_sequence & st, int32_t left) const override;
    bool refresh(llama_context & lctx, uint32_t stream, bool slow) override;
    ggml_tensor * attend(const llama_layer_graph & a) const override;
};

// And those that a refresh selected by the evidence of some queries. The window's start stays where the refresh put it.
class llama_frozen : public llama_window {
public:
    explicit llama_frozen(llama_support_core & core) : llama_window(core), tensors(core.layers.size()) {}

    void allocate(ggml_context * ctx, const std::vector<int32_t> & ils) override;
    std::pair<int32_t, int32_t> window(const llama_sequence & st) const override { return { st.j0, st.j1 }; }
    int32_t window_room(const llama_sequence & st) const override;
    ggml_tensor * attend(const llama_layer_graph & a) const override;
    void report(uint32_t stream, int32_t i, int32_t n, llama_support_report & out) const override;
    bool reads_keys(llama_support_kind kind, bool refresh) const override;
    bool has_selected() const override { return core.params.selects(); }
    std::vector<int32_t> selected (uint32_t stream, int32_t il, int32_t head_kv) const override;
    std::array<float, 4> stability(uint32_t stream, int32_t il, int32_t head_kv) const override;
    bool keeps_state() const override { return core.params.selects(); }
    void state(llama_state_cursor & c, uint32_t stream, int32_t il, int32_t n_coded, int32_t n_kept) override;
    bool is_sound(const char * bytes, int32_t il, int32_t n_coded) const override;

private:
    struct layer_tensors {
        ggml_tensor * selected  = nullptr; // I32 [n_selected, n_head_kv, n_stream]
        ggml_tensor * stability = nullptr; // F32 [4, n_head_kv, n_stream], see ggml_support_stability()
    };
    std::vector<layer_tensors> tensors; // by layer

    bool by_paper() const { return core.params.selector.kind == GGML_SUPPORT_SELECTOR_PAPER; }
    ggml_tensor * attend_with_evidence(const llama_layer_graph & a) const;
    ggml_tensor * evidence(const llama_layer_graph & a) const;
    void          choose(const llama_layer_graph & a, ggml_tensor * evidence) const;
};

// And those that this query attends to most, by its exact logits.
class llama_oracle : public llama_window {
public:
    explicit llama_oracle(llama_support_core & core) : llama_window(core), lists(core.layers.size()) {}

    void allocate(ggml_context * ctx, const std::vector<int32_t> & ils) override;
    void key(llama_support_part & part) const override;
    void new_inputs(ggml_context * ctx, llama_part_input & in) const override;
    void set_inputs(const llama_part_input & in) const override;
    ggml_tensor * attend(const llama_layer_graph & a) const override;
    void report(uint32_t stream, int32_t i, int32_t n, llama_support_report & out) const override;
    bool reads_keys(llama_support_kind kind, bool refresh) const override { (void) refresh; return kind == LLAMA_SUPPORT_FAST; }
    bool has_selected() const override { return true; }
    std::vector<int32_t> selected(uint32_t stream, int32_t il, int32_t head_kv) const override;

private:
    std::vector<ggml_tensor *> lists; // selected, by layer: I32 [n_selected, n_head_kv, n_stream]
};

// Cells that a policy with such a window chooses, at most.
int32_t llama_most_selected(const llama_support_core & core, std::pair<int32_t, int32_t> window);
