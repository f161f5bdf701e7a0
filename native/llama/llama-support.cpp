#include "llama-support.h"

#include "frozen.h"
#include "llama-path.h"
#include "portable.h"
#include "sketch-policy.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <new>
#include <set>

static constexpr int32_t min_block = 8; // tokens from which packing K and V once for all of them pays
static constexpr int32_t sparse_from = 2048; // cells from which prefill may be sparse
static constexpr int32_t exact_end = 512; // tokens at the end of a text that are always read exactly: what is asked usually stands there
static constexpr int64_t min_unpack = 32; // tokens from which unpacking weights once for all of them pays

// The inputs that a ubatch's parts have; each graph over a cache with a support has one of these, and if the ubatch is not ours it is empty.
struct llama_support_input : public llm_graph_input_i {
    llama_support_input(const std::shared_ptr<llama_support> & support, const llm_graph_context & g) :
            owner(support), support(support.get()), key(support->graph_key()), ubatch(g.ubatch), graph(g.gf) {
        support->built = this;
    }
    ~llama_support_input() override;

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;
    void turn_to(const llama_support_key & next);

    std::weak_ptr<llama_support>  owner;   // a graph lives longer than it is used, and must not keep the memory of a support
    llama_support               * support; // while the owner lives
    llama_support_key             key;
    std::vector<llama_part_input> parts;

private:
    const llama_ubatch ubatch; // for which it was built; shares what it points to with those that upstream compares
    ggml_cgraph      * graph;
    std::vector<ggml_tensor *> views; // in the graph, of one stream
    void find_views();
};

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

// More than the cache holds would only cost memory.
static llama_support_params fitting(llama_support_params p, const llama_kv_cache & kv) {
    for (int32_t * n : { &p.n_sink, &p.n_recent, &p.n_selected, &p.n_grow }) {
        *n = std::min<int32_t>(*n, kv.get_size());
    }
    return p;
}

llama_support::llama_support(llama_kv_cache * kv, const llama_kv_cache * kv_swa, const llama_model & model, const llama_support_params & params) :
        core{ *kv, model, fitting(params, *kv), std::vector<llama_support_layer>(model.hparams.n_layer()),
              std::vector<llama_sequence>(kv->get_n_stream(), llama_sequence(params.n_queries)), {}, {} },
        kv_swa(kv_swa) {
    choose_paths();
    make_policies();
    allocate();
}

void llama_support::choose_paths() {
    const auto & hparams = core.model.hparams;
    const auto kv_layers = core.kv.get_layer_ids();
    for (int32_t il = 0; il < (int32_t) core.layers.size(); ++il) {
        auto & layer = core.layers[il];
        layer.why = why_dense(core.model, core.kv, kv_layers, il);
        if (!is_sparse(il)) {
            continue;
        }
        layer.k = core.kv.get_k_storage(il);
        layer.v = llama_support_v_storage(core.kv, il);
        layer.n_head    = hparams.n_head(il);
        layer.n_head_kv = hparams.n_head_kv(il);
        layer.n_embd_k  = hparams.n_embd_head_k(il);
        layer.n_embd_v  = hparams.n_embd_head_v(il);
        layer.path = path_of(il, core.params, &layer.lacks);
    }
}

static std::unique_ptr<llama_policy> native_policy(llama_support_core & core) {
    switch (core.params.selects() ? core.params.policy : LLAMA_SUPPORT_WINDOW) {
        case LLAMA_SUPPORT_FROZEN: return std::make_unique<llama_frozen>(core);
        case LLAMA_SUPPORT_SKETCH: return std::make_unique<llama_sketch>(core);
        case LLAMA_SUPPORT_ORACLE: return std::make_unique<llama_oracle>(core);
        default:                   return std::make_unique<llama_window>(core);
    }
}

// One for each path that a layer takes.
void llama_support::make_policies() {
    for (const auto path : { LLAMA_PATH_NATIVE, LLAMA_PATH_PORTABLE }) {
        llama_policy * policy = nullptr;
        for (auto & layer : core.layers) {
            if (layer.path == path && !policy) {
                auto native = native_policy(core);
                policies.push_back(path == LLAMA_PATH_NATIVE ? std::move(native) : std::make_unique<llama_portable>(core, std::move(native)));
                policy = policies.back().get();
            }
            layer.policy = layer.path == path ? policy : layer.policy;
        }
    }
}

