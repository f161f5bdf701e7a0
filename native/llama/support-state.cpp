// See support-state.h. What the layers of a policy keep, the policy says.

#include "support-state.h"

#include "llama-support.h"

void llama_state_cursor::host(void * p, size_t n) {
    if (what == OUT) {
        memcpy(bytes + at, p, n);
    } else if (what == IN) {
        memcpy(p, bytes + at, n);
    }
    at += n;
}

void llama_state_cursor::tensor(ggml_tensor * t, size_t offset, size_t n) {
    if (what == OUT) {
        ggml_backend_tensor_get(t, bytes + at, offset, n);
    } else if (what == IN) {
        ggml_backend_tensor_set(t, bytes + at, offset, n);
    }
    at += n;
}

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

// Whether these can be numbers of a sequence: steps count on from them.
bool is_sound(const state_head & head) {
    const auto within = [](int64_t x, int64_t least, int64_t most) { return least <= x && x <= most; };
    return within(head.n, 0, 1 << 28) && within(head.j0, 0, head.j1) && within(head.j1, 0, head.n) && within(head.span, 0, head.n)
        && within(head.n_fit, 0, 2*head.n) // a basis may be of twice as many as are left
        && within(head.n_fit_queries, 0, head.n_queries) && within(head.n_refresh, 1, INT64_MAX/2);
}

} // namespace

// Passes over the layers.
static void state_of_layers(llama_support_core & core, llama_state_cursor & c, uint32_t s, int32_t n_coded, int32_t n_kept) {
    for (int32_t il = 0; il < (int32_t) core.layers.size(); ++il) {
        const auto & layer = core.layers[il];
        if (layer.queries) {
            c.tensor(layer.queries, s*layer.queries->nb[2], layer.queries->nb[2]);
            layer.policy->state(c, s, il, n_coded, n_kept);
        }
    }
}

// Whether what kernels take for cells and bounds can be that.
static bool layers_are_sound(llama_support_core & core, const char * bytes, size_t at, int32_t n_coded) {
    llama_state_cursor c(llama_state_cursor::COUNT, nullptr, at);
    for (int32_t il = 0; il < (int32_t) core.layers.size(); ++il) {
        const auto & layer = core.layers[il];
        if (!layer.queries) {
            continue;
        }
        c.skip(layer.queries->nb[2]);
        if (!layer.policy->is_sound(bytes + c.at, il, n_coded)) {
            return false;
        }
        layer.policy->state(c, 0, il, n_coded, n_coded);
    }
    return true;
}

bool llama_support::keeps_state() const {
    return core.params.selects() && std::all_of(policies.begin(), policies.end(), [](const auto & p) { return p->keeps_state(); });
}

size_t llama_support::state_size(uint32_t s) {
    const auto & st = core.streams[s];
    return st.valid && st.mirror.known() && st.mirror.in_order() && keeps_state() ? state_size_of(st.j1) : 0;
}

size_t llama_support::state_size_of(int32_t n_coded) {
    llama_state_cursor c(llama_state_cursor::COUNT, nullptr, sizeof(state_head) + core.params.n_queries*sizeof(int32_t));
    state_of_layers(core, c, 0, n_coded, n_coded);
    return c.at;
}

void llama_support::get_state(uint32_t s, char * bytes) {
    const auto & st     = core.streams[s];
    const auto & params = core.params;
    state_head head = { state_magic, state_version, params.policy, (int32_t) core.layers.size(), params.n_queries, params.n_sink, params.n_selected,
        params.tolerance, st.mirror.size(), st.j0, st.j1, st.span, st.n_fit, st.n_fit_queries, st.n_refresh };
    auto queries = st.mirror.query_positions();
    llama_state_cursor c(llama_state_cursor::OUT, bytes);
    c.host(&head, sizeof(head));
    c.host(queries.data(), queries.size()*sizeof(int32_t));
    state_of_layers(core, c, s, st.j1, st.j1);
}

std::string llama_support::set_state(uint32_t s, const char * bytes, size_t size, int32_t n, int32_t & n_whole) {
    const auto & params = core.params;
    state_head head;
    if (size < sizeof(head)) {
        return "it ends too early";
    }
    memcpy(&head, bytes, sizeof(head));
    if (head.magic != state_magic || head.version != state_version) {
        return "another version of this library wrote it";
    }
    if (!keeps_state() || head.policy != (int32_t) params.policy || head.n_layer != (int32_t) core.layers.size()
            || head.n_queries != params.n_queries || head.n_sink != params.n_sink || head.tolerance != params.tolerance
            || (params.policy == LLAMA_SUPPORT_FROZEN && head.n_selected != params.n_selected)) {
        return "it was made with other parameters";
    }
    if (head.n < n || !is_sound(head) || size != state_size_of(head.j1)) {
        return "its lengths do not fit";
    }
    if (!llama_cells_at(bytes + sizeof(head), params.n_queries, head.n)) {
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
    if (!cut(st, n)) {
        return "it is of a longer text than the one that is left of it";
    }
    const size_t begin = sizeof(head) + queries.size()*sizeof(int32_t);
    if (!layers_are_sound(core, bytes, begin, head.j1)) {
        return "its numbers are none of a state";
    }
    llama_state_cursor c(llama_state_cursor::IN, const_cast<char *>(bytes), begin);
    state_of_layers(core, c, s, head.j1, st.j1);
    st.mirror.restore(n, std::move(queries));
    st.n_huge = core.streams[s].n_huge;
    core.streams[s] = std::move(st);
    n_whole = head.n;
    use_huge_pages(s);
    return "";
}
