// Policy sketch: a copy of K and V in few bits is scanned at each fast step. It finds the cells that matter and stands for the others.
//
// always is the cells at places [0, j0) and [j1, n) of the text; those between have codes and are scanned. When the window is full, the
// cells older than n_recent get codes and leave it.

#pragma once

#include "policy.h"

class llama_sketch : public llama_policy {
public:
    explicit llama_sketch(llama_support_core & core) : llama_policy(core), tensors(core.layers.size()) {}

    void allocate(ggml_context * ctx, const std::vector<int32_t> & ils) override;
    std::pair<int32_t, int32_t> window(const llama_sequence & st) const override { return { st.j0, st.j1 }; }
    bool cut(llama_sequence & st, int32_t left) const override; // good as long as half of the cells are there that its basis was fitted to
    int32_t window_room(const llama_sequence & st) const override;
    bool prepare(llama_context & lctx, uint32_t stream, int32_t n) override;
    bool refresh(llama_context & lctx, uint32_t stream, bool slow) override;
    void key(llama_support_part & part) const override;
    void new_inputs(ggml_context * ctx, llama_part_input & in) const override;
    void set_inputs(const llama_part_input & in) const override;
    ggml_tensor * attend(const llama_layer_graph & a) const override;
    void report(uint32_t stream, int32_t i, int32_t n, llama_support_report & out) const override;
    bool has_selected() const override { return true; }
    std::vector<int32_t> selected(uint32_t stream, int32_t il, int32_t head_kv) const override;
    bool tail(uint32_t stream, int32_t il, int32_t head, std::array<float, 2> & out) const override;
    bool keeps_state() const override { return true; }
    void state(llama_state_cursor & c, uint32_t stream, int32_t il, int32_t n_coded, int32_t n_kept) override;
    bool is_sound(const char * bytes, int32_t il, int32_t n_coded) const override;

private:
    struct layer_tensors { // selected, mass and counts are parts of tensors that all layers of a device share
        ggml_sketch_format format = {};
        ggml_tensor * codes    = nullptr; // I8  [16*cell_bytes, n_blocks, n_head_kv*n_stream]
        ggml_tensor * basis    = nullptr; // F32 [basis_size, n_head_kv*n_stream]
        ggml_tensor * least    = nullptr; // F32 [n_head_kv, n_stream], see ggml_sketch_scan()
        ggml_tensor * selected = nullptr; // I32 [n_selected, n_head_kv, n_stream]
        ggml_tensor * mass     = nullptr; // F32 [2, n_head, n_rows], see ggml_sparse_attn_set_mass()
        ggml_tensor * counts   = nullptr; // I32 [2, n_head_kv, n_rows], see ggml_sketch_scan()
        std::vector<float> logit_error;   // [n_stream*n_head_kv]: expected error of a sketched logit, from the fit
    };
    struct layer_rows { std::vector<float> k, v, q; }; // that a basis is fitted to, [n, n_embd] of all heads
    struct layer_fit  { std::vector<float> basis, logit_error, need; };
    using wanted_rows = std::vector<std::pair<ggml_tensor *, const std::vector<int32_t> *>>;

    std::vector<layer_tensors> tensors; // by layer

    void allocate_codes(ggml_context * ctx, int32_t il);
    void allocate_results(ggml_context * ctx, const std::vector<int32_t> & ils);
    // Of mass and counts: those of the tokens of a stream's step, one after the other.
    static uint32_t row_of(uint32_t stream, int64_t i) { return (uint32_t) (stream*llama_support_max_tokens + i); }
    bool scanned(uint32_t stream) const { return core.streams[stream].j1 > core.streams[stream].j0; }
    ggml_tensor * scan(const llama_layer_graph & a) const;

    bool fit(llama_context & lctx, uint32_t stream);
    bool fit_rows(llama_context & lctx, uint32_t stream, int32_t il, const std::vector<int32_t> & cells, const std::vector<int32_t> & queries, layer_rows & out);
    std::vector<std::vector<float>> device_rows(llama_context & lctx, uint32_t stream, const wanted_rows & wanted);
    layer_fit fit_layer(int32_t il, const layer_rows & rows) const;
    void spread_tolerance(uint32_t stream, const std::vector<std::vector<float>> & need);
    bool encode(llama_context & lctx, uint32_t stream, int32_t from, int32_t to);
    ggml_tensor * encode_layer(ggml_context * ctx, uint32_t stream, int32_t il, ggml_tensor * cells);

    int64_t read_bytes(int64_t n_used) const;
    void    state_of_head(llama_state_cursor & c, const layer_tensors & layer, uint32_t head, int64_t n_coded, int64_t n_kept) const;
};
