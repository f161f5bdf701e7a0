// SUPPORT_SELECT on Metal.

#include "top-k.metal"

// Keys of the pooled evidence: of a candidate the best of those from pool_after before it to pool_before after it.
kernel void sfi_select_keys(
        constant select_args & a      [[buffer(0)]],
        device const float * evidence [[buffer(1)]],
        device const int   * cells    [[buffer(2)]],
        device const int   * plan     [[buffer(3)]],
        device uint        * keys     [[buffer(4)]],
        SFI_POSITION) {
    const int j = block.x*list_threads + tid, h_kv = block.y;
    if (j >= a.n_list) {
        return;
    }
    const int j0 = max(plan[0], 0), j1 = min(plan[1], a.n_list);
    uint key = 0;
    if (j >= j0 && j < j1 && cells[j] >= 0) {
        device const float * e = evidence + h_kv*a.evidence_ld;
        float best = e[j];
        for (int i = max(j - a.behind, j0), last = min(j + a.ahead, j1 - 1); i <= last; ++i) {
            best = max(best, e[i]);
        }
        key = sortable(best);
    }
    keys[(long) h_kv*a.n_list + j] = key;
}

struct keys_in_order {
    device const uint * keys;
    uint key(int i) const { return keys[i]; }
    uint number(int i) const { return (uint) i; }
};

struct select_shared {
    top_k_shared top_k;
    int of_simd[select_simds];
};

// The best of a KV head in position order, then pads.
[[max_total_threads_per_threadgroup(select_threads)]] kernel void sfi_select(
        constant select_args & a     [[buffer(0)]],
        device const uint * all_keys [[buffer(1)]],
        device const int  * cells    [[buffer(2)]],
        device int        * out_all  [[buffer(3)]],
        SFI_POSITION) {
    SFI_SHARED(select_shared, sh);
    const int h_kv = block.x;
    device const uint * keys = all_keys + (long) h_kv*a.n_list;
    device int        * out  = out_all + h_kv*a.selected_ld;
    const keys_in_order items = { keys };
    const ulong least = least_rank_of_best(a.n_list, (uint) a.n_selected, items, sh.top_k, select_threads, tid, lane, sg);
    int n = 0;
    for (int first = 0; first < a.n_list; first += select_threads) {
        const int  j = first + tid;
        const bool take = j < a.n_list && is_best(keys[j], (uint) j, least);
        const int  place = next_place<select_simds>(take, n, sh.of_simd, lane, sg);
        if (take) {
            out[place] = cells[j];
        }
    }
    for (int i = n + tid; i < a.n_selected; i += select_threads) {
        out[i] = -1;
    }
}

SFI_KERNEL(sfi_select_keys)
SFI_KERNEL(sfi_select)
