// When the basis is fitted, when cells get their codes, and what a fast step does with them; see sketch-policy.h.

#include "sketch-policy.h"

#include "blocked-signals.h"

#include "llama-path.h"
#include "sketch-error.h"
#include "sketch-fit.h"
#include "sketch-layout.h"
#include "support-state.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <map>
#include <numeric>

static constexpr int32_t max_rows   = 2048; // of K and V that a fit looks at, evenly spread over the text
static constexpr int32_t growth     = 2;    // a basis is outgrown when the cells have become so many times as many
static constexpr float   least_error = 1e-6f; // of outputs: a head without any is not to take all tolerance from the others
static constexpr int32_t few_queries = 32;  // a basis fitted to fewer queries is replaced when there are all
static constexpr int64_t skip_pad = 256, scan_pad = 1024; // so that a graph fits many depths

// ---- memory --------------------------------------------------------------------------------------------------------------

void llama_sketch::allocate(ggml_context * ctx, const std::vector<int32_t> & ils) {
    for (const int32_t il : ils) {
        allocate_codes(ctx, il);
    }
    allocate_results(ctx, ils);
}

void llama_sketch::allocate_codes(ggml_context * ctx, int32_t il) {
    const auto & layer = core.layers[il];
    const int64_t n_stream = core.streams.size(), n_blocks = ((int64_t) core.kv.get_size() + 15)/16;
    auto & t = tensors[il];
    t.format = llama_path_format(llama_path_shape_of(core.model, core.kv, il), core.params);
    t.codes  = ggml_new_tensor_3d(ctx, GGML_TYPE_I8,  16*ggml_sketch_cell_bytes(&t.format), n_blocks, layer.n_head_kv*n_stream);
    t.basis  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_sketch_basis_size(&t.format, layer.n_embd_k, layer.n_embd_v), layer.n_head_kv*n_stream);
    t.least  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.n_head_kv, n_stream);
    t.logit_error.assign(layer.n_head_kv*n_stream, 0.0f);
}

// What every fast step says of itself lies together, so that a device is asked once for all of its layers.
void llama_sketch::allocate_results(ggml_context * ctx, const std::vector<int32_t> & ils) {
    const int64_t n_stream = core.streams.size(), n_top = core.params.n_selected, n_rows = n_stream*llama_support_max_tokens;
    int64_t n_heads = 0, n_heads_kv = 0;
    for (const int32_t il : ils) {
        n_heads    += core.layers[il].n_head;
        n_heads_kv += core.layers[il].n_head_kv;
    }
    ggml_tensor * selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_top*n_heads_kv, n_stream);
    ggml_tensor * mass     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 2*n_heads, n_rows);
    ggml_tensor * counts   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2*n_heads_kv, n_rows);
    size_t at_selected = 0, at_mass = 0, at_counts = 0;
    const auto part = [&](ggml_tensor * all, int64_t n, int64_t n_head, size_t & at) {
        ggml_tensor * view = ggml_view_3d(ctx, all, n, n_head, all->ne[1], n*4, all->nb[1], at);
        at += n*n_head*4;
        return view;
    };
    for (const int32_t il : ils) {
        const auto & layer = core.layers[il];
        tensors[il].selected = part(selected, n_top, layer.n_head_kv, at_selected);
        tensors[il].mass     = part(mass, 2, layer.n_head, at_mass);
        tensors[il].counts   = part(counts, 2, layer.n_head_kv, at_counts);
    }
}

// ---- between steps -------------------------------------------------------------------------------------------------------

// Until cells get codes again; that is before the next token where the window is full.
int32_t llama_sketch::window_room(const llama_sequence & st) const {
    const int32_t room = (int32_t) (core.always_size() - st.j0 - (st.mirror.size() - st.j1));
    return room < 1 ? core.params.n_grow : room;
}

// Fits the basis if it is missing or of too little, writes the codes of cells that have left the window or will with the next cells.
bool llama_sketch::prepare(llama_context & lctx, uint32_t s, int32_t n_next) {
    auto & st = core.streams[s];
    const int32_t n = st.mirror.size();
    if (st.j0 + (n + n_next - st.j1) <= core.always_size()) {
        return true; // the next cells still have room in the window
    }
    const auto [j0, j1] = core.params.candidates(n);
    const int32_t n_queries = (int32_t) st.mirror.query_rows().size();
    int32_t from = st.j1; // what comes after has no codes yet
    if (st.n_fit == 0 || j1 - j0 >= growth*st.n_fit || (st.n_fit_queries < few_queries && n_queries == core.params.n_queries)) {
        if (!fit(lctx, s)) {
            return false;
        }
        st.n_fit         = j1 - j0;
        st.n_fit_queries = n_queries;
        from = j0;
    }
    if (!encode(lctx, s, from, j1)) {
        return false;
    }
    st.j0 = j0;
    st.j1 = j1;
    return true;
}

