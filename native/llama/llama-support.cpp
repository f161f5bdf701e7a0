#include "llama-support.h"

#include "huge-pages.h"
#include "llama-path.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <tuple>

// The list of all cells is padded to this, so that a graph fits many depths.
static constexpr int64_t list_pad = 1024;
static constexpr int32_t min_block = 8; // tokens from which packing K and V once for all of them pays
static constexpr int64_t min_unpack = 32; // tokens from which unpacking weights once for all of them pays
static constexpr int64_t skip_pad = 256;

// ---- layers and their memory -------------------------------------------------------------------------------------------

static std::string why_dense(const llama_model & model, const llama_kv_cache & kv, const std::vector<uint32_t> & kv_layers, int32_t il) {
    const auto & hparams = model.hparams;
    if (!hparams.has_kv(il)) {
        return "has no KV cache of its own";
    }
    if (hparams.is_swa(il)) {
        return "attends to a sliding window only";
    }
    if (std::find(kv_layers.begin(), kv_layers.end(), (uint32_t) il) == kv_layers.end()) {
        return "keeps its state elsewhere than in the KV cache";
    }
    if (hparams.is_mla()) {
        return "uses multi-head latent attention";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias != 0.0f) {
        return "uses ALiBi position bias";
    }
    if (hparams.n_head(il) % std::max(hparams.n_head_kv(il), 1u) != 0) {
        return "has a number of heads that is no multiple of its KV heads";
    }
    const uint32_t d_k = hparams.n_embd_head_k(il), d_v = hparams.n_embd_head_v(il);
    if (d_k % 16 != 0 || d_v % 16 != 0 || d_k > 512 || d_v > 512) {
        return "has a head size that is no multiple of 16 (or above 512)";
    }
    if (d_k % ggml_blck_size(kv.type_k()) != 0 || d_v % ggml_blck_size(kv.type_v()) != 0) {
        return "has a head size that does not fit the blocks of this KV type";
    }
    return "";
}

llama_support::llama_support(llama_kv_cache * kv, const llama_kv_cache * kv_swa, const llama_model & model, const llama_support_params & params) :
        kv(kv), kv_swa(kv_swa), model(model), params(params), layers(model.hparams.n_layer()),
        streams(kv->get_n_stream(), llama_sequence(params.n_queries)) {
    // more than the cache holds would only cost memory
    for (int32_t * n : { &this->params.n_sink, &this->params.n_recent, &this->params.n_selected, &this->params.n_grow }) {
        *n = std::min<int32_t>(*n, kv->get_size());
    }
    const auto kv_layers = kv->get_layer_ids();
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        layers[il].why = why_dense(model, *kv, kv_layers, il);
    }
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (is_sparse(il)) {
            layers[il].path = path_of(model, il, this->params, &layers[il].lacks);
            has_blocks |= layers[il].path == LLAMA_PATH_NATIVE && ggml_backend_buffer_is_host(kv->get_k_storage(il)->buffer);
        }
    }
    if (params.selects() || has_portable()) {
        allocate(model);
    }
}

static llama_path_shape shape_of(const llama_model & model, const llama_kv_cache & kv, int32_t il) {
    const auto & hparams = model.hparams;
    return { hparams.n_head(il), hparams.n_head_kv(il), hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), kv.type_k(), kv.type_v(),
        model.layers[il].attn_sinks != nullptr, hparams.attn_soft_cap, kv.get_size() };
}

llama_support_path llama_support::path_of(const llama_model & model, int32_t il, const llama_support_params & p, std::string * lacks) const {
    return llama_path_choose(llama_path_device(kv->get_k_storage(il)->buffer), shape_of(model, *kv, il), p, lacks);
}

int64_t llama_support::most_cells(const llama_model & model, int32_t il) const {
    auto shape = shape_of(model, *kv, il);
    const auto dev = llama_path_device(kv->get_k_storage(il)->buffer);
    while (shape.n_cells > 0 && llama_path_choose(dev, shape, params) == LLAMA_PATH_NONE) {
        shape.n_cells /= 2;
    }
    return shape.n_cells;
}

bool llama_support::has_path_with_f16(const llama_model & model, int32_t il) const {
    auto shape = shape_of(model, *kv, il);
    shape.type_k = shape.type_v = GGML_TYPE_F16;
    return llama_path_choose(llama_path_device(kv->get_k_storage(il)->buffer), shape, params) != LLAMA_PATH_NONE;
}

