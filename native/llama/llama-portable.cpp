#include "llama-portable.h"

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

static int64_t selected_rows(const llama_support_params & p) {
    return p.refreshes() ? p.n_selected : 0;
}

static int64_t compact_rows(const llama_support_params & p, int64_t n_always) {
    return GGML_PAD(selected_rows(p) + n_always, compact_pad);
}

// the types that flash attention is given: upstream turns F32 into F16 before it
static ggml_type compact_type(ggml_type type) {
    return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type;
}

void llama_portable_allocate(ggml_context * ctx, llama_support_layer & layer, const llama_path_shape & s,
                             const llama_support_params & p, int64_t n_always, int64_t n_ctx, int64_t n_stream) {
    const int64_t n_rows = compact_rows(p, n_always);
    layer.compact_k = ggml_new_tensor_4d(ctx, compact_type(s.type_k), s.n_embd_head_k, n_rows, s.n_head_kv, n_stream);
    layer.compact_v = ggml_new_tensor_4d(ctx, compact_type(s.type_v), s.n_embd_head_v, n_rows, s.n_head_kv, n_stream);
    if (p.refreshes()) {
        layer.previous = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, p.n_selected, s.n_head_kv, n_stream);
        layer.evidence = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_ctx, s.n_head_kv, n_stream);
    }
}

static int64_t slot_of(int64_t i, const llama_support_params & p, int64_t n_always) {
    return i < p.n_sink ? i : p.n_sink + (i - p.n_sink) % (n_always - p.n_sink);
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

// ---- the input -----------------------------------------------------------------------------------------------------------

int64_t llama_portable_scan_size(const llama_sequence & seq, int64_t n_ctx) {
    return std::min<int64_t>(GGML_PAD((int64_t) seq.mirror.n_used(), scan_pad), n_ctx);
}

bool llama_portable_overwritten(const llama_support_params & p, int64_t n_always, int32_t n) {
    return !p.pinned() && p.n_sink + p.n_recent + n > n_always;
}

int64_t llama_portable_append(const llama_support_params & p, int64_t n_always, int32_t n_tokens) {
    const int64_t n_ring = n_always - p.n_sink;
    return std::min<int64_t>(n_tokens, n_ring > 0 ? n_ring : n_always); // of more than the ring holds, the latest
}

static bool is_used(const ggml_tensor * t) {
    return t && t->buffer;
}

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
static void set_always(ggml_tensor * cells, ggml_tensor * slots, const std::vector<int32_t> & text, const std::vector<int64_t> & places,
                       const llama_support_params & p, int64_t n_always) {
    std::vector<int32_t> list;
    std::vector<int64_t> rows;
    for (const int64_t i : places) {
        list.push_back(text[i]);
        rows.push_back(selected_rows(p) + slot_of(i, p, n_always));
    }
    list.resize(slots->ne[0], list.back()); // the same row twice does no harm
    rows.resize(slots->ne[0], rows.back());
    set_cells(cells, list);
    set(slots, rows);
}

void llama_portable_input::set(const llama_sequence & seq, const llama_support_params & p, int64_t n_always, std::pair<int32_t, int32_t> window) const {
    const int64_t n = seq.mirror.size();
    if (is_used(cells)) {
        set_always(cells, slots, seq.mirror.cells(), always_places({ 0, (int32_t) (n - slots->ne[0]) }, n), p, n_always);
    }
    if (is_used(in_use)) {
        const int64_t n_selected = selected_rows(p);
        std::vector<ggml_fp16_t> mask(in_use->ne[0], blind);
        std::fill_n(mask.begin(), n_selected > 0 ? seq.n_chosen : 0, sees);
        for (const int64_t i : always_places(window, n)) {
            mask[n_selected + slot_of(i, p, n_always)] = sees;
        }
        ::set(in_use, mask);
    }
}

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, const char * name, int64_t ne3 = 1) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, ne0, ne1, 1, ne3);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

// the most KV heads that a layer has
static int64_t most_heads(const std::vector<llama_support_layer> & layers) {
    int64_t n = 0;
    for (const auto & layer : layers) {
        n = layer.compact_k ? std::max(n, layer.compact_k->ne[2]) : n;
    }
    return n;
}

std::unique_ptr<llama_portable_input> llama_portable_new_input(ggml_context * ctx, const llama_support_key & key, const llama_support_params & p,
                                                               const std::vector<llama_support_layer> & layers, int64_t n_always) {
    auto inp = std::make_unique<llama_portable_input>();
    if (key.n_append > 0) {
        inp->cells = new_input(ctx, GGML_TYPE_I32, key.n_append, most_heads(layers), "portable_cells");
        inp->slots = new_input(ctx, GGML_TYPE_I64, key.n_append, 1, "portable_slots");
    }
    if (key.kind == LLAMA_SUPPORT_FAST) {
        inp->in_use = new_input(ctx, GGML_TYPE_F16, compact_rows(p, n_always), 1, "portable_in_use");
    }
    return inp;
}