bool llama_sketch::refresh(llama_context & lctx, uint32_t s, bool) {
    return prepare(lctx, s, 1);
}

bool llama_sketch::cut(llama_sequence & st, int32_t left) const {
    if (!st.valid || left >= st.j1) {
        return true;
    }
    const auto [j0, j1] = core.params.candidates(left);
    if (growth*(j1 - j0) < st.n_fit) {
        return false;
    }
    st.j1 = j1; // the others lose their codes with their cells
    return true;
}

// ---- fitting -------------------------------------------------------------------------------------------------------------

// rows [n_embd] of some cells in one stream of a tensor that the host can read, in F32
static std::vector<float> host_rows(const ggml_tensor * cache, uint32_t stream, int64_t n_embd, const std::vector<int32_t> & cells) {
    const auto to_float = ggml_get_type_traits(cache->type)->to_float;
    std::vector<float> out(cells.size()*n_embd);
    for (size_t i = 0; i < cells.size(); ++i) {
        const char * raw = (const char *) cache->data + stream*cache->nb[2] + cells[i]*cache->nb[1];
        if (to_float) {
            to_float(raw, &out[i*n_embd], n_embd);
        } else {
            std::copy_n((const float *) raw, n_embd, &out[i*n_embd]);
        }
    }
    return out;
}

// The same of several tensors of one device: gathered there, because a copy for every row takes longer than the fit.
// Empty if computing failed.
std::vector<std::vector<float>> llama_sketch::device_rows(llama_context & lctx, uint32_t stream, const wanted_rows & wanted) {
    std::vector<ggml_tensor *> lists, gathered;
    const auto build = [&](ggml_context * ctx, ggml_cgraph * graph) {
        for (const auto & [t, cells] : wanted) {
            ggml_tensor * rows = ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], stream*t->nb[2]);
            lists.push_back(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, cells->size()));
            ggml_set_input(lists.back());
            gathered.push_back(ggml_get_rows(ctx, rows, lists.back()));
            ggml_set_output(gathered.back());
            ggml_build_forward_expand(graph, gathered.back());
        }
    };
    const bool ok = core.side.compute(lctx.get_sched(), 4*wanted.size(), build, [&] {
        for (size_t i = 0; i < wanted.size(); ++i) {
            ggml_backend_tensor_set(lists[i], wanted[i].second->data(), 0, ggml_nbytes(lists[i]));
        }
    });
    std::vector<std::vector<float>> out;
    for (size_t i = 0; i < wanted.size() && ok; ++i) {
        out.emplace_back(ggml_nelements(gathered[i]));
        ggml_backend_tensor_get(gathered[i], out[i].data(), 0, ggml_nbytes(gathered[i]));
    }
    return out;
}

static llama_sketch_rows head_of(const std::vector<float> & rows, int64_t n_embd_gqa, int64_t n_embd, int64_t first, int64_t n_heads) {
    llama_sketch_rows out;
    const int64_t n = rows.size()/n_embd_gqa;
    out.n = n*n_heads;
    out.data.reserve(out.n*n_embd);
    for (int64_t i = 0; i < n; ++i) {
        const float * from = &rows[i*n_embd_gqa + first*n_embd];
        out.data.insert(out.data.end(), from, from + n_heads*n_embd);
    }
    return out;
}

bool llama_sketch::fit_rows(llama_context & lctx, uint32_t s, int32_t il, const std::vector<int32_t> & cells, const std::vector<int32_t> & queries, layer_rows & out) {
    const auto & layer = core.layers[il];
    if (layer.on_host()) {
        out = { host_rows(layer.k, s, layer.n_embd_k*layer.n_head_kv, cells), host_rows(layer.v, s, layer.n_embd_v*layer.n_head_kv, cells),
                host_rows(layer.queries, s, layer.queries->ne[0], queries) };
        return true;
    }
    auto rows = device_rows(lctx, s, { { layer.k, &cells }, { layer.v, &cells }, { layer.queries, &queries } });
    if (rows.empty()) {
        return false;
    }
    out = { std::move(rows[0]), std::move(rows[1]), std::move(rows[2]) };
    return true;
}