void llama_support::allocate(const llama_model & model) {
    const auto & hparams = model.hparams;
    std::map<std::pair<ggml_backend_buffer_type_t, llama_support_path>, ggml_context *> contexts;

    const auto context_of = [&](int32_t il) {
        auto & ctx = contexts[{ ggml_backend_buffer_get_type(kv->get_k_storage(il)->buffer), layers[il].path }];
        if (!ctx) {
            ctx = ggml_init({ (9*layers.size() + 3)*ggml_tensor_overhead(), nullptr, true });
            if (!ctx) {
                throw std::bad_alloc();
            }
            buffers.emplace_back(ggml_context_ptr(ctx), nullptr);
        }
        return ctx;
    };

    const int64_t n_stream = streams.size();
    std::map<ggml_context *, std::vector<int32_t>> sketched;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (!is_sparse(il) || layers[il].path == LLAMA_PATH_NONE) {
            continue;
        }
        ggml_context * ctx = context_of(il);
        const int64_t n_head_kv = hparams.n_head_kv(il);
        const int64_t n_embd_q  = (int64_t) hparams.n_embd_head_k(il)*hparams.n_head(il);

        auto & layer = layers[il];
        if (layer.path == LLAMA_PATH_PORTABLE) {
            llama_portable_allocate(ctx, layer, shape_of(model, *kv, il), params, always_size(), kv->get_size(), n_stream);
        }
        if (!params.selects()) {
            continue;
        }
        layer.queries   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_q, params.n_queries, n_stream);
        layer.selected  = params.policy == LLAMA_SUPPORT_SKETCH ? nullptr
                        : ggml_new_tensor_3d(ctx, GGML_TYPE_I32, params.n_selected, n_head_kv, n_stream);
        layer.stability = params.refreshes() ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 4, n_head_kv, n_stream) : nullptr;
        if (params.policy == LLAMA_SUPPORT_SKETCH) {
            allocate_sketch(ctx, model, il);
            sketched[ctx].push_back(il);
        }
    }
    for (const auto & [ctx, ils] : sketched) {
        allocate_results(ctx, model, ils);
    }
    for (auto & [kind, ctx] : contexts) {
        if (model.hparams.no_alloc) {
            planned += ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, kind.first);
            continue;
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, kind.first);
        if (!buffer) {
            throw std::bad_alloc();
        }
        llama_use_huge_pages(buffer);
        // native: selected is -1; portable: lists have no pads, and rows must be numbers though they are masked
        ggml_backend_buffer_clear(buffer, kind.second == LLAMA_PATH_NATIVE ? 0xff : 0);
        const auto mine = [ctx = ctx](const auto & b) { return b.first.get() == ctx; };
        std::find_if(buffers.begin(), buffers.end(), mine)->second.reset(buffer);
    }
}

ggml_tensor * llama_support_v_storage(const llama_kv_cache & kv, int32_t il) {
    ggml_context_ptr scratch(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    if (!scratch) {
        throw std::bad_alloc();
    }
    llama_kv_cache::slot_info first;
    first.s0 = first.s1 = 0;
    return kv.get_v(scratch.get(), il, kv.get_size(), first)->view_src;
}

void llama_support::allocate_sketch(ggml_context * ctx, const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;
    const int64_t d_k = hparams.n_embd_head_k(il), d_v = hparams.n_embd_head_v(il), n_head_kv = hparams.n_head_kv(il);
    const int64_t n_stream = streams.size(), n_blocks = ((int64_t) kv->get_size() + 15)/16;

    auto & layer = layers[il];
    layer.n_embd_k = d_k;
    layer.n_embd_v = d_v;
    layer.n_head_kv = n_head_kv;
    layer.v = llama_support_v_storage(*kv, il);
    layer.format = llama_path_format(shape_of(model, *kv, il), params);
    layer.codes  = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  16*ggml_sketch_cell_bytes(&layer.format), n_blocks, n_head_kv*n_stream);
    layer.basis  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_sketch_basis_size(&layer.format, d_k, d_v), n_head_kv*n_stream);
    layer.least  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_head_kv, n_stream);
    layer.logit_error.assign(n_head_kv*n_stream, 0.0f);
}

// What every fast step with a sketch says of itself lies together, so that a device is asked once for all of its layers.
void llama_support::allocate_results(ggml_context * ctx, const llama_model & model, const std::vector<int32_t> & ils) {
    const int64_t n_stream = streams.size();
    int64_t n_selected = 0, n_mass = 0, n_counts = 0;
    for (const int32_t il : ils) {
        n_selected += params.n_selected*layers[il].n_head_kv;
        n_mass     += 2*model.hparams.n_head(il);
        n_counts   += 2*layers[il].n_head_kv;
    }
    ggml_tensor * selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_selected, n_stream);
    ggml_tensor * mass     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_mass, n_stream);
    ggml_tensor * counts   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_counts, n_stream);
    size_t at_selected = 0, at_mass = 0, at_counts = 0;
    for (const int32_t il : ils) {
        auto & layer = layers[il];
        layer.selected = ggml_view_3d(ctx, selected, params.n_selected, layer.n_head_kv, n_stream, params.n_selected*sizeof(int32_t),
                selected->nb[1], at_selected);
        layer.mass = ggml_view_3d(ctx, mass, 2, model.hparams.n_head(il), n_stream, 2*sizeof(float), mass->nb[1], at_mass);
        layer.counts = ggml_view_3d(ctx, counts, 2, layer.n_head_kv, n_stream, 2*sizeof(int32_t), counts->nb[1], at_counts);
        at_selected += params.n_selected*layer.n_head_kv*sizeof(int32_t);
        at_mass     += 2*model.hparams.n_head(il)*sizeof(float);
        at_counts   += 2*layer.n_head_kv*sizeof(int32_t);
    }
}

