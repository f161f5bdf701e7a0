#include "portable.h"

#include "frozen.h"

#include "llama-context.h"

#include <cmath>
#include <numeric>
#include <set>

static constexpr int64_t scan_pad    = 1024; // evidence is made of so many cells at a time, so that a graph fits many depths
static constexpr int64_t compact_pad = 256;  // flash attention of some backends wants its rows so
static constexpr float   never       = -1e30f; // a score below all evidence, but not so far that a sum overflows

bool llama_portable_has(const llama_support_params & p) {
    return (p.policy == LLAMA_SUPPORT_FROZEN || p.policy == LLAMA_SUPPORT_WINDOW) && p.selector.kind == GGML_SUPPORT_SELECTOR_TOPK;
}

// ---- the compact cache ---------------------------------------------------------------------------------------------------

// the types that flash attention is given: upstream turns F32 into F16 before it
static ggml_type compact_type(ggml_type type) {
    return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type;
}

llama_portable::llama_portable(llama_support_core & core, std::unique_ptr<llama_policy> window_of) :
        llama_policy(core), window_of(std::move(window_of)), tensors(core.layers.size()), refreshes(core.streams.size()) {}

int64_t llama_portable::compact_rows() const {
    return GGML_PAD(selected_rows() + core.always_size(), compact_pad);
}

int64_t llama_portable::slot_of(int64_t i) const {
    const int64_t n_sink = core.params.n_sink;
    return i < n_sink ? i : n_sink + (i - n_sink) % (core.always_size() - n_sink);
}

int64_t llama_portable::most_heads() const {
    int64_t n = 0;
    for (const auto & t : tensors) {
        n = t.compact_k ? std::max(n, t.compact_k->ne[2]) : n;
    }
    return n;
}

void llama_portable::allocate(ggml_context * ctx, const std::vector<int32_t> & ils) {
    const int64_t n_rows = compact_rows(), n_stream = core.streams.size();
    for (const int32_t il : ils) {
        const auto & layer = core.layers[il];
        auto & t = tensors[il];
        t.compact_k = ggml_new_tensor_4d(ctx, compact_type(layer.k->type), layer.n_embd_k, n_rows, layer.n_head_kv, n_stream);
        t.compact_v = ggml_new_tensor_4d(ctx, compact_type(layer.v->type), layer.n_embd_v, n_rows, layer.n_head_kv, n_stream);
        if (core.params.refreshes()) {
            t.selected = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, core.params.n_selected, layer.n_head_kv, n_stream);
            t.previous = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, core.params.n_selected, layer.n_head_kv, n_stream);
            t.evidence = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, core.kv.get_size(), layer.n_head_kv, n_stream);
        }
    }
}

// the part of one stream in a tensor [.., .., .., n_stream]
static ggml_tensor * stream_of(ggml_context * ctx, ggml_tensor * t, uint32_t stream) {
    return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], t->ne[2], t->nb[1], t->nb[2], stream*t->nb[3]);
}

// Copies rows of a cache [n_embd, n_cells, n_head_kv], a list of cells [n, n_head_kv], to rows [n] of a compact one; the
// result is that cache afterwards.
static ggml_tensor * copy_rows(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * cells, ggml_tensor * compact, ggml_tensor * rows) {
    return ggml_set_rows(ctx, compact, ggml_get_rows(ctx, cache, cells), rows);
}

static ggml_tensor * attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * in_use,
                            ggml_tensor * sinks, float scale, float softcap) {
    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, k, v, in_use, scale, 0.0f, softcap);
    ggml_flash_attn_ext_add_sinks(cur, sinks);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    return cur;
}

// ---- a refresh -----------------------------------------------------------------------------------------------------------