// Of one layer, by KV head: its basis, the error of a logit, and how much it needs exact cells, compared with others.
llama_sketch::layer_fit llama_sketch::fit_layer(int32_t il, const layer_rows & rows) const {
    const auto & layer = core.layers[il];
    const auto & format = tensors[il].format;
    const int64_t d_k = layer.n_embd_k, d_v = layer.n_embd_v;
    const int64_t n_head_kv = layer.n_head_kv, n_embd_q = layer.queries->ne[0];
    const int64_t group = n_embd_q/d_k/n_head_kv, n_basis = tensors[il].basis->ne[0];

    layer_fit fit;
    fit.basis.resize(n_head_kv*n_basis);
    for (int64_t h = 0; h < n_head_kv; ++h) {
        auto k = head_of(rows.k, d_k*n_head_kv, d_k, h, 1), v = head_of(rows.v, d_v*n_head_kv, d_v, h, 1);
        auto q = head_of(rows.q, n_embd_q, d_k, h*group, group);
        llama_sketch_keep_finite({ &k, &v }, 1);
        llama_sketch_keep_finite({ &q }, group);
        float * basis = &fit.basis[h*n_basis];
        fit.logit_error.push_back(llama_sketch_fit(k, v, q, d_k, d_v, format, basis)*layer.kq_scale);
        const float error = llama_sketch_output_error(k, v, q, d_k, d_v, format, basis, group, layer.kq_scale);
        fit.need.push_back(std::sqrt(std::sqrt(std::max(error, least_error))));
    }
    return fit;
}

// The tolerance is that of a head with the mean need. If the error of a head falls as the square of its tolerance and its exact cells
// grow as the inverse, the cube root of the error is best; as the estimate is a rough one, a smaller power is. A head whose numbers are
// not finite takes the tolerance as it is, and no part in the mean: `least` is always finite, as ggml_sketch_scan() wants it.
void llama_sketch::spread_tolerance(uint32_t s, const std::vector<std::vector<float>> & need) {
    double sum = 0.0, n = 0.0;
    for (const auto & of_layer : need) {
        for (const float x : of_layer) {
            sum += std::isfinite(x) ? x : 0.0f;
            n   += std::isfinite(x);
        }
    }
    for (size_t il = 0; il < need.size(); ++il) {
        const auto & t = tensors[il];
        std::vector<float> least;
        for (size_t h = 0; h < need[il].size(); ++h) {
            const float error = t.logit_error[s*core.layers[il].n_head_kv + h];
            const float tolerance = std::isfinite(need[il][h]) ? core.params.tolerance*(float) (sum/n)/need[il][h] : core.params.tolerance;
            least.push_back(tolerance/(std::isfinite(error) ? std::max(error, 1e-6f) : 1.0f));
        }
        if (!least.empty()) {
            ggml_backend_tensor_set(t.least, least.data(), s*t.least->nb[1], least.size()*sizeof(float));
        }
    }
}

// A layer for each thread at a time: their rows are gathered one after the other, then all are fitted at once. No backend promises
// that several threads may write to it, so that this thread alone does; an error of a helper comes out here.
bool llama_sketch::fit(llama_context & lctx, uint32_t s) {
    const auto & st = core.streams[s];
    const int32_t first = std::min(core.params.n_sink, st.mirror.size()), n = st.mirror.size() - first;
    const auto queries = st.mirror.query_rows();
    std::vector<int32_t> cells;
    for (int64_t i = 0, m = std::min(n, max_rows); i < m; ++i) {
        cells.push_back(st.mirror.cells()[first + i*n/m]);
    }
    std::vector<int32_t> todo;
    for (int32_t il = 0; il < (int32_t) tensors.size(); ++il) {
        if (tensors[il].codes) {
            todo.push_back(il);
        }
    }
    const size_t n_threads = std::max(1, lctx.get_cparams().n_threads_batch);
    std::vector<layer_rows> rows(n_threads);
    std::vector<std::vector<float>> need(tensors.size());
    for (size_t begin = 0; begin < todo.size(); begin += n_threads) {
        if (core.on_fit && !core.on_fit((int32_t) begin, (int32_t) todo.size())) {
            return false;
        }
        const size_t n_now = std::min(n_threads, todo.size() - begin);
        std::vector<std::future<layer_fit>> fits;
        for (size_t i = 0; i < n_now; ++i) {
            if (!fit_rows(lctx, s, todo[begin + i], cells, queries, rows[i])) {
                return false;
            }
        }
        {
            const blocked_signals none;
            for (size_t i = 0; i < n_now; ++i) { // the last one by this thread, and those for which there is no other
                fits.push_back(std::async(i + 1 < n_now ? std::launch::async | std::launch::deferred : std::launch::deferred,
                        [&, i] { return fit_layer(todo[begin + i], rows[i]); }));
            }
        }
        fits.back().wait();
        for (size_t i = 0; i < n_now; ++i) {
            auto & t = tensors[todo[begin + i]];
            const int64_t first = s*core.layers[todo[begin + i]].n_head_kv;
            layer_fit done = fits[i].get();
            ggml_backend_tensor_set(t.basis, done.basis.data(), first*t.basis->nb[1], done.basis.size()*sizeof(float));
            std::copy(done.logit_error.begin(), done.logit_error.end(), t.logit_error.begin() + first);
            need[todo[begin + i]] = std::move(done.need);
        }
    }
    spread_tolerance(s, need);
    return true;
}