// Lists of cells make reads jump, and a jump to another page costs a walk through tables of pages: what the host holds of the cells
// in use goes to huge pages, as they fill up. It is memory that the cache has already, and takes up to a millisecond for 2 MB.
void llama_support::use_huge_pages(uint32_t s) {
    auto & st = streams[s];
    for (size_t il = 0; il < layers.size() && st.mirror.n_used() > st.n_huge; ++il) {
        if (!is_sparse(il) || !ggml_backend_buffer_is_host(kv->get_k_storage(il)->buffer)) {
            continue;
        }
        for (const ggml_tensor * t : { kv->get_k_storage(il), llama_support_v_storage(*kv, il) }) {
            const int64_t first = std::max<int64_t>(0, st.n_huge - (int64_t) (llama_huge_page/t->nb[1]) - 1); // the page that was not full
            llama_use_huge_pages((char *) t->data + s*t->nb[2] + first*t->nb[1], (st.mirror.n_used() - first)*t->nb[1]);
        }
    }
    st.n_huge = std::max(st.n_huge, st.mirror.n_used());
}

size_t llama_support::memory() const {
    size_t size = planned;
    for (const auto & b : buffers) {
        size += b.second ? ggml_backend_buffer_get_size(b.second.get()) : 0;
    }
    return size;
}

// ---- validity ----------------------------------------------------------------------------------------------------------

void llama_support::invalidate(uint32_t s) {
    auto & st = streams[s];
    st.edited   = st.edited || st.valid;
    st.valid    = false;
    st.mirror.forget();
    st.j0 = st.j1 = st.n_fit = 0;
}

void llama_support::notice_edits() {
    for (uint32_t s = 0; s < streams.size(); ++s) {
        const auto & mirror = streams[s].mirror;
        if (mirror.known() && (int32_t) kv->get_cells(s).get_used() != mirror.size()) {
            invalidate(s);
        }
    }
}

void llama_support_edited(llama_support * support, int64_t stream) {
    for (uint32_t s = 0; support && s < support->get_kv()->get_n_stream(); ++s) {
        if (stream < 0 || stream == s) {
            support->invalidate(s);
        }
    }
}

void llama_support_placed(llama_support * support, const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo) {
    if (support) {
        support->on_ubatch(ubatch, sinfo);
    }
}

void llama_support::on_ubatch(const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo) {
    const bool ours = kind != LLAMA_SUPPORT_NONE && sinfo.n_stream() == 1 && (uint32_t) sinfo.strm[0] == stream
        && (int32_t) ubatch.n_tokens <= n_left;
    if (!ours) {
        ubatch_kind = LLAMA_SUPPORT_NONE;
        for (const auto s : sinfo.strm) {
            invalidate(s);
        }
        return;
    }
    n_left -= ubatch.n_tokens;
    ubatch_kind    = kind;
    ubatch_refresh = refresh && n_left == 0;
    ubatch_tokens  = (int32_t) ubatch.n_tokens;
    ubatch_stored  = std::min<int32_t>(ubatch.n_tokens, params.n_queries);
    place(streams[stream], ubatch, sinfo.idxs[0]);
}

// Follow the cache: the new cells go to the end of the list, their queries into the ring.
void llama_support::place(llama_sequence & st, const llama_ubatch & ubatch, const std::vector<uint32_t> & idxs) {
    if (st.mirror.continues(ubatch.pos[0])) {
        st.mirror.append(idxs);
    } else {
        const llama_seq_id seq = ubatch.seq_id[0][0];
        std::vector<int32_t> cells;
        for (const auto & [pos, cell] : kv->get_cells(seq).seq_pos_get(seq)) {
            cells.push_back((int32_t) cell);
        }
        st.mirror.read(std::move(cells));
    }
    st.mirror.store(ubatch.pos, ubatch.n_tokens, ubatch_stored);
}

// ---- steps -------------------------------------------------------------------------------------------------------------

llama_support_facts llama_support::facts(uint32_t s) const {
    const auto & st = streams[s];
    const llama_seq_id seq = (llama_seq_id) s; // one sequence per stream
    const int32_t depth = st.mirror.known() ? st.mirror.size() : (int32_t) kv->get_cells(seq).seq_pos_get(seq).size();
    return { depth, st.span, st.valid, st.edited, window_full(st) };
}

