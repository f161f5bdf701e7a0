// What fast steps need of a sequence, as bytes: for another context of the same model, whose cells may be more or fewer.
//
//     head, positions of the kept queries [n_queries]
//     of each layer that selects:
//         queries [n_embd_q, n_queries]
//         frozen: selected [n_selected, n_head_kv], stability [4, n_head_kv]
//         sketch: scale, basis, least and errors of [n_head_kv], then of each KV head the blocks and the records of its first j1 cells
//
// How long it is follows from the head alone, and is compared before anything is taken. Cell i must hold token i: codes of 16 cells lie
// together.

#include "llama-support.h"

#include "sketch-layout.h"

#include <cmath>
#include <cstring>

namespace {

struct state_head {
    uint32_t magic, version;
    int32_t  policy, n_layer;           // of these parameters a state must have those of the context it goes to
    int32_t  n_queries, n_sink, n_selected;
    float    tolerance;
    int32_t  n, j0, j1, span;           // of the sequence
    int32_t  n_fit, n_fit_queries;
    int64_t  n_refresh;
};

constexpr uint32_t state_magic = 0x53666953, state_version = 1;

// Passes over the bytes of a state: counts them, or moves them out of tensors, or into them.
struct cursor {
    enum { COUNT, OUT, IN } what;
    char * bytes;
    size_t at = 0;

    void host(void * p, size_t n) {
        if (what == OUT) {
            memcpy(bytes + at, p, n);
        } else if (what == IN) {
            memcpy(p, bytes + at, n);
        }
        at += n;
    }
    void tensor(ggml_tensor * t, size_t offset, size_t n) {
        if (what == OUT) {
            ggml_backend_tensor_get(t, bytes + at, offset, n);
        } else if (what == IN) {
            ggml_backend_tensor_set(t, bytes + at, offset, n);
        }
        at += n;
    }
    void skip(size_t n) { at += n; }
};

// Whether all of n values at bytes of any alignment are as they should be.
template <class T, class F> bool all_at(const char * bytes, size_t n, F && good) {
    for (size_t i = 0; i < n; ++i) {
        T x;
        memcpy(&x, bytes + i*sizeof(T), sizeof(T));
        if (!good(x)) {
            return false;
        }
    }
    return true;
}

bool cells_at(const char * bytes, size_t n, int32_t below) {
    return all_at<int32_t>(bytes, n, [=](int32_t x) { return x >= -1 && x < below; });
}

} // namespace

// The codes of the first n_kept of n_coded cells; the others are passed over.
static void codes_of_head(cursor & c, llama_support_layer & layer, uint32_t head, int64_t n_coded, int64_t n_kept) {
    const auto & f = layer.format;
    const int64_t block = sketch_block_bytes(f), record = sketch_record_bytes(f);
    const int64_t n_blocks = (n_coded + sketch_cells - 1)/sketch_cells, n_kept_blocks = (n_kept + sketch_cells - 1)/sketch_cells;
    const size_t  at = head*layer.codes->nb[2];
    c.tensor(layer.codes, at, n_kept_blocks*block);
    c.skip((n_blocks - n_kept_blocks)*block);
    c.tensor(layer.codes, at + sketch_record_at(f, layer.codes->ne[1], 0), n_kept*record);
    c.skip((n_coded - n_kept)*record);
}

static void layer_state(cursor & c, llama_support_layer & layer, uint32_t s, int32_t n_coded, int32_t n_kept) {
    c.tensor(layer.queries, s*layer.queries->nb[2], layer.queries->nb[2]);
    if (!layer.codes) {
        c.tensor(layer.selected, s*layer.selected->nb[2], layer.selected->nb[2]);
        if (layer.stability) {
            c.tensor(layer.stability, s*layer.stability->nb[2], layer.stability->nb[2]);
        }
        return;
    }
    const int64_t n_head = layer.n_head_kv;
    c.host(&layer.kq_scale, sizeof(float));
    c.tensor(layer.basis, s*n_head*layer.basis->nb[1], n_head*layer.basis->nb[1]);
    c.tensor(layer.least, s*layer.least->nb[1], n_head*sizeof(float));
    c.host(&layer.logit_error[s*n_head], n_head*sizeof(float));
    for (int64_t h = 0; h < n_head; ++h) {
        codes_of_head(c, layer, s*n_head + h, n_coded, n_kept);
    }
}