llama_support_path llama_support::path_of(int32_t il, const llama_support_params & p, std::string * lacks) const {
    return llama_path_choose(llama_path_device(core.layers[il].k->buffer), llama_path_shape_of(core.model, core.kv, il), p, lacks);
}

int64_t llama_support::most_cells(int32_t il) const {
    auto shape = llama_path_shape_of(core.model, core.kv, il);
    const auto dev = llama_path_device(core.layers[il].k->buffer);
    while (shape.n_cells > 0 && llama_path_choose(dev, shape, core.params) == LLAMA_PATH_NONE) {
        shape.n_cells /= 2;
    }
    return shape.n_cells;
}

bool llama_support::has_path_with_f16(int32_t il) const {
    auto shape = llama_path_shape_of(core.model, core.kv, il);
    shape.type_k = shape.type_v = GGML_TYPE_F16;
    return llama_path_choose(llama_path_device(core.layers[il].k->buffer), shape, core.params) != LLAMA_PATH_NONE;
}

bool llama_support::has_portable() const {
    return std::any_of(core.layers.begin(), core.layers.end(), [](const auto & layer) { return layer.path == LLAMA_PATH_PORTABLE; });
}

// The layers of a device and policy together.
void llama_support::allocate() {
    std::map<std::pair<ggml_backend_buffer_type_t, llama_policy *>, std::vector<int32_t>> groups;
    for (int32_t il = 0; il < (int32_t) core.layers.size(); ++il) {
        if (core.layers[il].policy) {
            groups[{ ggml_backend_buffer_get_type(core.layers[il].k->buffer), core.layers[il].policy }].push_back(il);
        }
    }
    for (const auto & [on, ils] : groups) {
        allocate_on(on.first, *on.second, ils);
    }
}

void llama_support::allocate_on(ggml_backend_buffer_type_t device, llama_policy & policy, const std::vector<int32_t> & ils) {
    ggml_context_ptr ctx(ggml_init({ (9*ils.size() + 3)*ggml_tensor_overhead(), nullptr, true }));
    if (!ctx) {
        throw std::bad_alloc();
    }
    for (const int32_t il : ils) {
        auto & layer = core.layers[il];
        if (core.params.selects()) {
            layer.queries = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.n_embd_k*layer.n_head, core.params.n_queries, core.streams.size());
        }
    }
    policy.allocate(ctx.get(), ils);
    if (!ggml_get_first_tensor(ctx.get())) {
        return;
    }
    if (core.model.hparams.no_alloc) {
        planned += ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), device);
        buffers.emplace_back(std::move(ctx), nullptr);
        return;
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), device));
    if (!buffer) {
        throw std::bad_alloc();
    }
    llama_use_huge_pages(buffer.get());
    ggml_backend_buffer_clear(buffer.get(), policy.blank());
    buffers.emplace_back(std::move(ctx), std::move(buffer));
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