int llama_support::run(llama_context & lctx, uint32_t s, llama_support_kind new_kind, int32_t n_tokens, bool new_refresh,
                       const std::function<int()> & decode) {
    if (new_kind == LLAMA_SUPPORT_FAST && !update_sketch(lctx, s)) {
        return LLAMA_SUPPORT_FAILED;
    }
    int ret;
    {
        struct scope {
            llama_support & support;
            bool            ok = false;
            ~scope() { support.finish(ok); }
        } running{*this};
        stream  = s;
        kind    = new_kind;
        n_left  = n_tokens;
        refresh = new_refresh;
        ret = decode();
        running.ok = ret == 0;
    }
    if (ret == 0 && new_refresh && !(refresh_portable(lctx, s, new_kind == LLAMA_SUPPORT_SLOW) && update_sketch(lctx, s))) {
        return LLAMA_SUPPORT_FAILED;
    }
    return ret;
}

bool llama_support::refresh_portable(llama_context & lctx, uint32_t s, bool slow) {
    if (!has_portable() || !streams[s].valid) {
        return true;
    }
    const float softcap = model.hparams.attn_soft_cap ? model.hparams.f_attn_logit_softcapping : 0.0f;
    if (!llama_portable_refresh(side, lctx.get_sched(), *kv, params, layers, streams[s], s, always_size(), slow, softcap)) {
        invalidate(s);
        return false;
    }
    return true;
}

void llama_support::finish(bool ok) {
    auto & st = streams[stream];
    if (!ok || n_left > 0) {
        invalidate(stream);
    } else if (refresh) {
        const auto [j0, j1] = params.candidates(st.mirror.size());
        if (params.policy != LLAMA_SUPPORT_SKETCH) { // there the window moves with what has codes
            st.j0 = j0;
            st.j1 = j1;
        }
        st.n_previous = st.n_chosen;
        st.n_chosen   = std::min(params.n_selected, j1 - j0);
        st.n_scanned  = llama_portable_scan_size(st, kv->get_size());
        st.valid  = true;
        st.edited = false;
        st.span   = 0;
        ++st.n_refresh;
        use_huge_pages(stream);
    } else if (kind == LLAMA_SUPPORT_FAST) {
        ++st.span;
    }
    kind = ubatch_kind = LLAMA_SUPPORT_NONE;
}

void llama_support::roll_back(uint32_t s, int32_t n) {
    auto & st = streams[s];
    const int32_t left = st.mirror.size() - n;
    if (!st.mirror.known() || left < 1 || !cut_support(st, left) || (has_portable() && llama_portable_overwritten(params, always_size(), n))) {
        invalidate(s); // an edit like any other
        return;
    }
    st.mirror.take_back(n, kv->get_cells(s).pos_get(st.mirror.cells()[left - 1]));
    st.span = std::max(0, st.span - n);
}

bool llama_support::window_full(const llama_sequence & st) const {
    return st.valid && params.pinned() && st.j0 + ((int64_t) st.mirror.size() + 1 - st.j1) > always_size();
}

// Frozen: all but the candidates of the refresh. Sketch: all but what has codes. Window and oracle: it slides.
std::pair<int32_t, int32_t> llama_support::window(const llama_sequence & st) const {
    const bool slides = params.policy == LLAMA_SUPPORT_ORACLE || params.policy == LLAMA_SUPPORT_WINDOW;
    return slides ? params.candidates(st.mirror.size()) : std::pair<int32_t, int32_t>(st.j0, st.j1);
}

std::vector<int32_t> llama_support::read_selected(uint32_t s, int32_t il, int32_t head_kv) const {
    if (layers[il].path == LLAMA_PATH_PORTABLE) {
        return llama_portable_selected(layers[il], streams[s], s, head_kv);
    }
    const ggml_tensor * t = layers[il].selected;
    std::vector<int32_t> list(t->ne[0]);
    ggml_backend_tensor_get(t, list.data(), s*t->nb[2] + head_kv*t->nb[1], t->nb[1]);
    list.erase(std::remove_if(list.begin(), list.end(), [](int32_t cell) { return cell < 0; }), list.end());
    return list;
}

std::array<float, 4> llama_support::read_stability(uint32_t s, int32_t il, int32_t head_kv) const {
    if (layers[il].path == LLAMA_PATH_PORTABLE) {
        return llama_portable_stability(layers[il], streams[s], s, head_kv);
    }
    const ggml_tensor * t = layers[il].stability;
    std::array<float, 4> values;
    ggml_backend_tensor_get(t, values.data(), s*t->nb[2] + head_kv*t->nb[1], sizeof(values));
    return values;
}

// ---- the graph input ---------------------------------------------------------------------------------------------------

