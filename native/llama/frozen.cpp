#include "frozen.h"

#include "llama-path.h"
#include "support-state.h"

int32_t llama_most_selected(const llama_support_core & core, std::pair<int32_t, int32_t> window) {
    return std::min(core.params.n_selected, window.second - window.first);
}

static void report_selected(const llama_support_core & core, std::pair<int32_t, int32_t> window, llama_support_report & out) {
    const int32_t n = llama_most_selected(core, window);
    out.n_cells += n;
    out.kv_read += core.cell_bytes(false)*n;
}

static ggml_tensor * attend_to(const llama_layer_graph & a, ggml_tensor * selected) {
    return a.done(ggml_sparse_attn(a.g.ctx0, a.q_rows(), a.k, a.v, a.in.always, selected, nullptr, a.sinks, a.kq_scale, a.softcap), "sparse_attn");
}

// ---- window --------------------------------------------------------------------------------------------------------------

// A support lists none of the cells behind the place of its window ...
bool llama_window::cut(llama_sequence & st, int32_t left) const {
    return !st.valid || left >= st.j1;
}

// ... which it keeps. What is selected, the graph of the ubatch has selected.
bool llama_window::refresh(llama_context &, uint32_t stream, bool) {
    auto & st = core.streams[stream];
    const auto [j0, j1] = core.params.candidates(st.mirror.size());
    st.j0 = j0;
    st.j1 = j1;
    return true;
}

ggml_tensor * llama_window::attend(const llama_layer_graph & a) const {
    return a.in.part.kind == LLAMA_SUPPORT_FAST ? attend_to(a, nullptr) : llama_attend_densely(a);
}

// ---- frozen --------------------------------------------------------------------------------------------------------------

void llama_frozen::allocate(ggml_context * ctx, const std::vector<int32_t> & ils) {
    for (const int32_t il : ils) {
        const int64_t n_head_kv = core.layers[il].n_head_kv, n_stream = core.streams.size();
        if (core.params.selects()) {
            tensors[il].selected  = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, core.params.n_selected, n_head_kv, n_stream);
            tensors[il].stability = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 4, n_head_kv, n_stream);
        }
    }
}

int32_t llama_frozen::window_room(const llama_sequence & st) const {
    return st.valid ? (int32_t) (core.always_size() - st.j0 - (st.mirror.size() - st.j1)) : INT32_MAX;
}

ggml_tensor * llama_frozen::attend(const llama_layer_graph & a) const {
    const auto & part = a.in.part;
    if (part.kind == LLAMA_SUPPORT_FAST) {
        ggml_tensor * lists = tensors[a.il].selected;
        return attend_to(a, lists ? llama_stream_of(a.g.ctx0, lists, part.stream) : nullptr);
    }
    if (part.refresh && part.kind == LLAMA_SUPPORT_SLOW) {
        if (ggml_tensor * cur = attend_with_evidence(a)) {
            return cur;
        }
    }
    if (part.refresh) {
        choose(a, evidence(a));
    }
    return llama_attend_densely(a);
}

// Evidence by an operation of its own, which reads all keys.
ggml_tensor * llama_frozen::evidence(const llama_layer_graph & a) const {
    return ggml_support_evidence(a.g.ctx0, llama_kept_queries(a), a.k, a.in.cells, a.in.plan, a.kq_scale, a.softcap,
            by_paper() ? core.params.selector.alpha : 1.0f,
            by_paper() ? GGML_SUPPORT_SOFTMAX_CANDIDATES : GGML_SUPPORT_SOFTMAX_VISIBLE);
}

// evidence -> selected, and how stable it is; the previous set is read before the new one replaces it
void llama_frozen::choose(const llama_layer_graph & a, ggml_tensor * evidence) const {
    ggml_context * ctx = a.g.ctx0;
    a.g.cb(evidence, "support_evidence", a.il);

    ggml_tensor * selected = ggml_support_select(ctx, evidence, a.in.cells, a.in.plan, by_paper() ? a.k : nullptr,
            core.params.n_selected, &core.params.selector);
    a.g.cb(selected, "support_selected", a.il);

    ggml_tensor * previous  = llama_stream_of(ctx, tensors[a.il].selected, a.in.part.stream);
    ggml_tensor * stability = ggml_support_stability(ctx, evidence, a.in.cells, a.in.plan, selected, previous);
    a.g.cb(stability, "support_stability", a.il);

    ggml_build_forward_expand(a.g.gf, ggml_cpy(ctx, stability, llama_stream_of(ctx, tensors[a.il].stability, a.in.part.stream)));
    ggml_build_forward_expand(a.g.gf, ggml_cpy(ctx, selected, previous));
}

