// What steps read, in cells and bytes.

#include "llama-support.h"

#include "llama-model.h"

// sum of min(d, most) for d = 1 .. n
static int64_t sum_to(int64_t n, int64_t most) {
    const int64_t m = std::min(n, most);
    return m*(m + 1)/2 + (n - m)*most;
}

// What the other layers read for the last n of `depth` tokens, whatever the kind of step. Both caches have the same types.
int64_t llama_support::other_bytes(int64_t depth, int64_t n) const {
    int64_t size = 0;
    for (const llama_kv_cache * cache : { (const llama_kv_cache *) &core.kv, kv_swa }) {
        for (const uint32_t il : cache ? cache->get_layer_ids() : std::vector<uint32_t>()) {
            if (il < core.layers.size() && !(cache == &core.kv && is_sparse(il))) {
                const int64_t most = cache == kv_swa ? (int64_t) core.model.hparams.n_swa : INT32_MAX;
                size += (sum_to(depth, most) - sum_to(depth - n, most))*core.row_bytes(il, false);
            }
        }
    }
    return size;
}

int64_t llama_support::dense_bytes(int64_t depth, int64_t n) const {
    return (sum_to(depth, INT32_MAX) - sum_to(depth - n, INT32_MAX))*core.cell_bytes(false) + other_bytes(depth, n);
}

llama_support_report llama_support::report(uint32_t s, llama_support_kind kind, bool refresh, int32_t i, int32_t n) const {
    const auto & st = core.streams[s];
    const auto & policy = *policies.front();
    const int32_t depth = st.mirror.size() - (n - 1 - i);
    llama_support_report out;
    out.n_cells = depth;
    if (kind == LLAMA_SUPPORT_FAST) {
        const auto [first, second] = policy.window(st);
        out.n_cells = first + (depth - second);
    }
    out.kv_read = core.cell_bytes(false)*out.n_cells + other_bytes(depth, 1);
    if (kind == LLAMA_SUPPORT_FAST) {
        policy.report(s, i, n, out);
    }
    const bool again = std::any_of(policies.begin(), policies.end(), [&](const auto & p) { return p->reads_keys(kind, refresh); });
    out.kv_read += again ? core.cell_bytes(true)*depth : 0;
    return out;
}
