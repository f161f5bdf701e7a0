// What steps read, in cells and bytes.

#include "llama-support.h"

#include "llama-model.h"

#include <map>

// ---- K and V -----------------------------------------------------------------------------------------------------------

static int64_t row_bytes(const llama_kv_cache & kv, const llama_hparams & hparams, int32_t il, bool keys_only) {
    return ggml_row_size(kv.type_k(), hparams.n_embd_k_gqa(il)) + (keys_only ? 0 : ggml_row_size(kv.type_v(), hparams.n_embd_v_gqa(il)));
}

// Of one cell in the layers that a fast step makes sparse.
int64_t llama_support::cell_bytes(bool keys_only) const {
    int64_t size = 0;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        size += is_sparse(il) ? row_bytes(*kv, model.hparams, il, keys_only) : 0;
    }
    return size;
}

// sum of min(d, most) for d = 1 .. n
static int64_t sum_to(int64_t n, int64_t most) {
    const int64_t m = std::min(n, most);
    return m*(m + 1)/2 + (n - m)*most;
}

// What the other layers read for the last n of `depth` tokens, whatever the kind of step.
int64_t llama_support::other_bytes(int64_t depth, int64_t n) const {
    int64_t size = 0;
    for (const llama_kv_cache * cache : { (const llama_kv_cache *) kv, kv_swa }) {
        for (const uint32_t il : cache ? cache->get_layer_ids() : std::vector<uint32_t>()) {
            if (il < layers.size() && !(cache == kv && is_sparse(il))) {
                const int64_t most = cache == kv_swa ? (int64_t) model.hparams.n_swa : INT32_MAX;
                size += (sum_to(depth, most) - sum_to(depth - n, most))*row_bytes(*cache, model.hparams, il, false);
            }
        }
    }
    return size;
}

int64_t llama_support::dense_bytes(int64_t depth, int64_t n) const {
    return (sum_to(depth, INT32_MAX) - sum_to(depth - n, INT32_MAX))*cell_bytes(false) + other_bytes(depth, n);
}

// ---- the sketch --------------------------------------------------------------------------------------------------------

// What a step reads of a KV head's basis: means and decoding rows.
static int64_t decoding_bytes(const llama_support_layer & layer) {
    const auto & f = layer.format;
    return layer.n_embd_k*(4 + 2*(f.n_k4 + f.n_k2 + f.n_k1)) + layer.n_embd_v*(4 + 2*(f.n_v4 + f.n_v2));
}

// Of every cell that is scanned: the codes of the first look, or all if there is one look.
static int64_t first_bytes(const ggml_sketch_format & format) {
    return 4*format.n_first;
}

int64_t llama_support::sketch_bytes(uint32_t s) const {
    int64_t size = 0;
    for (const auto & layer : layers) {
        if (layer.codes) {
            size += layer.n_head_kv*(streams[s].mirror.n_used()*first_bytes(layer.format) + decoding_bytes(layer));
        }
    }
    return size;
}

// What a fast step left in the tensors that the layers of a device share. Each is read once, for a copy from a device takes
// tens of microseconds however small it is; in the host's memory they are looked at where they lie.
class step_results {
public:
    explicit step_results(uint32_t stream) : stream(stream) {}

    template <class T> const T * of(const ggml_tensor * t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return (const T *) ((const char *) t->data + stream*t->nb[2]);
        }
        auto & row = rows[t->view_src];
        if (row.empty()) {
            row.resize(t->view_src->nb[1]);
            ggml_backend_tensor_get(t->view_src, row.data(), stream*t->view_src->nb[1], row.size());
        }
        return (const T *) (row.data() + t->view_offs);
    }

private:
    uint32_t stream;
    std::map<const ggml_tensor *, std::vector<char>> rows;
};

float llama_support::tail_mass(uint32_t s, int32_t il, int32_t head) const {
    return step_results(s).of<float>(layers[il].mass)[2*head + 1]; // {log-sum-exp, share of the tail} of every head
}

// Adds what the sketch had the last fast step attend to and read, and what it stood in for.
void llama_support::report_sketch(uint32_t s, llama_support_report & out) const {
    step_results results(s);
    int64_t n_heads = 0, n_cells = 0, n_masses = 0;
    double mass = 0.0;
    for (size_t il = 0; il < layers.size(); ++il) {
        const auto & layer = layers[il];
        if (!layer.codes) {
            continue;
        }
        const int64_t exact_bytes = row_bytes(*kv, model.hparams, il, false)/layer.n_head_kv;
        const int64_t more_bytes  = ggml_sketch_cell_bytes(&layer.format) - 4*layer.format.n_first; // of a second look
        const int32_t * counts = results.of<int32_t>(layer.counts); // {attended, looked at again} of every KV head
        for (int64_t h = 0; h < layer.n_head_kv; ++h) {
            n_cells     += counts[2*h];
            out.kv_read += counts[2*h]*exact_bytes + counts[2*h + 1]*more_bytes;
        }
        n_heads += layer.n_head_kv;
        const float * masses = results.of<float>(layer.mass);
        for (int64_t h = 0; h < layer.mass->ne[1]; ++h, ++n_masses) {
            mass += masses[2*h + 1];
        }
    }
    out.kv_read += sketch_bytes(s);
    out.n_cells += n_heads ? (int32_t) ((n_cells + n_heads/2)/n_heads) : 0;
    out.tail_mass = n_masses ? (float) (mass/n_masses) : 0.0f;
}

// ---- a step ------------------------------------------------------------------------------------------------------------

llama_support_report llama_support::report(uint32_t s, llama_support_kind of, bool refreshed) const {
    const auto & st = streams[s];
    const int32_t depth = st.mirror.size();
    llama_support_report out;
    out.n_cells = depth;
    if (of == LLAMA_SUPPORT_FAST) {
        const auto [first, second] = window(st);
        const bool listed = params.policy == LLAMA_SUPPORT_FROZEN || params.policy == LLAMA_SUPPORT_ORACLE;
        out.n_cells = first + (depth - second) + (listed ? std::min(params.n_selected, second - first) : 0);
    }
    out.kv_read = cell_bytes(false)*out.n_cells + other_bytes(depth, 1);
    if (of == LLAMA_SUPPORT_FAST && scanned(s)) {
        report_sketch(s, out);
    }
    // evidence that reads the keys for itself: the oracle's, and of a refresh unless it is made while a native slow step attends
    const bool by_itself = of != LLAMA_SUPPORT_SLOW || params.selector.kind == GGML_SUPPORT_SELECTOR_PAPER || has_portable();
    if ((of == LLAMA_SUPPORT_FAST && params.policy == LLAMA_SUPPORT_ORACLE) || (refreshed && params.refreshes() && by_itself)) {
        out.kv_read += cell_bytes(true)*depth;
    }
    return out;
}