// Lists of cells make reads jump, and a jump to another page costs a walk through tables of pages: what the host holds of the cells
// in use goes to huge pages, as they fill up. It is memory that the cache has already, and takes up to a millisecond for 2 MB.
void llama_support::use_huge_pages(uint32_t s) {
    auto & st = core.streams[s];
    for (const auto & layer : core.layers) {
        if (st.mirror.n_used() <= st.n_huge || !layer.k || !layer.on_host()) {
            continue;
        }
        for (const ggml_tensor * t : { layer.k, layer.v }) {
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
    auto & st = core.streams[s];
    st.edited   = st.edited || st.valid;
    st.valid    = false;
    st.mirror.forget();
    st.j0 = st.j1 = st.n_fit = 0;
}

void llama_support::notice_edits() {
    for (uint32_t s = 0; s < core.streams.size(); ++s) {
        const auto & mirror = core.streams[s].mirror;
        if (mirror.known() && (int32_t) core.kv.get_cells(s).get_used() != mirror.size()) {
            invalidate(s);
        }
    }
}

void llama_support_edited(llama_support * support, int64_t stream) {
    for (uint32_t s = 0; support && s < support->get_kv().get_n_stream(); ++s) {
        if (stream < 0 || stream == s) {
            support->invalidate(s);
        }
    }
}

// Masks that nobody looks at are as long as the cache: then a graph does not depend on how many cells are in use.
uint32_t llama_support_placed(llama_support * support, const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo, uint32_t n_kv) {
    if (support) {
        support->on_ubatch(ubatch, sinfo);
    }
    return support && !support->needs_mask() ? support->get_kv().get_size() : n_kv;
}

bool llama_support::needs_mask() const {
    const auto ils = core.kv.get_layer_ids();
    return current.empty() || std::any_of(current.begin(), current.end(), [](const auto & part) { return part.kind != LLAMA_SUPPORT_FAST; })
        || std::any_of(ils.begin(), ils.end(), [&](const auto il) { return !is_sparse(il); });
}

// A ubatch has equally many tokens of each of its streams, one stream after the other.
void llama_support::on_ubatch(const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo) {
    const int32_t n = (int32_t) (ubatch.n_tokens/sinfo.n_stream());
    const auto announced_for = [&](uint32_t stream) {
        return std::find_if(work.begin(), work.end(), [&](const auto & w) { return w.stream == stream && w.n_left >= n; });
    };
    current.clear();
    const bool ours = std::all_of(sinfo.strm.begin(), sinfo.strm.end(), [&](const auto s) { return announced_for(s) != work.end(); });
    for (size_t i = 0; i < sinfo.n_stream(); ++i) {
        const uint32_t s = sinfo.strm[i];
        if (!ours) {
            invalidate(s);
            continue;
        }
        auto & w = *announced_for(s);
        w.n_left -= n;
        place(core.streams[s], ubatch, (int32_t) i*n, n, sinfo.idxs[i]);
        add_parts(w, i*n, n);
    }
    if (built) {
        built->turn_to(current);
    }
}

// Of a fast step each token attends to cells of its own choice.
void llama_support::add_parts(const announced & w, int64_t first, int64_t n) {
    const int64_t n_each = w.kind == LLAMA_SUPPORT_FAST ? 1 : n;
    for (int64_t i = 0; i < n; i += n_each) {
        current.push_back(part_of(w, first + i, n_each, i, n - i - n_each));
    }
}

// Follow the cache: the new cells go to the end of the list, their queries into the ring.
void llama_support::place(llama_sequence & st, const llama_ubatch & ubatch, int32_t first, int32_t n, const std::vector<uint32_t> & idxs) {
    if (st.mirror.continues(ubatch.pos[first])) {
        st.mirror.append(idxs);
    } else {
        const llama_seq_id seq = ubatch.seq_id[first][0];
        std::vector<int32_t> cells;
        for (const auto & [pos, cell] : core.kv.get_cells(seq).seq_pos_get(seq)) {
            cells.push_back((int32_t) cell);
        }
        st.mirror.read(std::move(cells));
    }
    st.mirror.store(ubatch.pos + first, n, std::min(n, core.params.n_queries));
}

// ---- steps -------------------------------------------------------------------------------------------------------------

llama_support_facts llama_support::facts(uint32_t s) const {
    const auto & st = core.streams[s];
    const llama_seq_id seq = (llama_seq_id) s; // one sequence per stream
    const int32_t depth = st.mirror.known() ? st.mirror.size() : (int32_t) core.kv.get_cells(seq).seq_pos_get(seq).size();
    return { depth, st.span, st.valid, st.edited, policies.front()->window_room(st) };
}

int llama_support::run(llama_context & lctx, const std::vector<llama_support_work> & todo, const std::function<int()> & decode) {
    for (const auto & w : todo) {
        if (w.kind == LLAMA_SUPPORT_FAST && !prepare(lctx, w.stream, w.n_tokens)) {
            return failed();
        }
    }
    int ret;
    {
        struct scope {
            llama_support & support;
            bool            ok = false;
            ~scope() { support.finish(ok); }
        } running{*this};
        for (const auto & w : todo) {
            work.push_back({ w, w.n_tokens });
        }
        ret = decode();
        running.ok = ret == 0;
    }
    for (const auto & w : todo) {
        if (ret == 0 && w.refresh && !refresh(lctx, w)) {
            return failed();
        }
    }
    return ret;
}

int llama_support::failed() const {
    return core.side.was_stopped() ? LLAMA_SUPPORT_STOPPED : LLAMA_SUPPORT_FAILED;
}

// What a fast step needs that is not there; where that fails there is no support any more.
bool llama_support::prepare(llama_context & lctx, uint32_t s, int32_t n) {
    auto & st = core.streams[s];
    const int32_t coded = st.j1;
    for (const auto & policy : policies) {
        if (st.valid && !policy->prepare(lctx, s, n)) {
            invalidate(s);
            return false;
        }
    }
    if (st.valid && st.j1 != coded) {
        use_huge_pages(s);
    }
    return true;
}

bool llama_support::refresh(llama_context & lctx, const llama_support_work & w) {
    auto & st = core.streams[w.stream];
    for (const auto & policy : policies) {
        if (st.valid && !policy->refresh(lctx, w.stream, w.kind == LLAMA_SUPPORT_SLOW)) {
            invalidate(w.stream);
            return false;
        }
    }
    use_huge_pages(w.stream);
    return true;
}

void llama_support::finish(bool ok) {
    for (const auto & w : work) {
        auto & st = core.streams[w.stream];
        if (!ok || w.n_left > 0) {
            invalidate(w.stream);
        } else if (w.refresh) {
            st.valid  = true;
            st.edited = false;
            st.span   = 0;
            ++st.n_refresh;
        } else if (w.kind == LLAMA_SUPPORT_FAST) {
            st.span += w.n_tokens;
        }
    }
    work.clear();
    current.clear();
}

bool llama_support::cut(llama_sequence & st, int32_t left) const {
    return std::all_of(policies.begin(), policies.end(), [&](const auto & policy) { return policy->cut(st, left); });
}

void llama_support::roll_back(uint32_t s, int32_t n) {
    auto & st = core.streams[s];
    const int32_t left = st.mirror.size() - n;
    if (!st.mirror.known() || left < 1 || !cut(st, left)) {
        invalidate(s); // an edit like any other
        return;
    }
    st.mirror.take_back(n, core.kv.get_cells(s).pos_get(st.mirror.cells()[left - 1]));
    st.span = std::max(0, st.span - n);
}

// ---- the graph ---------------------------------------------------------------------------------------------------------

llama_support_part llama_support::part_of(const announced & w, int64_t first, int64_t n, int64_t index, int64_t n_behind) const {
    llama_support_part part;
    part.kind     = w.kind;
    part.stream   = w.stream;
    part.first    = first;
    part.n_tokens = n;
    part.index    = index;
    part.n_behind = n_behind;
    part.refresh  = w.refresh && w.n_left == 0 && core.params.refreshes();
    part.n_stored = core.params.selects() ? std::min<int64_t>(n, core.params.n_queries) : 0;
    part.listed = w.kind == LLAMA_SUPPORT_PREFILL && std::any_of(core.layers.begin(), core.layers.end(),
            [](const auto & layer) { return layer.path == LLAMA_PATH_NATIVE && layer.on_host(); });
    part.blocks = part.listed && n >= min_block;
    const bool sparse = part.blocks && w.n_left + w.n_after >= exact_end && core.streams[w.stream].mirror.size() - n >= sparse_from;
    part.least = sparse ? core.params.prefill_least : 0.0f;
    if (w.kind == LLAMA_SUPPORT_PREFILL ? part.refresh || part.listed : w.kind != LLAMA_SUPPORT_FAST) {
        part.n_list = llama_list_size(core, w.stream);
    }
    for (const auto & policy : policies) {
        policy->key(part);
    }
    return part;
}

llama_support_input::~llama_support_input() {
    if (const auto alive = owner.lock(); alive && alive->built == this) {
        alive->built = nullptr;
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
    return mine && support_of(next.mctx) == mine && key == mine->graph_key();
}

// Tensors that hold something of each stream, one stream after the other.
std::set<const ggml_tensor *> llama_support::of_all_streams() const {
    std::set<const ggml_tensor *> all;
    for (const llama_kv_cache * cache : { (const llama_kv_cache *) &core.kv, kv_swa }) {
        for (const uint32_t il : cache ? cache->get_layer_ids() : std::vector<uint32_t>()) {
            all.insert({ cache->get_k_storage(il), llama_support_v_storage(*cache, il) });
        }
    }
    for (const auto & [ctx, _] : buffers) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            all.insert(t);
        }
    }
    return all;
}

void llama_support_input::find_views() {
    const auto roots = support->of_all_streams();
    const size_t n_stream = support->get_kv().get_n_stream();
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (t->view_src && roots.count(t->view_src) && ggml_nbytes(t) <= ggml_nbytes(t->view_src)/n_stream) {
            views.push_back(t);
        }
    }
}