// k . q of cells 0 .. n_scan - 1 in k [n_embd_k, n_cells, n_head_kv], of queries [n_embd_k, n_rows, n_head_kv]: [n_scan, ...].
static ggml_tensor * logits_of(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, int64_t n_scan, ggml_tensor * own_head) {
    const int64_t n_embd = k->ne[0], n_head_kv = k->ne[2], n_rows = q->ne[1];
    if (!own_head) {
        return ggml_mul_mat(ctx, ggml_view_3d(ctx, k, n_embd, n_scan, n_head_kv, k->nb[1], k->nb[2], 0), q);
    }
    // Few backends multiply quantised rows that have gaps between them. So all heads of a cell are one row, and a query is
    // zero for the heads that are not its own: K is read once all the same.
    GGML_ASSERT(k->nb[2] == ggml_row_size(k->type, n_embd));
    own_head = ggml_view_4d(ctx, own_head, 1, n_head_kv, 1, n_head_kv, own_head->nb[1], own_head->nb[2], own_head->nb[3], 0);
    q = ggml_repeat_4d(ctx, ggml_reshape_4d(ctx, q, n_embd, 1, n_rows, n_head_kv), n_embd, n_head_kv, n_rows, n_head_kv);
    q = ggml_reshape_2d(ctx, ggml_mul(ctx, q, own_head), n_embd*n_head_kv, n_rows*n_head_kv);
    return ggml_mul_mat(ctx, ggml_view_2d(ctx, k, n_embd*n_head_kv, n_scan, k->nb[1], 0), q);
}

// Evidence of the cells 0 .. n_scan - 1, [n_scan, n_head_kv], of queries [n_embd_k, n_head, n_q].
static ggml_tensor * evidence_of(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * visible, ggml_tensor * weights,
                                 ggml_tensor * is_candidate, ggml_tensor * own_head, float scale, float softcap) {
    const int64_t n_scan = visible->ne[0], n_q = q->ne[2], n_head = q->ne[1], n_head_kv = k->ne[2], n_rows = n_q*n_head/n_head_kv;
    if (n_q > 1 || !ggml_is_contiguous(q)) {
        q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3)); // the queries of a head together: they share the mask
    }
    ggml_tensor * p = logits_of(ctx, k, ggml_reshape_3d(ctx, q, k->ne[0], n_rows, n_head_kv), n_scan, own_head);
    ggml_prec_set_acc(p, GGML_PREC_F32);
    if (softcap > 0.0f) {
        p = ggml_tanh(ctx, ggml_scale(ctx, p, scale/softcap));
        scale = softcap;
    }
    p = ggml_soft_max_ext(ctx, ggml_reshape_3d(ctx, p, n_scan, n_q, n_head), visible, scale, 0.0f);
    if (weights) {
        p = ggml_mul(ctx, p, weights);
    }
    p = ggml_reshape_3d(ctx, p, n_scan, n_rows, n_head_kv);
    if (n_rows > 1) {
        p = ggml_pool_2d(ctx, p, GGML_OP_POOL_AVG, 1, (int) n_rows, 1, (int) n_rows, 0, 0);
    }
    return ggml_mul(ctx, ggml_reshape_2d(ctx, p, n_scan, n_head_kv), is_candidate);
}

// rows of one value: x(i, h) = t(list(i, h), h)
static ggml_tensor * permuted(ggml_context * ctx, ggml_tensor * t, ggml_tensor * list) {
    ggml_tensor * x = ggml_get_rows(ctx, ggml_reshape_3d(ctx, t, 1, t->ne[0], t->ne[1]), list);
    return ggml_reshape_2d(ctx, x, t->ne[0], t->ne[1]);
}

// score(j) = max of evidence(i) with j - after <= i <= j + before
static ggml_tensor * pooled(ggml_context * ctx, ggml_tensor * evidence, int after, int before) {
    if (after + before == 0) {
        return evidence;
    }
    const int pad = std::max(after, before); // pooling pads both ends alike
    ggml_tensor * all = ggml_pool_2d(ctx, evidence, GGML_OP_POOL_MAX, after + before + 1, 1, 1, 1, pad, 0);
    return ggml_view_2d(ctx, all, evidence->ne[0], evidence->ne[1], all->nb[1], (pad - after)*sizeof(float));
}

// The n_top best cells of each KV head, I32 [n_top, n_head_kv].
static ggml_tensor * select(ggml_context * ctx, ggml_tensor * evidence, ggml_tensor * handicap, ggml_tensor * order, ggml_tensor * place,
                            int64_t n_top, const ggml_support_selector & s) {
    ggml_tensor * score = order ? permuted(ctx, evidence, order) : evidence;
    score = pooled(ctx, score, s.pool_after, s.pool_before);
    if (order) {
        score = permuted(ctx, ggml_cont(ctx, score), place);
    }
    return ggml_top_k(ctx, ggml_add(ctx, score, handicap), (int) n_top);
}

