#include "llama-portable.h"

#include "llama-model.h"

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

int64_t llama_support::scan_size(const stream_state & st) const {
    return std::min<int64_t>(GGML_PAD((int64_t) st.n_used, scan_pad), kv->get_size());
}

// The ring holds n_grow cells more than a sliding window shows.
bool llama_support::overwritten(int32_t n) const {
    return has_portable() && !params.pinned && params.n_sink + params.n_recent + n > always_size();
}

llama_portable_key llama_support::portable_key() const {
    const auto & st = streams[stream];
    llama_portable_key k;
    if (ubatch_kind == LLAMA_SUPPORT_NONE) {
        return k;
    }
    const int64_t n_ring = always_size() - params.n_sink;
    if (ubatch_refresh) {
        k.n_append = always_size();
    } else if (st.valid) { // of more than the ring holds, the latest
        k.n_append = std::min<int64_t>(ubatch_tokens, n_ring > 0 ? n_ring : always_size());
    }
    if (ubatch_refresh && params.refreshes()) {
        const auto [j0, j1] = candidates((int32_t) st.cells.size());
        k.n_scan = scan_size(st);
        k.n_top  = std::min(params.n_selected, j1 - j0);
        for (size_t i = 0; i < st.cells.size() && k.ordered; ++i) {
            k.ordered = st.cells[i] == (int32_t) i;
        }
    }
    return k;
}

llama_portable_input::llama_portable_input(std::shared_ptr<llama_support> support) :
        support(std::move(support)), built(this->support->graph_key()), key(this->support->portable_key()) {}