// ---- the graph of a layer ------------------------------------------------------------------------------------------------

// the lists of a layer that may have fewer KV heads than others
static ggml_tensor * for_heads(ggml_context * ctx, ggml_tensor * lists, int64_t n_head_kv) {
    return !lists || lists->ne[1] == n_head_kv ? lists : ggml_view_2d(ctx, lists, lists->ne[0], n_head_kv, lists->nb[1], 0);
}

ggml_tensor * llama_portable_build_attn(const llm_graph_context & g, const llama_portable_input & inp, const llama_support_key & key,
        const llama_support_layer & layer, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale, float softcap, int il) {
    ggml_context * ctx = g.ctx0;
    const auto update = [&](ggml_tensor * compact, ggml_tensor * cache) {
        ggml_tensor * cur = stream_of(ctx, compact, key.stream);
        if (inp.cells) {
            cur = copy_rows(ctx, cache, for_heads(ctx, inp.cells, cache->ne[2]), cur, inp.slots);
            ggml_build_forward_expand(g.gf, cur);
        }
        return cur;
    };
    k = update(layer.compact_k, k);
    v = update(layer.compact_v, v);
    if (key.kind != LLAMA_SUPPORT_FAST) {
        return nullptr;
    }
    ggml_tensor * cur = attend(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, inp.in_use, sinks, kq_scale, softcap);
    g.cb(cur, "portable_attn", il);
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

// ---- the graph of a refresh ----------------------------------------------------------------------------------------------

// The queries that give evidence: all that are kept, or the one of the step alone.
struct portable_refresh {
    static constexpr int64_t nodes_per_layer = 72;

    portable_refresh(const llama_kv_cache & kv, const llama_support_params & params, const std::vector<llama_support_layer> & layers,
                     const llama_sequence & st, uint32_t stream, int64_t n_always, bool slow, float softcap);

    void build(ggml_context * ctx, ggml_cgraph * graph);
    void set_inputs() const;

private:
    void new_inputs(ggml_context * ctx);
    void build_layer(ggml_context * ctx, ggml_cgraph * graph, int32_t il) const;
    ggml_tensor * select_cells(ggml_context * ctx, ggml_cgraph * graph, const llama_support_layer & layer, ggml_tensor * k) const;
    ggml_tensor * queries(ggml_context * ctx, const llama_support_layer & layer, ggml_tensor * k) const;
    void set_evidence() const;
    void set_order() const;

    const llama_kv_cache       & kv;
    const llama_support_params & params;
    const std::vector<llama_support_layer> & layers;
    const llama_sequence       & st;
    uint32_t stream;
    int64_t  n_always;
    float    softcap;
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

portable_refresh::portable_refresh(const llama_kv_cache & kv, const llama_support_params & params, const std::vector<llama_support_layer> & layers,
                                   const llama_sequence & st, uint32_t stream, int64_t n_always, bool slow, float softcap) :
        kv(kv), params(params), layers(layers), st(st), stream(stream), n_always(n_always), softcap(softcap),
        candidates(params.candidates(st.mirror.size())) {
    if (!params.refreshes()) {
        return;
    }
    n_scan  = llama_portable_scan_size(st, kv.get_size());
    seen    = slow ? std::vector<int32_t>{ st.mirror.size() } : st.mirror.seen(params.n_evidence);
    ordered = st.mirror.in_order();
}

void portable_refresh::new_inputs(ggml_context * ctx) {
    const int64_t n_head_kv = most_heads(layers), n_q = seen.size();
    cells = new_input(ctx, GGML_TYPE_I32, n_always, n_head_kv, "portable_cells");
    slots = new_input(ctx, GGML_TYPE_I64, n_always, 1, "portable_slots");
    if (n_scan > 0) {
        visible      = new_input(ctx, GGML_TYPE_F16, n_scan, n_q, "portable_visible");
        weights      = n_q > 1 ? new_input(ctx, GGML_TYPE_F32, 1, n_q, "portable_weights") : nullptr;
        is_candidate = new_input(ctx, GGML_TYPE_F32, n_scan, 1, "portable_is_candidate");
        own_head     = ggml_is_quantized(kv.type_k()) ? new_input(ctx, GGML_TYPE_F32, 1, n_head_kv, "portable_own_head", n_head_kv) : nullptr;
    }
    if (n_scan > 0 && st.n_chosen > 0) {
        handicap = new_input(ctx, GGML_TYPE_F32, n_scan, 1, "portable_handicap");
        top      = new_input(ctx, GGML_TYPE_I64, st.n_chosen, 1, "portable_top");
        order    = ordered ? nullptr : new_input(ctx, GGML_TYPE_I32, n_scan, n_head_kv, "portable_order");
        place    = ordered ? nullptr : new_input(ctx, GGML_TYPE_I32, n_scan, n_head_kv, "portable_place");
    }
}

// [n_embd_k, n_head, n_q]
ggml_tensor * portable_refresh::queries(ggml_context * ctx, const llama_support_layer & layer, ggml_tensor * k) const {
    const ggml_tensor * ring = layer.queries;
    const bool   one  = seen.size() == 1;
    const size_t from = stream*ring->nb[2] + (one ? (st.mirror.last_pos() % params.n_queries)*ring->nb[1] : 0);
    return ggml_view_3d(ctx, layer.queries, k->ne[0], ring->ne[0]/k->ne[0], one ? 1 : ring->ne[1], k->ne[0]*sizeof(float), ring->nb[1], from);
}

// evidence -> selected cells, I32 [n_chosen, n_head_kv]; null if there is no candidate. What the set before was is kept.
ggml_tensor * portable_refresh::select_cells(ggml_context * ctx, ggml_cgraph * graph, const llama_support_layer & layer, ggml_tensor * k) const {
    ggml_tensor * evidence = evidence_of(ctx, queries(ctx, layer, k), k, visible, weights, is_candidate, own_head, layer.kq_scale, softcap);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, evidence, first_of(ctx, layer.evidence, stream, n_scan)));

    const int64_t n = layer.selected->ne[0];
    ggml_build_forward_expand(graph, ggml_cpy(ctx, first_of(ctx, layer.selected, stream, n), first_of(ctx, layer.previous, stream, n)));
    if (!top) {
        return nullptr;
    }
    ggml_tensor * chosen = select(ctx, evidence, handicap, for_heads(ctx, order, k->ne[2]), for_heads(ctx, place, k->ne[2]), st.n_chosen, params.selector);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, chosen, first_of(ctx, layer.selected, stream, st.n_chosen)));
    return chosen;
}

