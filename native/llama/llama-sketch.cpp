// Policy sketch: when the basis is fitted and cells get their codes.
//
// always is cells[0 .. j0) and cells[j1 ..); the cells between have codes and are scanned. When the window is full, the
// cells older than n_recent get codes and leave it.

#include "llama-support.h"

#include "sketch-error.h"
#include "sketch-fit.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <numeric>

static constexpr int32_t max_rows   = 2048; // of K and V that a fit looks at, evenly spread over the text
static constexpr int32_t growth     = 2;    // a basis is outgrown when the cells have become so many times as many
static constexpr float   least_error = 1e-6f; // of outputs: a head without any is not to take all tolerance from the others
static constexpr int32_t few_queries = 32;  // a basis fitted to fewer queries is replaced when there are all

bool llama_support::update_sketch(llama_context & lctx, uint32_t s) {
    auto & st = streams[s];
    if (params.policy != LLAMA_SUPPORT_SKETCH || !st.valid) {
        return true;
    }
    const int32_t n = st.mirror.size();
    if (st.j0 + (n + 1 - st.j1) <= always_size()) {
        return true; // the next cell still has room in the window
    }
    const auto [j0, j1] = params.candidates(n);
    const int32_t n_queries = (int32_t) st.mirror.query_rows().size();
    int32_t from = st.j1; // what comes after has no codes yet
    if (st.n_fit == 0 || j1 - j0 >= growth*st.n_fit || (st.n_fit_queries < few_queries && n_queries == params.n_queries)) {
        if (!fit(lctx, s)) {
            invalidate(s);
            return false;
        }
        st.n_fit         = j1 - j0;
        st.n_fit_queries = n_queries;
        from = j0;
    }
    if (!encode(lctx, s, from, j1)) {
        invalidate(s);
        return false;
    }
    st.j0 = j0;
    st.j1 = j1;
    use_huge_pages(s);
    return true;
}