// ---- codes ---------------------------------------------------------------------------------------------------------------

// Compute the codes of the cells at places [from, to) of the text, in all layers, on the devices that hold them.
bool llama_sketch::encode(llama_context & lctx, uint32_t s, int32_t from, int32_t to) {
    if (from >= to) {
        return true;
    }
    ggml_tensor * cells = nullptr;
    const auto build = [&](ggml_context * ctx, ggml_cgraph * graph) {
        cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, to - from);
        ggml_set_input(cells);
        for (size_t il = 0; il < tensors.size(); ++il) {
            if (tensors[il].codes) {
                ggml_build_forward_expand(graph, encode_layer(ctx, s, (int32_t) il, cells));
            }
        }
    };
    return core.side.compute(lctx.get_sched(), 9*tensors.size() + 8, build, [&] { ggml_backend_tensor_set(cells, &core.streams[s].mirror.cells()[from], 0, ggml_nbytes(cells)); });
}

ggml_tensor * llama_sketch::encode_layer(ggml_context * ctx, uint32_t s, int32_t il, ggml_tensor * cells) {
    const auto & layer = core.layers[il];
    const auto & t     = tensors[il];
    return ggml_sketch_encode(ctx, llama_heads_of(ctx, t.codes, 2, layer.n_head_kv, s), llama_heads_of(ctx, t.basis, 1, layer.n_head_kv, s),
            llama_all_cells(ctx, layer.k, layer.n_embd_k, layer.n_head_kv, s), llama_all_cells(ctx, layer.v, layer.n_embd_v, layer.n_head_kv, s),
            cells, &t.format);
}

// ---- the graph of a layer ------------------------------------------------------------------------------------------------

// Room for the cells of the longest sequence, so that all can use one graph.
void llama_sketch::key(llama_support_part & part) const {
    if (part.kind == LLAMA_SUPPORT_FAST && scanned(part.stream)) {
        int64_t n_used = 0, n_holes = 0;
        for (const auto & st : core.streams) {
            n_used  = std::max<int64_t>(n_used,  st.mirror.known() ? st.mirror.n_used() : 0);
            n_holes = std::max<int64_t>(n_holes, st.mirror.known() ? st.mirror.holes().size() : 0);
        }
        part.n_skip = GGML_PAD(core.always_size() + n_holes, skip_pad);
        part.n_scan = std::min<int64_t>(GGML_PAD(n_used, scan_pad), GGML_PAD(core.kv.get_size(), 16));
    }
}

void llama_sketch::new_inputs(ggml_context * ctx, llama_part_input & in) const {
    if (in.part.n_scan > 0) {
        in.skip = llama_new_input(ctx, GGML_TYPE_I32, { in.part.n_skip, 1, 1, 1 }, "sketch_skip");
        in.scan = llama_new_input(ctx, GGML_TYPE_I32, { 1, 1, 1, 1 }, "sketch_plan");
    }
}

// Cells that were in use before the last n tokens of the text came: how much is looked at a second time depends on it.
static int32_t used_before(const llama_kv_mirror & mirror, int64_t n) {
    int32_t n_used = mirror.n_used();
    for (auto cell = mirror.cells().rbegin(); n > 0 && *cell == n_used - 1; ++cell, --n) {
        --n_used;
    }
    return n_used;
}