void portable_refresh::build_layer(ggml_context * ctx, ggml_cgraph * graph, int32_t il) const {
    const auto & layer = layers[il];
    llama_kv_cache::slot_info all;
    all.s0 = all.s1 = stream;
    ggml_tensor * k = llama_support_all_cells(ctx, kv.get_k(ctx, il, kv.get_size(), all));
    ggml_tensor * v = llama_support_all_cells(ctx, kv.get_v(ctx, il, kv.get_size(), all));
    ggml_tensor * chosen = visible ? select_cells(ctx, graph, layer, k) : nullptr;
    for (const auto & [compact, cache] : { std::make_pair(layer.compact_k, k), std::make_pair(layer.compact_v, v) }) {
        ggml_tensor * cur = stream_of(ctx, compact, stream);
        if (chosen) {
            cur = copy_rows(ctx, cache, chosen, cur, top);
        }
        ggml_build_forward_expand(graph, copy_rows(ctx, cache, for_heads(ctx, cells, cache->ne[2]), cur, slots));
    }
}

void portable_refresh::build(ggml_context * ctx, ggml_cgraph * graph) {
    new_inputs(ctx);
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (layers[il].compact_k) {
            build_layer(ctx, graph, il);
        }
    }
}

void portable_refresh::set_inputs() const {
    set_always(cells, slots, st.mirror.cells(), always_places(candidates, st.mirror.size()), params, n_always);
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
        std::vector<int64_t> rows(st.n_chosen);
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

bool llama_portable_refresh(llama_side_graph & side, ggml_backend_sched_t sched, const llama_kv_cache & kv, const llama_support_params & params,
        const std::vector<llama_support_layer> & layers, const llama_sequence & seq, uint32_t stream, int64_t n_always, bool slow, float softcap) {
    portable_refresh refresh(kv, params, layers, seq, stream, n_always, slow, softcap);
    return side.compute(sched, portable_refresh::nodes_per_layer*layers.size() + 16,
            [&](ggml_context * ctx, ggml_cgraph * graph) { refresh.build(ctx, graph); }, [&] { refresh.set_inputs(); });
}

// ---- inspection ----------------------------------------------------------------------------------------------------------

// the first n values of a KV head in what a stream of a tensor holds, see first_of()
template <class T>
static std::vector<T> read_head(const ggml_tensor * t, uint32_t stream, int32_t head_kv, int64_t n) {
    std::vector<T> values(n);
    ggml_backend_tensor_get(t, values.data(), stream*t->nb[2] + head_kv*n*sizeof(T), n*sizeof(T));
    return values;
}

std::vector<int32_t> llama_portable_selected(const llama_support_layer & layer, const llama_sequence & seq, uint32_t stream, int32_t head_kv) {
    return read_head<int32_t>(layer.selected, stream, head_kv, seq.n_chosen);
}

std::array<float, 4> llama_portable_stability(const llama_support_layer & layer, const llama_sequence & seq, uint32_t stream, int32_t head_kv) {
    const auto evidence = read_head<float>(layer.evidence, stream, head_kv, seq.n_scanned);
    const auto selected = llama_portable_selected(layer, seq, stream, head_kv);
    const auto previous = read_head<int32_t>(layer.previous, stream, head_kv, seq.n_previous);
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