bool llama_portable_input::can_reuse(const llm_graph_params &) {
    return built == support->graph_key() && key == support->portable_key();
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

void llama_portable_input::set_input(const llama_ubatch *) {
    if (is_used(cells)) {
        set_append();
    }
    if (is_used(in_use)) {
        set_in_use();
    }
    if (is_used(visible)) {
        set_evidence();
    }
    if (is_used(own_head)) {
        const int64_t n = own_head->ne[1];
        std::vector<float> diagonal(n*n, 0.0f);
        for (int64_t h = 0; h < n; ++h) {
            diagonal[h*n + h] = 1.0f;
        }
        set(own_head, diagonal);
    }
    if (is_used(order)) {
        set_order();
    }
    if (is_used(top)) {
        std::vector<int64_t> rows(key.n_top);
        std::iota(rows.begin(), rows.end(), 0);
        set(top, rows);
    }
}

// After a refresh all of always is written anew, as it may never have been; else the cells of this ubatch are.
void llama_portable_input::set_append() {
    const auto & st = support->streams[built.stream];
    const int32_t n = (int32_t) st.cells.size();
    const auto places = support->ubatch_refresh ? always_places(support->candidates(n), n) : always_places({ 0, n - (int32_t) key.n_append }, n);
    std::vector<int32_t> list;
    std::vector<int64_t> rows;
    for (const int64_t i : places) {
        list.push_back(st.cells[i]);
        rows.push_back(selected_rows(support->params) + slot_of(i, support->params, support->always_size()));
    }
    list.resize(key.n_append, list.back()); // the same row twice does no harm
    rows.resize(key.n_append, rows.back());
    set_cells(cells, list);
    set(slots, rows);
}

void llama_portable_input::set_in_use() {
    const auto & st = support->streams[built.stream];
    const int64_t n_selected = selected_rows(support->params);
    std::vector<ggml_fp16_t> mask(in_use->ne[0], blind);
    std::fill_n(mask.begin(), n_selected > 0 ? st.n_chosen : 0, sees);
    for (const int64_t i : always_places(support->window(st), st.cells.size())) {
        mask[n_selected + slot_of(i, support->params, support->always_size())] = sees;
    }
    set(in_use, mask);
}

// how many cells each query sees, 0: it gives no evidence
std::vector<int32_t> llama_portable_input::n_visible() const {
    const auto & st = support->streams[built.stream];
    const int32_t n = (int32_t) st.cells.size();
    const bool slow = built.kind == LLAMA_SUPPORT_SLOW;
    if (visible->ne[1] == 1 && slow) {
        return { n }; // the query at work
    }
    std::vector<int32_t> seen;
    for (const llama_pos pos : st.query_pos) {
        const llama_pos age = st.last_pos - pos;
        const bool used = pos >= 0 && age >= 0 && age < (slow ? support->params.n_slow_evidence : support->params.n_evidence);
        seen.push_back(used ? std::max(0, n - age) : 0);
    }
    return seen;
}

void llama_portable_input::set_evidence() {
    const auto & st = support->streams[built.stream];
    const auto seen = n_visible();
    const int64_t n_q = seen.size(), n_used = n_q - std::count(seen.begin(), seen.end(), 0);

    // a query that gives no evidence may see anything, but not nothing: that has no softmax
    std::vector<ggml_fp16_t> mask(key.n_scan*n_q, blind);
    std::vector<float> shares(n_q);
    for (int64_t q = 0; q < n_q; ++q) {
        shares[q] = seen[q] ? (float) n_q/n_used : 0.0f;
        for (int32_t i = 0; i < std::max(seen[q], 1); ++i) {
            mask[q*key.n_scan + st.cells[i]] = sees;
        }
    }
    set(visible, mask);
    if (is_used(weights)) {
        set(weights, shares);
    }
    std::vector<float> ones(key.n_scan, 0.0f), penalty(key.n_scan, never);
    const auto [j0, j1] = support->candidates((int32_t) st.cells.size());
    for (int32_t j = j0; j < j1; ++j) {
        ones[st.cells[j]] = 1.0f;
        penalty[st.cells[j]] = 0.0f;
    }
    set(is_candidate, ones);
    if (is_used(handicap)) {
        set(handicap, penalty);
    }
}

void llama_portable_input::set_order() {
    const auto & st = support->streams[built.stream];
    std::vector<int32_t> list = st.cells, places(key.n_scan, (int32_t) key.n_scan - 1);
    list.resize(key.n_scan, st.cells.back()); // recent, so without evidence
    for (size_t i = 0; i < st.cells.size(); ++i) {
        places[st.cells[i]] = (int32_t) i;
    }
    set_cells(order, list);
    set_cells(place, places);
}

static ggml_tensor * new_input(const llm_graph_context & g, ggml_type type, int64_t ne0, int64_t ne1, const char * name, int64_t ne3 = 1) {
    ggml_tensor * t = ggml_new_tensor_4d(g.ctx0, type, ne0, ne1, 1, ne3);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

llama_portable_input * llama_portable_build_input(const llm_graph_context & g, const std::shared_ptr<llama_support> & support) {
    if (!support->has_portable()) {
        return nullptr;
    }
    auto inp = std::make_unique<llama_portable_input>(support);
    const auto & key = inp->key;
    const auto & p   = support->get_params();
    int64_t n_head_kv = 0;
    for (const auto & layer : support->get_layers()) {
        n_head_kv = layer.compact_k ? std::max(n_head_kv, layer.compact_k->ne[2]) : n_head_kv;
    }
    if (key.n_append > 0) {
        inp->cells = new_input(g, GGML_TYPE_I32, key.n_append, n_head_kv, "portable_cells");
        inp->slots = new_input(g, GGML_TYPE_I64, key.n_append, 1, "portable_slots");
    }
    if (inp->built.kind == LLAMA_SUPPORT_FAST) {
        inp->in_use = new_input(g, GGML_TYPE_F16, compact_rows(p, support->always_size()), 1, "portable_in_use");
    }
    if (key.n_scan > 0) {
        const int64_t n_q = inp->built.kind == LLAMA_SUPPORT_SLOW && p.n_slow_evidence == 1 ? 1 : p.n_queries;
        inp->visible      = new_input(g, GGML_TYPE_F16, key.n_scan, n_q, "portable_visible");
        inp->weights      = n_q > 1 ? new_input(g, GGML_TYPE_F32, 1, n_q, "portable_weights") : nullptr;
        inp->is_candidate = new_input(g, GGML_TYPE_F32, key.n_scan, 1, "portable_is_candidate");
        inp->own_head     = ggml_is_quantized(support->get_kv()->type_k())
            ? new_input(g, GGML_TYPE_F32, 1, n_head_kv, "portable_own_head", n_head_kv) : nullptr;
    }
    if (key.n_top > 0) {
        inp->handicap = new_input(g, GGML_TYPE_F32, key.n_scan, 1, "portable_handicap");
        inp->top      = new_input(g, GGML_TYPE_I64, key.n_top, 1, "portable_top");
        inp->order    = key.ordered ? nullptr : new_input(g, GGML_TYPE_I32, key.n_scan, n_head_kv, "portable_order");
        inp->place    = key.ordered ? nullptr : new_input(g, GGML_TYPE_I32, key.n_scan, n_head_kv, "portable_place");
    }
    return (llama_portable_input *) g.res->add_input(std::move(inp));
}

// ---- the graph of a layer ------------------------------------------------------------------------------------------------

// the lists of a layer that may have fewer KV heads than others
static ggml_tensor * for_heads(ggml_context * ctx, ggml_tensor * lists, int64_t n_head_kv) {
    return !lists || lists->ne[1] == n_head_kv ? lists : ggml_view_2d(ctx, lists, lists->ne[0], n_head_kv, lists->nb[1], 0);
}

// evidence -> selected cells, I32 [n_top, n_head_kv]; null if there is no candidate. What the set before was is kept.
static ggml_tensor * refresh(const llm_graph_context & g, const llama_portable_input * inp, const llama_support_layer & layer,
                             ggml_tensor * q, ggml_tensor * k, float kq_scale, float softcap, int il) {
    ggml_context * ctx = g.ctx0;
    const uint32_t stream = inp->built.stream;
    ggml_tensor * evidence = evidence_of(ctx, q, k, inp->visible, inp->weights, inp->is_candidate, inp->own_head, kq_scale, softcap);
    g.cb(evidence, "portable_evidence", il);
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, evidence, first_of(ctx, layer.evidence, stream, inp->key.n_scan)));

    const int64_t n = layer.selected->ne[0];
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, first_of(ctx, layer.selected, stream, n), first_of(ctx, layer.previous, stream, n)));
    if (inp->key.n_top == 0) {
        return nullptr;
    }
    ggml_tensor * top = select(ctx, evidence, inp->handicap, for_heads(ctx, inp->order, k->ne[2]), for_heads(ctx, inp->place, k->ne[2]),
            inp->key.n_top, inp->support->get_params().selector);
    g.cb(top, "portable_selected", il);
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, top, first_of(ctx, layer.selected, stream, inp->key.n_top)));
    return top;
}