bool llama_support::cut_support(llama_sequence & st, int32_t left) const {
    if (!st.valid || left >= st.j1) {
        return true;
    }
    const auto [j0, j1] = params.candidates(left);
    if (params.policy != LLAMA_SUPPORT_SKETCH || growth*(j1 - j0) < st.n_fit) {
        return false;
    }
    st.j1 = j1;
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
std::vector<std::vector<float>> llama_support::device_rows(llama_context & lctx, uint32_t stream, const std::vector<std::pair<ggml_tensor *, const std::vector<int32_t> *>> & wanted) {
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
    const bool ok = side.compute(lctx.get_sched(), 4*wanted.size(), build, [&] {
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

bool llama_support::fit_rows(llama_context & lctx, uint32_t s, int32_t il, const std::vector<int32_t> & cells, const std::vector<int32_t> & queries, layer_rows & out) {
    auto & layer = layers[il];
    ggml_tensor * k = kv->get_k_storage(il);
    if (ggml_backend_buffer_is_host(k->buffer)) {
        out = { host_rows(k, s, layer.n_embd_k*layer.n_head_kv, cells), host_rows(layer.v, s, layer.n_embd_v*layer.n_head_kv, cells),
                host_rows(layer.queries, s, layer.queries->ne[0], queries) };
        return true;
    }
    auto rows = device_rows(lctx, s, { { k, &cells }, { layer.v, &cells }, { layer.queries, &queries } });
    if (rows.empty()) {
        return false;
    }
    out = { std::move(rows[0]), std::move(rows[1]), std::move(rows[2]) };
    return true;
}

// Of one layer, by KV head: its basis, the error of a logit, and how much it needs exact cells, compared with others.
llama_support::layer_fit llama_support::fit_layer(const llama_support_layer & layer, const layer_rows & rows) {
    const int64_t d_k = layer.n_embd_k, d_v = layer.n_embd_v;
    const int64_t n_head_kv = layer.n_head_kv, n_embd_q = layer.queries->ne[0];
    const int64_t group = n_embd_q/d_k/n_head_kv, n_basis = layer.basis->ne[0];

    layer_fit fit;
    fit.basis.resize(n_head_kv*n_basis);
    for (int64_t h = 0; h < n_head_kv; ++h) {
        auto k = head_of(rows.k, d_k*n_head_kv, d_k, h, 1), v = head_of(rows.v, d_v*n_head_kv, d_v, h, 1);
        auto q = head_of(rows.q, n_embd_q, d_k, h*group, group);
        llama_sketch_keep_finite({ &k, &v }, 1);
        llama_sketch_keep_finite({ &q }, group);
        float * basis = &fit.basis[h*n_basis];
        fit.logit_error.push_back(llama_sketch_fit(k, v, q, d_k, d_v, layer.format, basis)*layer.kq_scale);
        const float error = llama_sketch_output_error(k, v, q, d_k, d_v, layer.format, basis, group, layer.kq_scale);
        fit.need.push_back(std::sqrt(std::sqrt(std::max(error, least_error))));
    }
    return fit;
}

// The tolerance is that of a head with the mean need. If the error of a head falls as the square of its tolerance and its exact cells
// grow as the inverse, the cube root of the error is best; as the estimate is a rough one, a smaller power is. A head whose numbers are
// not finite takes the tolerance as it is, and no part in the mean: `least` is always finite, as ggml_sketch_scan() wants it.
void llama_support::spread_tolerance(uint32_t s, const std::vector<std::vector<float>> & need) {
    double sum = 0.0, n = 0.0;
    for (const auto & of_layer : need) {
        for (const float x : of_layer) {
            sum += std::isfinite(x) ? x : 0.0f;
            n   += std::isfinite(x);
        }
    }
    for (size_t il = 0; il < need.size(); ++il) {
        const auto & layer = layers[il];
        std::vector<float> least;
        for (size_t h = 0; h < need[il].size(); ++h) {
            const float error = layer.logit_error[s*layer.n_head_kv + h];
            const float tolerance = std::isfinite(need[il][h]) ? params.tolerance*(float) (sum/n)/need[il][h] : params.tolerance;
            least.push_back(tolerance/(std::isfinite(error) ? std::max(error, 1e-6f) : 1.0f));
        }
        if (!least.empty()) {
            ggml_backend_tensor_set(layer.least, least.data(), s*layer.least->nb[1], least.size()*sizeof(float));
        }
    }
}

// A layer for each thread at a time: their rows are gathered one after the other, then all are fitted at once. No backend promises
// that several threads may write to it, so that this thread alone does; an error of a helper comes out here.
bool llama_support::fit(llama_context & lctx, uint32_t s) {
    const auto & st = streams[s];
    const int32_t first = std::min(params.n_sink, st.mirror.size()), n = st.mirror.size() - first;
    const auto queries = st.mirror.query_rows();
    std::vector<int32_t> cells;
    for (int64_t i = 0, m = std::min(n, max_rows); i < m; ++i) {
        cells.push_back(st.mirror.cells()[first + i*n/m]);
    }
    std::vector<int32_t> todo;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (layers[il].codes) {
            todo.push_back(il);
        }
    }
    const size_t n_threads = std::max(1, lctx.get_cparams().n_threads_batch);
    std::vector<layer_rows> rows(n_threads);
    std::vector<std::vector<float>> need(layers.size());
    for (size_t begin = 0; begin < todo.size(); begin += n_threads) {
        if (on_fit && !on_fit((int32_t) begin, (int32_t) todo.size())) {
            return false;
        }
        const size_t n_now = std::min(n_threads, todo.size() - begin);
        std::vector<std::future<layer_fit>> fits;
        for (size_t i = 0; i < n_now; ++i) {
            if (!fit_rows(lctx, s, todo[begin + i], cells, queries, rows[i])) {
                return false;
            }
        }
        for (size_t i = 0; i < n_now; ++i) { // the last one by this thread
            fits.push_back(std::async(i + 1 < n_now ? std::launch::async : std::launch::deferred,
                    [&, i] { return fit_layer(layers[todo[begin + i]], rows[i]); }));
        }
        fits.back().wait();
        for (size_t i = 0; i < n_now; ++i) {
            auto & layer = layers[todo[begin + i]];
            layer_fit done = fits[i].get();
            ggml_backend_tensor_set(layer.basis, done.basis.data(), s*layer.n_head_kv*layer.basis->nb[1], done.basis.size()*sizeof(float));
            std::copy(done.logit_error.begin(), done.logit_error.end(), layer.logit_error.begin() + s*layer.n_head_kv);
            need[todo[begin + i]] = std::move(done.need);
        }
    }
    spread_tolerance(s, need);
    return true;
}

// ---- codes ---------------------------------------------------------------------------------------------------------------

// Compute the codes of the cells at places [from, to) of the text, in all layers, on the devices that hold them.
bool llama_support::encode(llama_context & lctx, uint32_t s, int32_t from, int32_t to) {
    if (from >= to) {
        return true;
    }
    ggml_tensor * cells = nullptr;
    const auto build = [&](ggml_context * ctx, ggml_cgraph * graph) {
        cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, to - from);
        ggml_set_input(cells);
        for (size_t il = 0; il < layers.size(); ++il) {
            if (layers[il].codes) {
                ggml_build_forward_expand(graph, encode_layer(ctx, s, (int32_t) il, cells));
            }
        }
    };
    return side.compute(lctx.get_sched(), 9*layers.size() + 8, build, [&] { ggml_backend_tensor_set(cells, &streams[s].mirror.cells()[from], 0, ggml_nbytes(cells)); });
}

ggml_tensor * llama_support::encode_layer(ggml_context * ctx, uint32_t s, int32_t il, ggml_tensor * cells) {
    const auto & layer = layers[il];
    llama_kv_cache::slot_info stream;
    stream.s0 = stream.s1 = s;
    ggml_tensor * k = llama_support_all_cells(ctx, kv->get_k(ctx, il, kv->get_size(), stream));
    ggml_tensor * v = llama_support_all_cells(ctx, kv->get_v(ctx, il, kv->get_size(), stream));
    return ggml_sketch_encode(ctx, llama_support_heads(ctx, layer.codes, 2, layer.n_head_kv, s),
            llama_support_heads(ctx, layer.basis, 1, layer.n_head_kv, s), k, v, cells, &layer.format);
}