// the first n values of what a stream of a tensor [ne0, n_head_kv, n_stream] holds, as [n, n_head_kv]
static ggml_tensor * first_of(ggml_context * ctx, ggml_tensor * t, uint32_t stream, int64_t n) {
    return ggml_view_2d(ctx, t, n, t->ne[1], n*ggml_element_size(t), stream*t->nb[2]);
}

// ---- what a device is asked about ----------------------------------------------------------------------------------------

std::vector<ggml_tensor *> llama_portable_operations(ggml_context * c, const llama_path_shape & s, const llama_support_params & p) {
    const int64_t n = scan_pad, n_rows = compact_pad, n_q = 2, n_top = 16;
    // K and V of a cell lie side by side, head after head
    const auto cache = [&](ggml_type type, int64_t n_embd) {
        return ggml_permute(c, ggml_new_tensor_3d(c, type, n_embd, s.n_head_kv, n), 0, 2, 1, 3);
    };
    ggml_tensor * k      = cache(s.type_k, s.n_embd_head_k), * v = cache(s.type_v, s.n_embd_head_v);
    ggml_tensor * q      = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.n_embd_head_k, 1, s.n_head);
    ggml_tensor * kept   = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.n_embd_head_k, s.n_head, n_q);
    ggml_tensor * cells  = ggml_new_tensor_2d(c, GGML_TYPE_I32, n_top, s.n_head_kv);
    ggml_tensor * rows   = ggml_new_tensor_1d(c, GGML_TYPE_I64, n_top);
    ggml_tensor * in_use = ggml_new_tensor_2d(c, GGML_TYPE_F16, n_rows, 1);
    ggml_tensor * sinks  = s.sinks ? ggml_new_tensor_1d(c, GGML_TYPE_F32, s.n_head) : nullptr;
    ggml_tensor * dense  = attend(c, q, k, v, ggml_new_tensor_2d(c, GGML_TYPE_F16, n, 1), sinks, 1.0f, 0.0f);
    ggml_tensor * fast   = attend(c, q,
            copy_rows(c, k, cells, ggml_new_tensor_3d(c, compact_type(s.type_k), s.n_embd_head_k, n_rows, s.n_head_kv), rows),
            copy_rows(c, v, cells, ggml_new_tensor_3d(c, compact_type(s.type_v), s.n_embd_head_v, n_rows, s.n_head_kv), rows),
            in_use, sinks, 1.0f, 0.0f);
    std::vector<ggml_tensor *> results = { dense, fast };
    if (p.refreshes()) {
        ggml_tensor * evidence = evidence_of(c, kept, k, ggml_new_tensor_2d(c, GGML_TYPE_F16, n, n_q), ggml_new_tensor_2d(c, GGML_TYPE_F32, 1, n_q),
                ggml_new_tensor_1d(c, GGML_TYPE_F32, n),
                ggml_is_quantized(s.type_k) ? ggml_new_tensor_4d(c, GGML_TYPE_F32, 1, s.n_head_kv, 1, s.n_head_kv) : nullptr, 1.0f, 0.0f);
        ggml_tensor * order = ggml_new_tensor_2d(c, GGML_TYPE_I32, n, s.n_head_kv);
        ggml_tensor * top   = select(c, evidence, ggml_new_tensor_1d(c, GGML_TYPE_F32, n), order, order, n_top, p.selector);
        results.push_back(ggml_cpy(c, evidence, ggml_new_tensor_2d(c, GGML_TYPE_F32, n, s.n_head_kv)));
        results.push_back(ggml_cpy(c, top, cells));
    }
    ggml_cgraph * graph = ggml_new_graph_custom(c, 128, false);
    for (ggml_tensor * result : results) {
        ggml_build_forward_expand(graph, result);
    }
    return std::vector<ggml_tensor *>(ggml_graph_nodes(graph), ggml_graph_nodes(graph) + ggml_graph_n_nodes(graph));
}

// ---- a sequence ------------------------------------------------------------------------------------------------------------

// Cells that the evidence of a refresh is made of.
static int64_t scan_size(const llama_support_core & core, uint32_t stream) {
    return std::min<int64_t>(GGML_PAD((int64_t) core.streams[stream].mirror.n_used(), scan_pad), core.kv.get_size());
}

// The rows that a sliding window needs must not be gone: the ring holds n_grow cells more than it shows.
bool llama_portable::cut(llama_sequence & st, int32_t left) const {
    const auto & p = core.params;
    const bool overwritten = !is_pinned() && p.n_sink + p.n_recent + (st.mirror.size() - left) > core.always_size();
    return window_of->cut(st, left) && !overwritten;
}