int64_t llama_support::list_size() const {
    const int64_t n = streams[stream].mirror.size();
    return std::min<int64_t>(GGML_PAD(n, list_pad), kv->get_size());
}

llama_support_key llama_support::graph_key() const {
    llama_support_key k;
    k.kind = ubatch_kind;
    if (ubatch_kind != LLAMA_SUPPORT_NONE) {
        const auto & st = streams[stream];
        const bool fast = ubatch_kind == LLAMA_SUPPORT_FAST;
        k.refresh  = ubatch_refresh && params.refreshes();
        k.stream   = stream;
        k.listed   = ubatch_kind == LLAMA_SUPPORT_PREFILL && has_blocks;
        k.blocks   = k.listed && ubatch_tokens >= min_block;
        const bool lists_all = fast ? params.policy == LLAMA_SUPPORT_ORACLE : ubatch_kind != LLAMA_SUPPORT_PREFILL || k.refresh || k.listed;
        k.n_list   = lists_all ? list_size() : 0;
        k.n_stored = params.selects() ? ubatch_stored : 0;
        if (has_portable() && !ubatch_refresh && st.valid) { // a refresh writes all of always anew
            k.n_append = llama_portable_append(params, always_size(), ubatch_tokens);
        }
        if (fast && scanned(stream)) {
            k.n_skip = GGML_PAD(always_size() + (int64_t) st.mirror.holes().size(), skip_pad);
            k.n_scan = std::min<int64_t>(GGML_PAD((int64_t) st.mirror.n_used(), list_pad), GGML_PAD(kv->get_size(), 16));
        }
    }
    return k;
}

llama_support_input::llama_support_input(const std::shared_ptr<llama_support> & support) :
        owner(support), support(support.get()), built(support->graph_key()) {}

static void set_list(ggml_tensor * dst, std::vector<int32_t> list) {
    GGML_ASSERT((int64_t) list.size() <= dst->ne[0]);
    list.resize(dst->ne[0], -1);
    ggml_backend_tensor_set(dst, list.data(), 0, ggml_nbytes(dst));
}

static bool is_used(const ggml_tensor * t) {
    return t && t->buffer;
}

void llama_support_input::set_input(const llama_ubatch * ubatch) {
    const auto & st     = support->streams[built.stream];
    const auto & params = support->params;
    const int32_t n     = st.mirror.size();

    if (portable) {
        portable->set(st, params, support->always_size(), support->window(st));
    }
    if (is_used(always) || is_used(skip)) {
        const auto [first, second] = support->window(st);
        auto list = st.mirror.without(first, second);
        if (is_used(always)) {
            set_list(always, list);
        }
        if (is_used(skip)) {
            list.insert(list.end(), st.mirror.holes().begin(), st.mirror.holes().end());
            set_list(skip, list);
        }
    }
    if (is_used(scan)) {
        const int32_t n_used = st.mirror.n_used();
        ggml_backend_tensor_set(scan, &n_used, 0, sizeof(n_used));
    }
    if (is_used(cells)) {
        set_list(cells, st.mirror.cells());
    }
    if (is_used(visible)) {
        std::vector<int32_t> values;
        for (int32_t i = (int32_t) ubatch->n_tokens - 1; i >= 0; --i) {
            values.push_back(n - i);
        }
        ggml_backend_tensor_set(visible, values.data(), 0, ggml_nbytes(visible));
    }
    if (is_used(plan)) {
        const auto [j0, j1] = params.candidates(n);
        std::vector<int32_t> values = { j0, j1 };
        if (built.kind == LLAMA_SUPPORT_FAST) { // oracle: this query, which sees all
            values.push_back(n);
        } else {
            const auto seen = st.mirror.seen(built.kind == LLAMA_SUPPORT_SLOW ? 1 : params.n_evidence);
            values.insert(values.end(), seen.begin(), seen.end());
        }
        ggml_backend_tensor_set(plan, values.data(), 0, ggml_nbytes(plan));
    }
    if (is_used(rows)) {
        std::vector<int64_t> values;
        for (uint32_t i = ubatch->n_tokens - built.n_stored; i < ubatch->n_tokens; ++i) {
            values.push_back(ubatch->pos[i] % params.n_queries);
        }
        ggml_backend_tensor_set(rows, values.data(), 0, ggml_nbytes(rows));
    }
}

// The support of the cache that a graph is built for, null if it has none.
static std::shared_ptr<llama_support> support_of(const llama_memory_context_i * mctx) {
    const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx);
    const auto * kv   = iswa ? iswa->get_base() : dynamic_cast<const llama_kv_cache_context *>(mctx);
    return kv ? kv->get_support() : nullptr;
}

bool llama_support_input::can_reuse(const llm_graph_params & next) {
    const auto mine = owner.lock();
    return mine && support_of(next.mctx) == mine && built == mine->graph_key();
}