// A slow step that makes its evidence while it attends: that of the query at work costs nothing. Null where the evidence
// must be another or the backend has no such pass.
ggml_tensor * llama_frozen::attend_with_evidence(const llama_layer_graph & a) const {
    if (by_paper()) {
        return nullptr;
    }
    ggml_context * ctx = a.g.ctx0;
    const int64_t n_head = a.q->ne[1], n_embd_v = a.v->ne[0], n_list = a.in.cells->ne[0];
    ggml_tensor * both = ggml_sparse_attn_evidence(ctx, a.q_rows(), a.k, a.v, a.in.cells, a.sinks, a.in.plan, a.kq_scale, a.softcap);
    ggml_backend_dev_t dev = llama_path_device(a.layer.queries->buffer);
    if (!dev || !ggml_backend_dev_supports_op(dev, both)) {
        return nullptr;
    }
    a.g.cb(both, "sparse_attn_evidence", a.il);
    // in the graph before the refresh, so that who watches it finds the query still there
    ggml_tensor * cur = a.done(ggml_view_3d(ctx, both, n_embd_v, n_head, 1, n_embd_v*sizeof(float), n_embd_v*n_head*sizeof(float), 0), "sparse_attn");
    choose(a, ggml_view_2d(ctx, both, n_list, a.k->ne[2], n_list*sizeof(float), n_embd_v*n_head*sizeof(float)));
    return cur;
}

void llama_frozen::report(uint32_t stream, int32_t, int32_t, llama_support_report & out) const {
    report_selected(core, window(core.streams[stream]), out);
}

bool llama_frozen::reads_keys(llama_support_kind kind, bool refresh) const {
    return refresh && core.params.refreshes() && (kind != LLAMA_SUPPORT_SLOW || by_paper()); // a slow step's comes while it attends
}

std::vector<int32_t> llama_frozen::selected(uint32_t stream, int32_t il, int32_t head_kv) const {
    return llama_read_cells(tensors[il].selected, stream, head_kv);
}

std::array<float, 4> llama_frozen::stability(uint32_t stream, int32_t il, int32_t head_kv) const {
    const ggml_tensor * t = tensors[il].stability;
    std::array<float, 4> values;
    ggml_backend_tensor_get(t, values.data(), stream*t->nb[2] + head_kv*t->nb[1], sizeof(values));
    return values;
}

void llama_frozen::state(llama_state_cursor & c, uint32_t stream, int32_t il, int32_t, int32_t) {
    for (ggml_tensor * t : { tensors[il].selected, tensors[il].stability }) {
        c.tensor(t, stream*t->nb[2], t->nb[2]);
    }
}

bool llama_frozen::is_sound(const char * bytes, int32_t il, int32_t n_coded) const {
    return llama_cells_at(bytes, tensors[il].selected->nb[2]/sizeof(int32_t), n_coded);
}

// ---- oracle --------------------------------------------------------------------------------------------------------------

void llama_oracle::allocate(ggml_context * ctx, const std::vector<int32_t> & ils) {
    for (const int32_t il : ils) {
        lists[il] = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, core.params.n_selected, core.layers[il].n_head_kv, core.streams.size());
    }
}

void llama_oracle::key(llama_support_part & part) const {
    if (part.kind == LLAMA_SUPPORT_FAST) {
        part.n_list = llama_list_size(core, part.stream);
    }
}

void llama_oracle::new_inputs(ggml_context * ctx, llama_part_input & in) const {
    if (in.part.kind == LLAMA_SUPPORT_FAST) {
        in.plan = llama_new_input(ctx, GGML_TYPE_I32, { 3, 1, 1, 1 }, "support_plan");
    }
}

void llama_oracle::set_inputs(const llama_part_input & in) const {
    if (in.part.kind == LLAMA_SUPPORT_FAST && llama_is_used(in.plan)) {
        const int32_t n = core.streams[in.part.stream].mirror.size();
        const auto [j0, j1] = core.params.candidates(n);
        const int32_t values[] = { j0, j1, n }; // this query sees all
        ggml_backend_tensor_set(in.plan, values, 0, ggml_nbytes(in.plan));
    }
}

ggml_tensor * llama_oracle::attend(const llama_layer_graph & a) const {
    if (a.in.part.kind != LLAMA_SUPPORT_FAST) {
        return llama_attend_densely(a);
    }
    ggml_context * ctx = a.g.ctx0;
    ggml_support_selector plain = {};
    plain.kind = GGML_SUPPORT_SELECTOR_TOPK;
    ggml_tensor * evidence = ggml_support_evidence(ctx, a.q, a.k, a.in.cells, a.in.plan, a.kq_scale, a.softcap, 1.0f, GGML_SUPPORT_SOFTMAX_VISIBLE);
    ggml_tensor * selected = ggml_support_select(ctx, evidence, a.in.cells, a.in.plan, nullptr, core.params.n_selected, &plain);
    ggml_build_forward_expand(a.g.gf, ggml_cpy(ctx, selected, llama_stream_of(ctx, lists[a.il], a.in.part.stream)));
    return attend_to(a, selected);
}

void llama_oracle::report(uint32_t stream, int32_t, int32_t, llama_support_report & out) const {
    report_selected(core, window(core.streams[stream]), out);
}

std::vector<int32_t> llama_oracle::selected(uint32_t stream, int32_t il, int32_t head_kv) const {
    return llama_read_cells(lists[il], stream, head_kv);
}