// ---- the inputs ------------------------------------------------------------------------------------------------------------

template <class T>
static void set(ggml_tensor * t, const std::vector<T> & values) {
    GGML_ASSERT(values.size()*sizeof(T) == ggml_nbytes(t));
    ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
}

// a list of cells, for every KV head
static void set_cells(ggml_tensor * t, const std::vector<int32_t> & cells) {
    std::vector<int32_t> all;
    for (int64_t h = 0; h < t->ne[1]; ++h) {
        all.insert(all.end(), cells.begin(), cells.end());
    }
    set(t, all);
}

static const ggml_fp16_t sees = ggml_fp32_to_fp16(0.0f), blind = ggml_fp32_to_fp16(-INFINITY);

// the places in the text of always: [0, first) and [second, n)
static std::vector<int64_t> always_places(std::pair<int32_t, int32_t> window, int64_t n) {
    std::vector<int64_t> places(window.first + n - window.second);
    std::iota(places.begin(), places.begin() + window.first, 0);
    std::iota(places.begin() + window.first, places.end(), window.second);
    return places;
}

// Fills the lists of the cells at these places of the text, and of their rows.
void llama_portable::set_always(ggml_tensor * cells, ggml_tensor * slots, uint32_t stream, const std::vector<int64_t> & places) const {
    const auto & text = core.streams[stream].mirror.cells();
    std::vector<int32_t> list;
    std::vector<int64_t> rows;
    for (const int64_t i : places) {
        list.push_back(text[i]);
        rows.push_back(selected_rows() + slot_of(i));
    }
    list.resize(slots->ne[0], list.back()); // the same row twice does no harm
    rows.resize(slots->ne[0], rows.back());
    set_cells(cells, list);
    set(slots, rows);
}

// Rows of always that a step writes; a refresh writes all of them anew.
void llama_portable::key(llama_support_part & part) const {
    const int64_t n_ring = core.always_size() - core.params.n_sink;
    if (!part.refresh && core.streams[part.stream].valid) {
        part.n_append = std::min<int64_t>(part.n_tokens, n_ring > 0 ? n_ring : core.always_size()); // of more than the ring holds, the latest
    }
}

void llama_portable::new_inputs(ggml_context * ctx, llama_part_input & in) const {
    const int64_t n_append = in.part.n_append;
    if (n_append > 0) {
        in.append = llama_new_input(ctx, GGML_TYPE_I32, { n_append, most_heads(), 1, 1 }, "portable_cells");
        in.slots  = llama_new_input(ctx, GGML_TYPE_I64, { n_append, 1, 1, 1 }, "portable_slots");
    }
    if (in.part.kind == LLAMA_SUPPORT_FAST) {
        in.in_use = llama_new_input(ctx, GGML_TYPE_F16, { compact_rows(), 1, 1, 1 }, "portable_in_use");
    }
}

void llama_portable::set_inputs(const llama_part_input & in) const {
    const uint32_t stream = in.part.stream;
    const auto & st = core.streams[stream];
    const int64_t n = st.mirror.size();
    if (llama_is_used(in.append)) {
        set_always(in.append, in.slots, stream, always_places({ 0, (int32_t) (n - in.slots->ne[0]) }, n));
    }
    if (llama_is_used(in.in_use)) {
        std::vector<ggml_fp16_t> mask(in.in_use->ne[0], blind);
        std::fill_n(mask.begin(), selected_rows() > 0 ? refreshes[stream].n_chosen : 0, sees);
        for (const int64_t i : always_places(window(st), n)) {
            mask[selected_rows() + slot_of(i)] = sees;
        }
        set(in.in_use, mask);
    }
}

// ---- the graph of a layer ------------------------------------------------------------------------------------------------

// the lists of a layer that may have fewer KV heads than others
static ggml_tensor * for_heads(ggml_context * ctx, ggml_tensor * lists, int64_t n_head_kv) {
    return !lists || lists->ne[1] == n_head_kv ? lists : ggml_view_2d(ctx, lists, lists->ne[0], n_head_kv, lists->nb[1], 0);
}