// The compact cache of K or V after this ubatch.
static ggml_tensor * update(const llm_graph_context & g, const llama_portable_input * inp, ggml_tensor * compact, ggml_tensor * cache,
                            ggml_tensor * top) {
    ggml_tensor * cur = stream_of(g.ctx0, compact, inp->built.stream);
    if (top) {
        cur = copy_rows(g.ctx0, cache, top, cur, inp->top);
    }
    if (inp->cells) {
        cur = copy_rows(g.ctx0, cache, for_heads(g.ctx0, inp->cells, cache->ne[2]), cur, inp->slots);
    }
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

ggml_tensor * llama_portable_build_attn(const llm_graph_context & g, const llama_portable_input * inp, ggml_tensor * q, ggml_tensor * q_kept,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale, float softcap, int il) {
    ggml_context * ctx = g.ctx0;
    const auto & layer = inp->support->layer(il);
    ggml_tensor * top = nullptr;
    if (inp->visible) {
        ggml_tensor * queries = inp->visible->ne[1] == 1 && inp->built.kind == LLAMA_SUPPORT_SLOW ? q
            : ggml_reshape_3d(ctx, q_kept, q->ne[0], q->ne[1], q_kept->ne[1]);
        top = refresh(g, inp, layer, queries, k, kq_scale, softcap, il);
    }
    k = update(g, inp, layer.compact_k, k, top);
    v = update(g, inp, layer.compact_v, v, top);
    if (inp->built.kind != LLAMA_SUPPORT_FAST) {
        return nullptr;
    }
    ggml_tensor * cur = attend(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, inp->in_use, sinks, kq_scale, softcap);
    g.cb(cur, "portable_attn", il);
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

// ---- inspection ----------------------------------------------------------------------------------------------------------

// the first n values of a KV head in what a stream of a tensor holds, see first_of()
template <class T>
static std::vector<T> read_head(const ggml_tensor * t, uint32_t stream, int32_t head_kv, int64_t n) {
    std::vector<T> values(n);
    ggml_backend_tensor_get(t, values.data(), stream*t->nb[2] + head_kv*n*sizeof(T), n*sizeof(T));
    return values;
}

std::vector<int32_t> llama_support::read_portable(uint32_t s, int32_t il, int32_t head_kv) const {
    return read_head<int32_t>(layers[il].selected, s, head_kv, streams[s].n_chosen);
}

// as ggml_support_stability()
std::array<float, 4> llama_support::portable_stability(uint32_t s, int32_t il, int32_t head_kv) const {
    const auto & st = streams[s];
    const auto evidence = read_head<float>(layers[il].evidence, s, head_kv, st.n_scanned);
    const auto selected = read_portable(s, il, head_kv);
    const auto previous = read_head<int32_t>(layers[il].previous, s, head_kv, st.n_previous);
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