// Steps of one sequence and then of another differ in the streams that their graphs look at, and in nothing else where they are
// equally long. So the graph is made to look at the other's, and upstream, which does not share graphs between sequences, finds it to be
// of that one.
void llama_support_input::turn_to(const llama_support_key & next) {
    if (key.empty() || next.empty() || next[0].stream == key[0].stream) {
        return;
    }
    const int64_t from = key[0].stream, to = next[0].stream;
    auto turned = key;
    for (auto & part : turned) {
        if (part.stream != from) {
            return;
        }
        part.stream = to;
    }
    if (turned != next) {
        return;
    }
    if (views.empty()) {
        find_views();
    }
    for (ggml_tensor * t : views) {
        t->view_offs += (to - from)*(int64_t) (ggml_nbytes(t->view_src)/support->get_kv().get_n_stream());
        t->buffer = nullptr;
        ggml_backend_view_init(t);
    }
    for (auto & in : parts) {
        in.part.stream = to;
    }
    key = std::move(turned);
    ubatch.seq_id_unq[0] = to; // a sequence has the number of its stream
}

template <class T>
static void set_values(ggml_tensor * t, const std::vector<T> & values) {
    if (llama_is_used(t)) {
        GGML_ASSERT(values.size()*sizeof(T) == ggml_nbytes(t));
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
}

// What the queries of the ring see, those that give evidence, behind the candidates.
static std::vector<int32_t> plan_of(const llama_support_core & core, const llama_support_part & part) {
    const auto & mirror = core.streams[part.stream].mirror;
    const auto [j0, j1] = core.params.candidates(mirror.size());
    std::vector<int32_t> values = { j0, j1 };
    const auto seen = mirror.seen(part.kind == LLAMA_SUPPORT_SLOW ? 1 : core.params.n_evidence);
    values.insert(values.end(), seen.begin(), seen.end());
    return values;
}

static void set_part(const llama_support_core & core, const llama_policy & policy, const llama_part_input & in, const llama_pos * pos) {
    const auto & part = in.part;
    const auto & st   = core.streams[part.stream];
    if (llama_is_used(in.always)) {
        const auto [first, second] = policy.window(st);
        auto list = st.mirror.without(first, second);
        list.resize(list.size() - part.n_behind); // the latest
        llama_set_list(in.always, std::move(list));
    }
    if (llama_is_used(in.cells)) {
        llama_set_list(in.cells, st.mirror.cells());
    }
    std::vector<int32_t> visible;
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < part.n_tokens; ++i) {
        visible.push_back((int32_t) (st.mirror.size() - (part.n_tokens - 1 - i)));
    }
    for (int64_t i = part.n_tokens - part.n_stored; i < part.n_tokens; ++i) {
        rows.push_back(pos[i] % core.params.n_queries);
    }
    set_values(in.visible, visible);
    set_values(in.rows, rows);
    if (part.refresh) {
        set_values(in.plan, plan_of(core, part));
    }
}