static ggml_tensor * new_input(const llm_graph_context & g, ggml_type type, int64_t n, const char * name) {
    ggml_tensor * t = ggml_new_tensor_1d(g.ctx0, type, n);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

static const llama_support_input * build_input(const llm_graph_context & g, const std::shared_ptr<llama_support> & support) {
    auto inp = std::make_unique<llama_support_input>(support);
    if (support->has_portable()) {
        inp->portable = llama_portable_new_input(g.ctx0, inp->built, support->get_params(), support->get_layers(), support->always_size());
    }
    const auto & key    = inp->built;
    const auto & params = support->get_params();

    if (key.kind == LLAMA_SUPPORT_FAST) {
        inp->always = new_input(g, GGML_TYPE_I32, support->always_size(), "support_always");
    }
    if (key.n_list > 0) {
        inp->cells = new_input(g, GGML_TYPE_I32, key.n_list, "support_cells");
    }
    if (key.kind == LLAMA_SUPPORT_VERIFY || key.listed) {
        inp->visible = new_input(g, GGML_TYPE_I32, g.n_tokens, "support_visible");
    }
    if (key.refresh) {
        inp->plan = new_input(g, GGML_TYPE_I32, 2 + params.n_queries, "support_plan");
    } else if (key.kind == LLAMA_SUPPORT_FAST && key.n_list > 0) {
        inp->plan = new_input(g, GGML_TYPE_I32, 3, "support_plan");
    }
    if (key.n_scan > 0) {
        inp->skip = new_input(g, GGML_TYPE_I32, key.n_skip, "sketch_skip");
        inp->scan = new_input(g, GGML_TYPE_I32, 1, "sketch_plan");
    }
    if (key.n_stored > 0) {
        inp->rows = new_input(g, GGML_TYPE_I64, key.n_stored, "support_rows");
    }
    return (llama_support_input *) g.res->add_input(std::move(inp));
}

// The first layer of a graph makes the input, those after it find it. Null: there is no support.
static const llama_support_input * input_of(const llm_graph_context & g) {
    for (const auto & input : g.res->inputs) {
        if (const auto * ours = dynamic_cast<const llama_support_input *>(input.get())) {
            return ours;
        }
    }
    const auto support = support_of(g.mctx);
    return support ? build_input(g, support) : nullptr;
}

// ---- the graph of a layer ----------------------------------------------------------------------------------------------

// a stream of a tensor [ne0, ne1, n_stream]
static ggml_tensor * stream_of(ggml_context * ctx, ggml_tensor * t, uint32_t stream) {
    return ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], stream*t->nb[2]);
}

static void store_queries(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer, ggml_tensor * q) {
    const int64_t n = inp->built.n_stored;
    const size_t  first = (q->ne[2] - n)*q->nb[2];
    ggml_tensor * last = q->nb[1] == q->ne[0]*q->nb[0] // the heads of a token lie together
        ? ggml_view_2d(g.ctx0, q, q->ne[0]*q->ne[1], n, q->nb[2], first)
        : ggml_cont_2d(g.ctx0, ggml_view_3d(g.ctx0, q, q->ne[0], q->ne[1], n, q->nb[1], q->nb[2], first), q->ne[0]*q->ne[1], n);
    ggml_build_forward_expand(g.gf, ggml_set_rows(g.ctx0, stream_of(g.ctx0, layer.queries, inp->built.stream), last, inp->rows));
}

// the queries that give evidence, as [n_embd_head_k, n_head, n_queries]
static ggml_tensor * kept_queries(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                                  int64_t n_embd, int64_t n_head) {
    return ggml_reshape_3d(g.ctx0, stream_of(g.ctx0, layer.queries, inp->built.stream), n_embd, n_head, inp->support->get_params().n_queries);
}

// evidence -> selected, and how stable it is; the previous set is read before the new one replaces it
static void refresh_support(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                            ggml_tensor * evidence, ggml_tensor * plan, ggml_tensor * k, int il) {
    ggml_context * ctx = g.ctx0;
    const auto & params = inp->support->get_params();
    const bool   paper  = params.selector.kind == GGML_SUPPORT_SELECTOR_PAPER;
    const auto   stream = inp->built.stream;
    g.cb(evidence, "support_evidence", il);

    ggml_tensor * selected = ggml_support_select(ctx, evidence, inp->cells, plan, paper ? k : nullptr,
            params.n_selected, &params.selector);
    g.cb(selected, "support_selected", il);

    ggml_tensor * previous  = stream_of(ctx, layer.selected, stream);
    ggml_tensor * stability = ggml_support_stability(ctx, evidence, inp->cells, plan, selected, previous);
    g.cb(stability, "support_stability", il);

    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, stability, stream_of(ctx, layer.stability, stream)));
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, selected, previous));
}