void llama_sketch::set_inputs(const llama_part_input & in) const {
    const auto & st = core.streams[in.part.stream];
    if (llama_is_used(in.skip)) {
        auto list = st.mirror.without(st.j0, st.j1);
        list.insert(list.end(), st.mirror.holes().begin(), st.mirror.holes().end());
        llama_set_list(in.skip, std::move(list));
    }
    if (llama_is_used(in.scan)) {
        const int32_t n_used = used_before(st.mirror, in.part.n_behind);
        ggml_backend_tensor_set(in.scan, &n_used, 0, sizeof(n_used));
    }
}

// Chooses the selected cells of this query, and returns what all others contribute.
ggml_tensor * llama_sketch::scan(const llama_layer_graph & a) const {
    ggml_context * ctx = a.g.ctx0;
    const auto & t    = tensors[a.il];
    const auto & part = a.in.part;
    const int64_t n_head_kv = a.layer.n_head_kv;
    ggml_tensor * codes = llama_heads_of(ctx, t.codes, 2, n_head_kv, part.stream);
    ggml_tensor * basis = llama_heads_of(ctx, t.basis, 1, n_head_kv, part.stream);
    ggml_tensor * least = nullptr;
    float second_look = 0.0f; // without a tolerance any cell may be one of the n_selected best; where K was seen as a whole nothing is saved
    if (core.params.tolerance > 0.0f) {
        second_look = t.format.n_first < sketch_k_planes(t.format) ? core.params.second_look : 0.0f;
        least = ggml_view_1d(ctx, t.least, n_head_kv, part.stream*t.least->nb[1]);
    }
    ggml_tensor * tail = ggml_sketch_scan(ctx, a.q, codes, basis, a.in.skip, a.in.scan, least, llama_stream_of(ctx, t.selected, part.stream),
            llama_stream_of(ctx, t.counts, row_of(part.stream, part.index)), part.n_scan, a.v->ne[0], a.kq_scale, a.softcap, second_look, &t.format);
    a.g.cb(tail, "sketch_scan", a.il);
    ggml_build_forward_expand(a.g.gf, tail); // before who reads the selected cells
    return t.format.n_v4 + t.format.n_v2 > 0 ? tail : nullptr;
}

ggml_tensor * llama_sketch::attend(const llama_layer_graph & a) const {
    if (a.in.part.kind != LLAMA_SUPPORT_FAST) {
        return llama_attend_densely(a);
    }
    ggml_context * ctx = a.g.ctx0;
    ggml_tensor * tail = nullptr, * selected = nullptr;
    if (a.in.skip) {
        tail     = scan(a);
        selected = llama_stream_of(ctx, tensors[a.il].selected, a.in.part.stream);
    }
    ggml_tensor * cur = ggml_sparse_attn(ctx, a.q_rows(), a.k, a.v, a.in.always, selected, tail, a.sinks, a.kq_scale, a.softcap);
    if (tail) {
        ggml_sparse_attn_set_mass(cur, llama_stream_of(ctx, tensors[a.il].mass, row_of(a.in.part.stream, a.in.part.index)));
    }
    return a.done(cur, "sparse_attn");
}

// ---- what a step did -----------------------------------------------------------------------------------------------------

// What a fast step left in the tensors that the layers of a device share. Each is read once, for a copy from a device takes
// tens of microseconds however small it is; in the host's memory they are looked at where they lie.
class step_results {
public:
    explicit step_results(uint32_t row) : row(row) {}

    template <class T> const T * of(const ggml_tensor * t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return (const T *) ((const char *) t->data + row*t->nb[2]);
        }
        auto & bytes = read[t->view_src];
        if (bytes.empty()) {
            bytes.resize(t->view_src->nb[1]);
            ggml_backend_tensor_get(t->view_src, bytes.data(), row*t->view_src->nb[1], bytes.size());
        }
        return (const T *) (bytes.data() + t->view_offs);
    }

private:
    uint32_t row;
    std::map<const ggml_tensor *, std::vector<char>> read;
};

// Of every cell that is scanned, all that are in use, the codes of the first look, and of every KV head means and decoding rows of its basis.
int64_t llama_sketch::read_bytes(int64_t n_used) const {
    int64_t size = 0;
    for (size_t il = 0; il < tensors.size(); ++il) {
        const auto & layer = core.layers[il];
        const auto & f     = tensors[il].format;
        if (tensors[il].codes) {
            const int64_t decoding = layer.n_embd_k*(4 + 2*(f.n_k4 + f.n_k2 + f.n_k1)) + layer.n_embd_v*(4 + 2*(f.n_v4 + f.n_v2));
            size += layer.n_head_kv*(n_used*4*f.n_first + decoding);
        }
    }
    return size;
}