void llama_support_input::set_input(const llama_ubatch * ubatch) {
    for (const auto & in : parts) {
        set_part(support->parts(), *support->get_policies().front(), in, ubatch->pos + in.part.first);
        for (const auto & policy : support->get_policies()) {
            policy->set_inputs(in);
        }
    }
}

static llama_part_input new_part(const llm_graph_context & g, const llama_support & support, const llama_support_part & part) {
    const auto list = [&](int64_t n, const char * name, ggml_type type = GGML_TYPE_I32) {
        return n > 0 ? llama_new_input(g.ctx0, type, { n, 1, 1, 1 }, name) : nullptr;
    };
    const bool counts = part.kind == LLAMA_SUPPORT_VERIFY || part.listed;
    llama_part_input in;
    in.part    = part;
    in.always  = list(part.kind == LLAMA_SUPPORT_FAST ? support.parts().always_size() : 0, "support_always");
    in.cells   = list(part.n_list, "support_cells");
    in.visible = list(counts ? part.n_tokens : 0, "support_visible");
    in.plan    = list(part.refresh ? 2 + support.parts().params.n_queries : 0, "support_plan");
    in.rows    = list(part.n_stored, "support_rows", GGML_TYPE_I64);
    for (const auto & policy : support.get_policies()) {
        policy->new_inputs(g.ctx0, in);
    }
    return in;
}

// The first layer of a graph makes the input, those after it find it. Null: there is no support.
static const llama_support_input * input_of(const llm_graph_context & g) {
    for (const auto & input : g.res->inputs) {
        if (const auto * ours = dynamic_cast<const llama_support_input *>(input.get())) {
            return ours;
        }
    }
    const auto support = support_of(g.mctx);
    if (!support) {
        return nullptr;
    }
    auto inp = std::make_unique<llama_support_input>(support, g);
    for (const auto & part : inp->key) {
        inp->parts.push_back(new_part(g, *support, part));
    }
    return (llama_support_input *) g.res->add_input(std::move(inp));
}