ggml_tensor * llama_portable::attend(const llama_layer_graph & a) const {
    ggml_context * ctx = a.g.ctx0;
    const auto update = [&](ggml_tensor * compact, ggml_tensor * cache) {
        ggml_tensor * cur = stream_of(ctx, compact, a.in.part.stream);
        if (a.in.append) {
            cur = copy_rows(ctx, cache, for_heads(ctx, a.in.append, cache->ne[2]), cur, a.in.slots);
            ggml_build_forward_expand(a.g.gf, cur);
        }
        return cur;
    };
    ggml_tensor * k = update(tensors[a.il].compact_k, a.k);
    ggml_tensor * v = update(tensors[a.il].compact_v, a.v);
    return a.in.part.kind == LLAMA_SUPPORT_FAST
        ? a.done(::attend(ctx, a.q_rows(), k, v, a.in.in_use, a.sinks, a.kq_scale, a.softcap), "portable_attn") : nullptr;
}

// ---- the graph of a refresh ----------------------------------------------------------------------------------------------

// The queries that give evidence: all that are kept, or the one of the step alone.
struct portable_refresh {
    static constexpr int64_t nodes_per_layer = 72;

    portable_refresh(const llama_portable & policy, uint32_t stream, bool slow);

    void build(ggml_context * ctx, ggml_cgraph * graph);
    void set_inputs() const;

private:
    void new_inputs(ggml_context * ctx);
    void build_layer(ggml_context * ctx, ggml_cgraph * graph, int32_t il) const;
    ggml_tensor * select_cells(ggml_context * ctx, ggml_cgraph * graph, int32_t il, ggml_tensor * k) const;
    ggml_tensor * queries(ggml_context * ctx, const llama_support_layer & layer) const;
    void set_evidence() const;
    void set_order() const;

    const llama_portable       & policy;
    const llama_support_core   & core;
    const llama_support_params & params;
    const llama_sequence       & st;
    uint32_t stream;
    int32_t  n_chosen;
    std::pair<int32_t, int32_t> candidates;
    std::vector<int32_t> seen;           // how many cells each query sees, 0: it gives no evidence
    int64_t  n_scan = 0;                 // cells that evidence is made of; 0: none is
    bool     ordered = true;             // cell i holds the i-th token of the text

    ggml_tensor * cells   = nullptr;     // as in llama_portable_input: all of always
    ggml_tensor * slots   = nullptr;
    ggml_tensor * visible = nullptr;     // F16 [n_scan, n_q]          0, or -INFINITY for cells that a query does not see
    ggml_tensor * weights = nullptr;     // F32 [1, n_q]               of the queries, 0 for those not used; null: there is one
    ggml_tensor * is_candidate = nullptr; // F32 [n_scan]              1 for candidates, else 0
    ggml_tensor * own_head = nullptr;    // F32 [1, n_head_kv, 1, n_head_kv] the unit matrix; null: K is not quantised
    ggml_tensor * handicap = nullptr;    // F32 [n_scan]               0 for candidates, else so much that they are never selected
    ggml_tensor * order   = nullptr;     // I32 [n_scan, n_head_kv]    cells in the order of the text; null: `ordered`
    ggml_tensor * place   = nullptr;     // I32 [n_scan, n_head_kv]    their places in it
    ggml_tensor * top     = nullptr;     // I64 [n_top] = 0, 1, ...    the rows of the selected cells
};

portable_refresh::portable_refresh(const llama_portable & policy, uint32_t stream, bool slow) :
        policy(policy), core(policy.core), params(core.params), st(core.streams[stream]), stream(stream),
        n_chosen(policy.refreshes[stream].n_chosen), candidates(params.candidates(st.mirror.size())) {
    if (!params.refreshes()) {
        return;
    }
    n_scan  = scan_size(core, stream);
    seen    = slow ? std::vector<int32_t>{ st.mirror.size() } : st.mirror.seen(params.n_evidence);
    ordered = st.mirror.in_order();
}