// evidence by an operation of its own, which reads all keys
static ggml_tensor * build_evidence(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                                    ggml_tensor * k, int64_t n_head, float kq_scale, float softcap) {
    const auto & selector = inp->support->get_params().selector;
    const bool   paper    = selector.kind == GGML_SUPPORT_SELECTOR_PAPER;
    return ggml_support_evidence(g.ctx0, kept_queries(g, inp, layer, k->ne[0], n_head), k, inp->cells, inp->plan, kq_scale, softcap,
            paper ? selector.alpha : 1.0f,
            paper ? GGML_SUPPORT_SOFTMAX_CANDIDATES : GGML_SUPPORT_SOFTMAX_VISIBLE);
}

// A slow step that makes its evidence while it attends: that of the query at work costs nothing. Null where the evidence
// must be another or the backend has no such pass.
static ggml_tensor * build_slow_attn(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                                     ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale,
                                     float softcap, int il) {
    if (inp->support->get_params().selector.kind == GGML_SUPPORT_SELECTOR_PAPER) {
        return nullptr;
    }
    const int64_t n_head = q->ne[2], n_embd_v = v->ne[0];
    ggml_tensor * both = ggml_sparse_attn_evidence(g.ctx0, q, k, v, inp->cells, sinks, inp->plan, kq_scale, softcap);
    ggml_backend_dev_t dev = llama_path_device(layer.queries->buffer);
    if (!dev || !ggml_backend_dev_supports_op(dev, both)) {
        return nullptr;
    }
    g.cb(both, "sparse_attn_evidence", il);
    const size_t n_bytes = n_embd_v*n_head*sizeof(float);
    ggml_tensor * attn = ggml_view_2d(g.ctx0, both, n_embd_v, n_head, n_embd_v*sizeof(float), 0);
    g.cb(attn, "sparse_attn", il);
    ggml_tensor * cur = ggml_reshape_2d(g.ctx0, attn, n_embd_v*n_head, 1);
    ggml_build_forward_expand(g.gf, cur); // before the refresh, so that who watches it finds the query still there
    ggml_tensor * evidence = ggml_view_2d(g.ctx0, both, inp->cells->ne[0], k->ne[2], inp->cells->ne[0]*sizeof(float), n_bytes);
    refresh_support(g, inp, layer, evidence, inp->plan, k, il);
    return cur;
}

// policy oracle: the selected cells of this query, from its exact attention
static ggml_tensor * select_exactly(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                                    ggml_tensor * q, ggml_tensor * k, float kq_scale, float softcap) {
    ggml_context * ctx = g.ctx0;
    ggml_support_selector plain = {};
    plain.kind = GGML_SUPPORT_SELECTOR_TOPK;
    ggml_tensor * evidence = ggml_support_evidence(ctx, q, k, inp->cells, inp->plan, kq_scale, softcap, 1.0f, GGML_SUPPORT_SOFTMAX_VISIBLE);
    ggml_tensor * selected = ggml_support_select(ctx, evidence, inp->cells, inp->plan, nullptr, inp->support->get_params().n_selected, &plain);
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, selected, stream_of(ctx, layer.selected, inp->built.stream)));
    return selected;
}

// policy sketch: chooses the selected cells of this query, and returns what all others contribute
static ggml_tensor * scan_sketch(const llm_graph_context & g, const llama_support_input * inp, const llama_support_layer & layer,
                                 ggml_tensor * q, int64_t n_head_kv, int64_t n_embd_v, float kq_scale, float softcap, int il) {
    ggml_context * ctx = g.ctx0;
    const auto & key = inp->built;
    ggml_tensor * codes = llama_support_heads(ctx, layer.codes, 2, n_head_kv, key.stream);
    ggml_tensor * basis = llama_support_heads(ctx, layer.basis, 1, n_head_kv, key.stream);
    ggml_tensor * least = nullptr;
    float second_look = 0.0f; // without a tolerance any cell may be one of the n_selected best; where K was seen as a whole nothing is saved
    if (inp->support->get_params().tolerance > 0.0f) {
        second_look = layer.format.n_first < sketch_k_planes(layer.format) ? inp->support->get_params().second_look : 0.0f;
        least = ggml_view_1d(ctx, layer.least, n_head_kv, key.stream*layer.least->nb[1]);
    }
    ggml_tensor * tail = ggml_sketch_scan(ctx, q, codes, basis, inp->skip, inp->scan, least, stream_of(ctx, layer.selected, key.stream),
            stream_of(ctx, layer.counts, key.stream), key.n_scan, n_embd_v, kq_scale, softcap, second_look, &layer.format);
    g.cb(tail, "sketch_scan", il);
    ggml_build_forward_expand(g.gf, tail); // before who reads the selected cells
    return layer.format.n_v4 + layer.format.n_v2 > 0 ? tail : nullptr;
}