static void store_queries(const llama_layer_graph & a) {
    ggml_context * ctx = a.g.ctx0;
    const int64_t n = a.in.part.n_stored;
    const size_t  first = (a.q->ne[2] - n)*a.q->nb[2];
    ggml_tensor * last = a.q->nb[1] == a.q->ne[0]*a.q->nb[0] // the heads of a token lie together
        ? ggml_view_2d(ctx, a.q, a.q->ne[0]*a.q->ne[1], n, a.q->nb[2], first)
        : ggml_cont_2d(ctx, ggml_view_3d(ctx, a.q, a.q->ne[0], a.q->ne[1], n, a.q->nb[1], a.q->nb[2], first), a.q->ne[0]*a.q->ne[1], n);
    ggml_build_forward_expand(a.g.gf, ggml_set_rows(ctx, llama_stream_of(ctx, a.layer.queries, a.in.part.stream), last, a.in.rows));
}

// The nodes from n_before on, where a cache is in the host's memory (offload_kqv = false) and other layers, or the weights of this one, are
// not: the scheduler would give them to a GPU that computes them, and copy the cache to it at each step.
static void stay_with_cache(const llm_graph_context & g, const llama_support_layer & layer, int n_before) {
    if (ggml_backend_sched_get_n_backends(g.sched) == 1 || ggml_backend_dev_type(llama_path_device(layer.k->buffer)) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return;
    }
    for (int i = n_before; i < ggml_graph_n_nodes(g.gf); ++i) {
        ggml_tensor * node = ggml_graph_node(g.gf, i);
        if (node->op != GGML_OP_VIEW && node->op != GGML_OP_RESHAPE && node->op != GGML_OP_PERMUTE) { // these follow what they look at
            ggml_backend_sched_set_tensor_backend(g.sched, node, g.backend_cpu);
        }
    }
}

ggml_tensor * llama_support_build_attn(const llm_graph_context & g,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    const llama_support_input * inp = input_of(g);
    if (!inp || inp->parts.empty() || kq_b || !inp->support->is_sparse(il) || k->view_src != inp->support->layer(il).k) {
        return nullptr;
    }
    GGML_UNUSED(v);
    inp->support->remember_scale(il, kq_scale);
    const auto & layer = inp->support->layer(il);
    ggml_context * ctx = g.ctx0;
    ggml_tensor * all = nullptr;
    const int n_before = ggml_graph_n_nodes(g.gf);
    for (const auto & in : inp->parts) {
        const auto & part = in.part;
        ggml_tensor * mine = part.n_tokens == q->ne[2] ? q
            : ggml_view_3d(ctx, q, q->ne[0], q->ne[1], part.n_tokens, q->nb[1], q->nb[2], part.first*q->nb[2]);
        const llama_layer_graph a = { g, in, layer, il, mine, llama_all_cells(ctx, layer.k, layer.n_embd_k, layer.n_head_kv, part.stream),
            llama_all_cells(ctx, layer.v, layer.n_embd_v, layer.n_head_kv, part.stream), sinks, kq_scale, inp->support->parts().softcap() };
        if (part.n_stored > 0) {
            store_queries(a);
        }
        ggml_tensor * cur = layer.policy->attend(a);
        if (!cur) {
            GGML_ASSERT(inp->parts.size() == 1); // upstream's path is for whole ubatches, sfi_step_all() sees to that
            return nullptr;
        }
        all = all ? ggml_concat(ctx, all, cur, 1) : cur;
    }
    ggml_build_forward_expand(g.gf, all);
    stay_with_cache(g, layer, n_before);
    return all;
}

uint32_t llama_support_max_nodes(uint32_t n_layer, uint32_t n_seq) {
    constexpr uint32_t of_a_layer = 28; // with its views
    return of_a_layer*n_layer*(std::max(n_seq, (uint32_t) llama_support_max_tokens) - 1);
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
    const llama_support_input * inp = x->ne[1] > 1 && cpu_alone && !has_policy && is_ours(w) ? input_of(g) : nullptr;
    if (inp && !inp->parts.empty()) {
        const bool is_long = inp->parts[0].part.kind == LLAMA_SUPPORT_PREFILL && x->ne[1] >= min_unpack;
        if (is_long && ggml_can_block_mul_mat(w, x)) {
            return ggml_block_mul_mat(g.ctx0, w, x);
        }
        if (!is_long && ggml_can_few_mul_mat(w, x)) { // what a token has does not depend on how many it shares a pass with
            return ggml_few_mul_mat(g.ctx0, w, x);
        }
    }
    return ggml_mul_mat(g.ctx0, w, x);
}