void portable_refresh::new_inputs(ggml_context * ctx) {
    const int64_t n_head_kv = policy.most_heads(), n_q = seen.size(), n_always = core.always_size();
    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, const char * name, int64_t ne3 = 1) {
        return llama_new_input(ctx, type, { ne0, ne1, 1, ne3 }, name);
    };
    cells = input(GGML_TYPE_I32, n_always, n_head_kv, "portable_cells");
    slots = input(GGML_TYPE_I64, n_always, 1, "portable_slots");
    if (n_scan > 0) {
        visible      = input(GGML_TYPE_F16, n_scan, n_q, "portable_visible");
        weights      = n_q > 1 ? input(GGML_TYPE_F32, 1, n_q, "portable_weights") : nullptr;
        is_candidate = input(GGML_TYPE_F32, n_scan, 1, "portable_is_candidate");
        own_head     = ggml_is_quantized(core.kv.type_k()) ? input(GGML_TYPE_F32, 1, n_head_kv, "portable_own_head", n_head_kv) : nullptr;
    }
    if (n_scan > 0 && n_chosen > 0) {
        handicap = input(GGML_TYPE_F32, n_scan, 1, "portable_handicap");
        top      = input(GGML_TYPE_I64, n_chosen, 1, "portable_top");
        order    = ordered ? nullptr : input(GGML_TYPE_I32, n_scan, n_head_kv, "portable_order");
        place    = ordered ? nullptr : input(GGML_TYPE_I32, n_scan, n_head_kv, "portable_place");
    }
}

// [n_embd_k, n_head, n_q]
ggml_tensor * portable_refresh::queries(ggml_context * ctx, const llama_support_layer & layer) const {
    ggml_tensor * ring = layer.queries;
    const bool   one  = seen.size() == 1;
    const size_t from = stream*ring->nb[2] + (one ? (st.mirror.last_pos() % params.n_queries)*ring->nb[1] : 0);
    return ggml_view_3d(ctx, ring, layer.n_embd_k, layer.n_head, one ? 1 : ring->ne[1], layer.n_embd_k*sizeof(float), ring->nb[1], from);
}

// evidence -> selected cells, I32 [n_chosen, n_head_kv]; null if there is no candidate. What the set before was is kept.
ggml_tensor * portable_refresh::select_cells(ggml_context * ctx, ggml_cgraph * graph, int32_t il, ggml_tensor * k) const {
    const auto & layer = core.layers[il];
    const auto & t     = policy.tensors[il];
    ggml_tensor * evidence = evidence_of(ctx, queries(ctx, layer), k, visible, weights, is_candidate, own_head, layer.kq_scale, core.softcap());
    ggml_build_forward_expand(graph, ggml_cpy(ctx, evidence, first_of(ctx, t.evidence, stream, n_scan)));

    const int64_t n = t.selected->ne[0];
    ggml_build_forward_expand(graph, ggml_cpy(ctx, first_of(ctx, t.selected, stream, n), first_of(ctx, t.previous, stream, n)));
    if (!top) {
        return nullptr;
    }
    ggml_tensor * chosen = select(ctx, evidence, handicap, for_heads(ctx, order, k->ne[2]), for_heads(ctx, place, k->ne[2]), n_chosen, params.selector);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, chosen, first_of(ctx, t.selected, stream, n_chosen)));
    return chosen;
}

void portable_refresh::build_layer(ggml_context * ctx, ggml_cgraph * graph, int32_t il) const {
    const auto & layer = core.layers[il];
    const auto & t     = policy.tensors[il];
    ggml_tensor * k = llama_all_cells(ctx, layer.k, layer.n_embd_k, layer.n_head_kv, stream);
    ggml_tensor * v = llama_all_cells(ctx, layer.v, layer.n_embd_v, layer.n_head_kv, stream);
    ggml_tensor * chosen = visible ? select_cells(ctx, graph, il, k) : nullptr;
    for (const auto & [compact, cache] : { std::make_pair(t.compact_k, k), std::make_pair(t.compact_v, v) }) {
        ggml_tensor * cur = stream_of(ctx, compact, stream);
        if (chosen) {
            cur = copy_rows(ctx, cache, chosen, cur, top);
        }
        ggml_build_forward_expand(graph, copy_rows(ctx, cache, for_heads(ctx, cells, cache->ne[2]), cur, slots));
    }
}

void portable_refresh::build(ggml_context * ctx, ggml_cgraph * graph) {
    new_inputs(ctx);
    for (int32_t il = 0; il < (int32_t) policy.tensors.size(); ++il) {
        if (policy.tensors[il].compact_k) {
            build_layer(ctx, graph, il);
        }
    }
}

void portable_refresh::set_inputs() const {
    policy.set_always(cells, slots, stream, always_places(candidates, st.mirror.size()));
    if (visible) {
        set_evidence();
    }
    if (own_head) {
        const int64_t n = own_head->ne[1];
        std::vector<float> diagonal(n*n, 0.0f);
        for (int64_t h = 0; h < n; ++h) {
            diagonal[h*n + h] = 1.0f;
        }
        set(own_head, diagonal);
    }
    if (order) {
        set_order();
    }
    if (top) {
        std::vector<int64_t> rows(n_chosen);
        std::iota(rows.begin(), rows.end(), 0);
        set(top, rows);
    }
}