ggml_tensor * llama_support_build_attn(const llm_graph_context & g,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    const llama_support_input * inp = input_of(g);
    if (!inp || inp->built.kind == LLAMA_SUPPORT_NONE || kq_b || !inp->support->is_sparse(il)
            || k->view_src != inp->support->get_kv()->get_k_storage(il)) {
        return nullptr;
    }
    inp->support->remember_scale(il, kq_scale);
    ggml_context * ctx = g.ctx0;
    const auto & key   = inp->built;
    const auto & layer = inp->support->layer(il);
    const float softcap = g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f;

    k = llama_support_all_cells(ctx, k);
    v = llama_support_all_cells(ctx, v);

    if (key.n_stored > 0) {
        store_queries(g, inp, layer, q);
    }
    if (layer.path == LLAMA_PATH_PORTABLE) {
        return llama_portable_build_attn(g, *inp->portable, inp->built, layer, q, k, v, sinks, kq_scale, softcap, il);
    }
    ggml_tensor * q_rows = ggml_permute(ctx, q, 0, 2, 1, 3);
    if (key.refresh && key.kind == LLAMA_SUPPORT_SLOW) {
        if (ggml_tensor * cur = build_slow_attn(g, inp, layer, q_rows, k, v, sinks, kq_scale, softcap, il)) {
            return cur;
        }
    }
    if (key.refresh) {
        refresh_support(g, inp, layer, build_evidence(g, inp, layer, k, q->ne[1], kq_scale, softcap), inp->plan, k, il);
    }
    const bool on_host = ggml_backend_buffer_is_host(inp->support->get_kv()->get_k_storage(il)->buffer);
    if ((key.kind == LLAMA_SUPPORT_PREFILL && !(key.listed && on_host)) || (key.kind == LLAMA_SUPPORT_SHORT && !on_host)) {
        return nullptr;
    }

    const bool fast = key.kind == LLAMA_SUPPORT_FAST;
    ggml_tensor * selected = nullptr, * tail = nullptr;
    if (fast && layer.selected) {
        switch (inp->support->get_params().policy) {
            case LLAMA_SUPPORT_FROZEN: selected = stream_of(ctx, layer.selected, key.stream); break;
            case LLAMA_SUPPORT_ORACLE: selected = select_exactly(g, inp, layer, q, k, kq_scale, softcap); break;
            case LLAMA_SUPPORT_SKETCH:
                if (inp->skip) {
                    tail     = scan_sketch(g, inp, layer, q, k->ne[2], v->ne[0], kq_scale, softcap, il);
                    selected = stream_of(ctx, layer.selected, key.stream);
                }
                break;
            default: break;
        }
    }

    ggml_tensor * cur = ggml_sparse_attn(ctx, q_rows, k, v, fast ? inp->always : inp->cells, selected, tail, sinks, kq_scale, softcap);
    if (tail) {
        ggml_sparse_attn_set_mass(cur, stream_of(ctx, layer.mass, key.stream));
    }
    if (inp->visible) {
        ggml_sparse_attn_set_visible(cur, inp->visible);
    }
    if (key.blocks) {
        ggml_sparse_attn_set_blocks(cur);
    }
    g.cb(cur, "sparse_attn", il);
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

// Weights in buffers that are not the host's are a GPU's, or upstream has repacked them at loading. On ARM upstream's products are
// faster than ours, and without AVX2 we have none.
static bool is_ours(const ggml_tensor * w) {
#if defined(__x86_64__) || defined(_M_X64)
    static const bool has_avx2 = llama_path_cpu_has("AVX2");
    return has_avx2 && w->buffer && ggml_backend_buffer_is_host(w->buffer);
#else
    GGML_UNUSED(w);
    return false;
#endif
}

ggml_tensor * llama_support_build_mul_mat(const llm_graph_context & g, ggml_tensor * w, ggml_tensor * x) {
    const bool has_policy = g.prec_policy && g.prec_policy->prec_src1.count(w) > 0;
    const bool cpu_alone  = ggml_backend_sched_get_n_backends(g.sched) == 1; // a GPU takes such products even where weights are not on it
    if (x->ne[1] > 1 && cpu_alone && !has_policy && is_ours(w)) {
        const llama_support_input * inp = input_of(g);
        const bool is_long = inp && inp->built.kind == LLAMA_SUPPORT_PREFILL && x->ne[1] >= min_unpack;
        if (is_long && ggml_can_block_mul_mat(w, x)) {
            return ggml_block_mul_mat(g.ctx0, w, x);
        }
        if (inp && !is_long && ggml_can_few_mul_mat(w, x)) { // what a token has does not depend on how many it shares a pass with
            return ggml_few_mul_mat(g.ctx0, w, x);
        }
    }
    return ggml_mul_mat(g.ctx0, w, x);
}