// Whether what kernels take for cells and bounds in the state of a layer can be that.
static bool layer_is_sound(const char * bytes, const llama_support_layer & layer, int32_t j1) {
    bytes += layer.queries->nb[2];
    if (!layer.codes) {
        return cells_at(bytes, layer.selected->nb[2]/sizeof(int32_t), j1);
    }
    bytes += sizeof(float) + layer.n_head_kv*layer.basis->nb[1];
    return all_at<float>(bytes, layer.n_head_kv, [](float x) { return std::isfinite(x); });
}

size_t llama_support::state_size(uint32_t s) const {
    const auto & st = streams[s];
    if (!st.valid || !st.mirror.known() || !st.mirror.in_order() || has_portable() || !params.selects() || params.policy == LLAMA_SUPPORT_ORACLE) {
        return 0;
    }
    return state_size_of(st.j1);
}

size_t llama_support::state_size_of(int32_t n_coded) const {
    cursor c = { cursor::COUNT, nullptr };
    c.skip(sizeof(state_head) + params.n_queries*sizeof(int32_t));
    for (const auto & layer : layers) {
        if (layer.queries) {
            layer_state(c, const_cast<llama_support_layer &>(layer), 0, n_coded, n_coded); // counting changes nothing
        }
    }
    return c.at;
}

void llama_support::get_state(uint32_t s, char * bytes) {
    const auto & st = streams[s];
    state_head head = { state_magic, state_version, params.policy, (int32_t) layers.size(), params.n_queries, params.n_sink, params.n_selected,
        params.tolerance, st.mirror.size(), st.j0, st.j1, st.span, st.n_fit, st.n_fit_queries, st.n_refresh };
    auto queries = st.mirror.query_positions();
    cursor c = { cursor::OUT, bytes };
    c.host(&head, sizeof(head));
    c.host(queries.data(), queries.size()*sizeof(int32_t));
    for (auto & layer : layers) {
        if (layer.queries) {
            layer_state(c, layer, s, st.j1, st.j1);
        }
    }
}

std::string llama_support::set_state(uint32_t s, const char * bytes, size_t size, int32_t n, int32_t & n_whole) {
    state_head head;
    if (size < sizeof(head)) {
        return "it ends too early";
    }
    memcpy(&head, bytes, sizeof(head));
    if (head.magic != state_magic || head.version != state_version) {
        return "another version of this library wrote it";
    }
    if (has_portable() || !params.selects() || head.policy != (int32_t) params.policy || head.n_layer != (int32_t) layers.size()
            || head.n_queries != params.n_queries || head.n_sink != params.n_sink || head.tolerance != params.tolerance
            || (params.policy == LLAMA_SUPPORT_FROZEN && head.n_selected != params.n_selected)) {
        return "it was made with other parameters";
    }
    if (head.n < n || head.j0 < 0 || head.j0 > head.j1 || head.j1 > head.n || head.span < 0 || head.n_fit < 0 || head.n_fit_queries < 0
            || head.n_refresh < 1 || size != state_size_of(head.j1)) {
        return "its lengths do not fit";
    }
    if (!cells_at(bytes + sizeof(head), params.n_queries, head.n)) {
        return "its numbers are none of a state";
    }
    std::vector<int32_t> queries(params.n_queries);
    memcpy(queries.data(), bytes + sizeof(head), queries.size()*sizeof(int32_t));
    llama_sequence st(params.n_queries);
    st.valid = true;
    st.j0 = head.j0;
    st.j1 = head.j1;
    st.n_fit = head.n_fit;
    st.n_fit_queries = head.n_fit_queries;
    st.n_refresh = head.n_refresh;
    st.span = std::max(0, head.span - (head.n - n));
    if (!cut_support(st, n)) {
        return "it is of a longer text than the one that is left of it";
    }
    const size_t begin = sizeof(head) + queries.size()*sizeof(int32_t);
    cursor look = { cursor::COUNT, nullptr, begin };
    for (auto & layer : layers) {
        if (layer.queries) {
            if (!layer_is_sound(bytes + look.at, layer, head.j1)) {
                return "its numbers are none of a state";
            }
            layer_state(look, layer, s, head.j1, head.j1);
        }
    }
    cursor c = { cursor::IN, const_cast<char *>(bytes), begin };
    for (auto & layer : layers) {
        if (layer.queries) {
            layer_state(c, layer, s, head.j1, st.j1);
        }
    }
    st.mirror.restore(n, std::move(queries));
    st.n_huge = streams[s].n_huge;
    streams[s] = std::move(st);
    n_whole = head.n;
    use_huge_pages(s);
    return "";
}