void portable_refresh::set_evidence() const {
    const auto & text = st.mirror.cells();
    const int64_t n_q = seen.size(), n_used = n_q - std::count(seen.begin(), seen.end(), 0);

    // a query that gives no evidence may see anything, but not nothing: that has no softmax
    std::vector<ggml_fp16_t> mask(n_scan*n_q, blind);
    std::vector<float> shares(n_q);
    for (int64_t q = 0; q < n_q; ++q) {
        shares[q] = seen[q] ? (float) n_q/n_used : 0.0f;
        for (int32_t i = 0; i < std::max(seen[q], 1); ++i) {
            mask[q*n_scan + text[i]] = sees;
        }
    }
    set(visible, mask);
    if (weights) {
        set(weights, shares);
    }
    std::vector<float> ones(n_scan, 0.0f), penalty(n_scan, never);
    for (int32_t j = candidates.first; j < candidates.second; ++j) {
        ones[text[j]] = 1.0f;
        penalty[text[j]] = 0.0f;
    }
    set(is_candidate, ones);
    if (handicap) {
        set(handicap, penalty);
    }
}

void portable_refresh::set_order() const {
    const auto & text = st.mirror.cells();
    std::vector<int32_t> list = text, places(n_scan, (int32_t) n_scan - 1);
    list.resize(n_scan, text.back()); // recent, so without evidence
    for (size_t i = 0; i < text.size(); ++i) {
        places[text[i]] = (int32_t) i;
    }
    set_cells(order, list);
    set_cells(place, places);
}

bool llama_portable::refresh(llama_context & lctx, uint32_t stream, bool slow) {
    if (!window_of->refresh(lctx, stream, slow)) {
        return false;
    }
    auto & last = refreshes[stream];
    last.n_previous = last.n_chosen;
    last.n_chosen   = llama_most_selected(core, core.params.candidates(core.streams[stream].mirror.size()));
    last.n_scanned  = scan_size(core, stream);
    portable_refresh now(*this, stream, slow);
    return core.side.compute(lctx.get_sched(), portable_refresh::nodes_per_layer*core.layers.size() + 16,
            [&](ggml_context * ctx, ggml_cgraph * graph) { now.build(ctx, graph); }, [&] { now.set_inputs(); });
}

// ---- inspection ----------------------------------------------------------------------------------------------------------

// the first n values of a KV head in what a stream of a tensor holds, see first_of()
template <class T>
static std::vector<T> read_head(const ggml_tensor * t, uint32_t stream, int32_t head_kv, int64_t n) {
    std::vector<T> values(n);
    ggml_backend_tensor_get(t, values.data(), stream*t->nb[2] + head_kv*n*sizeof(T), n*sizeof(T));
    return values;
}

std::vector<int32_t> llama_portable::selected(uint32_t stream, int32_t il, int32_t head_kv) const {
    return read_head<int32_t>(tensors[il].selected, stream, head_kv, refreshes[stream].n_chosen);
}

std::array<float, 4> llama_portable::stability(uint32_t stream, int32_t il, int32_t head_kv) const {
    const auto evidence = read_head<float>(tensors[il].evidence, stream, head_kv, refreshes[stream].n_scanned);
    const auto selected = this->selected(stream, il, head_kv);
    const auto previous = read_head<int32_t>(tensors[il].previous, stream, head_kv, refreshes[stream].n_previous);
    const auto mass = [&](const std::vector<int32_t> & cells) {
        double sum = 0.0;
        for (const int32_t cell : cells) {
            sum += cell < (int64_t) evidence.size() ? evidence[cell] : 0.0f;
        }
        return (float) sum;
    };
    const std::set<int32_t> now(selected.begin(), selected.end());
    const size_t both  = std::count_if(previous.begin(), previous.end(), [&](int32_t cell) { return now.count(cell) > 0; });
    const size_t either = selected.size() + previous.size() - both;
    return { (float) std::accumulate(evidence.begin(), evidence.end(), 0.0), mass(selected), mass(previous),
             either > 0 ? (float) both/either : 1.0f };
}