void llama_sketch::report(uint32_t s, int32_t i, int32_t n, llama_support_report & out) const {
    if (!scanned(s)) {
        return;
    }
    step_results results(row_of(s, i));
    int64_t n_heads = 0, n_cells = 0, n_masses = 0;
    double mass = 0.0;
    for (size_t il = 0; il < tensors.size(); ++il) {
        const auto & layer = core.layers[il];
        const auto & t     = tensors[il];
        if (!t.codes) {
            continue;
        }
        const int64_t exact_bytes = core.row_bytes((int32_t) il, false)/layer.n_head_kv;
        const int64_t more_bytes  = ggml_sketch_cell_bytes(&t.format) - 4*t.format.n_first; // of a second look
        const int32_t * counts = results.of<int32_t>(t.counts); // {attended, looked at again} of every KV head
        for (int64_t h = 0; h < layer.n_head_kv; ++h) {
            n_cells     += counts[2*h];
            out.kv_read += counts[2*h]*exact_bytes + counts[2*h + 1]*more_bytes;
        }
        n_heads += layer.n_head_kv;
        const float * masses = results.of<float>(t.mass); // {log-sum-exp, share of the tail} of every head
        for (int64_t h = 0; h < layer.n_head; ++h, ++n_masses) {
            mass += masses[2*h + 1];
        }
    }
    out.kv_read += read_bytes(used_before(core.streams[s].mirror, n - 1 - i));
    out.n_cells += n_heads ? (int32_t) ((n_cells + n_heads/2)/n_heads) : 0;
    out.tail_mass = n_masses ? (float) (mass/n_masses) : 0.0f;
}

std::vector<int32_t> llama_sketch::selected(uint32_t stream, int32_t il, int32_t head_kv) const {
    return llama_read_cells(tensors[il].selected, stream, head_kv);
}

bool llama_sketch::tail(uint32_t s, int32_t il, int32_t head, std::array<float, 2> & out) const {
    if (!scanned(s) || !tensors[il].mass) {
        return false;
    }
    const auto & layer = core.layers[il];
    out = { step_results(row_of(s, 0)).of<float>(tensors[il].mass)[2*head + 1], tensors[il].logit_error[s*layer.n_head_kv + head/(layer.n_head/layer.n_head_kv)] };
    return true;
}

// ---- the state of a sequence ---------------------------------------------------------------------------------------------

// The codes of the first n_kept of n_coded cells; the others are passed over.
void llama_sketch::state_of_head(llama_state_cursor & c, const layer_tensors & t, uint32_t head, int64_t n_coded, int64_t n_kept) const {
    const int64_t block = sketch_block_bytes(t.format), record = sketch_record_bytes(t.format);
    const int64_t n_blocks = (n_coded + sketch_cells - 1)/sketch_cells, n_kept_blocks = (n_kept + sketch_cells - 1)/sketch_cells;
    const size_t  at = head*t.codes->nb[2];
    c.tensor(t.codes, at, n_kept_blocks*block);
    c.skip((n_blocks - n_kept_blocks)*block);
    c.tensor(t.codes, at + sketch_record_at(t.format, t.codes->ne[1], 0), n_kept*record);
    c.skip((n_coded - n_kept)*record);
}

void llama_sketch::state(llama_state_cursor & c, uint32_t s, int32_t il, int32_t n_coded, int32_t n_kept) {
    auto & t = tensors[il];
    const int64_t n_head = core.layers[il].n_head_kv;
    c.host(&core.layers[il].kq_scale, sizeof(float));
    c.tensor(t.basis, s*n_head*t.basis->nb[1], n_head*t.basis->nb[1]);
    c.tensor(t.least, s*t.least->nb[1], n_head*sizeof(float));
    c.host(&t.logit_error[s*n_head], n_head*sizeof(float));
    for (int64_t h = 0; h < n_head; ++h) {
        state_of_head(c, t, s*n_head + h, n_coded, n_kept);
    }
}

bool llama_sketch::is_sound(const char * bytes, int32_t il, int32_t) const {
    const int64_t n_head = core.layers[il].n_head_kv;
    bytes += sizeof(float) + n_head*tensors[il].basis->nb[1];
    return llama_all_at<float>(bytes, n_head, [](float x) { return std::isfinite(x); });
}
