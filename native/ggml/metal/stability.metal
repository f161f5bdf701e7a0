// SUPPORT_STABILITY on Metal.

#include "gpu.metal"

struct stability_shared {
    atomic_int slots[set_slots];
    float tmp[select_simds];
};

static inline int slot_of(int cell) {
    return (int) (((ulong) ((uint) cell*2654435761u)*set_slots) >> 32);
}

// a hash set of n <= set_cells cells
static inline void fill_set(threadgroup atomic_int * slots, device const int * cells, int n, int tid) {
    threadgroup_barrier(mem_flags::mem_threadgroup); // the set before may still be read
    for (int i = tid; i < set_slots; i += select_threads) {
        atomic_store_explicit(&slots[i], -1, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < n; i += select_threads) {
        const int cell = cells[i];
        int s = slot_of(cell);
        while (cell >= 0) {
            int found = -1;
            // weak: it may fail though the slot is free, and then found is -1
            if (atomic_compare_exchange_weak_explicit(&slots[s], &found, cell, memory_order_relaxed, memory_order_relaxed) || found == cell) {
                break;
            }
            s = found == -1 ? s : s + 1 < set_slots ? s + 1 : 0;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

static inline bool has_cell(threadgroup atomic_int * slots, int cell) {
    for (int s = slot_of(cell);; s = s + 1 < set_slots ? s + 1 : 0) {
        const int found = atomic_load_explicit(&slots[s], memory_order_relaxed);
        if (found == cell || found == -1) {
            return found == cell;
        }
    }
}

// the evidence on the candidates of a set
static inline float evidence_on(threadgroup atomic_int * slots, device const float * evidence, device const int * cells, int j0, int j1, int tid) {
    float sum = 0.0f;
    for (int j = j0 + tid; j < j1; j += select_threads) {
        sum += cells[j] >= 0 && has_cell(slots, cells[j]) ? evidence[j] : 0.0f;
    }
    return sum;
}

static inline float count_cells(device const int * cells, int n, int tid) {
    float count = 0.0f;
    for (int i = tid; i < n; i += select_threads) {
        count += cells[i] >= 0 ? 1.0f : 0.0f;
    }
    return count;
}

[[max_total_threads_per_threadgroup(select_threads)]] kernel void sfi_stability(
        constant stability_args & a       [[buffer(0)]],
        device const float * evidence_all [[buffer(1)]],
        device const int   * cells        [[buffer(2)]],
        device const int   * plan         [[buffer(3)]],
        device const int   * selected_all [[buffer(4)]],
        device const int   * previous_all [[buffer(5)]],
        device float       * out          [[buffer(6)]],
        SFI_POSITION) {
    SFI_SHARED(stability_shared, sh);
    const int h_kv = block.x, j0 = max(plan[0], 0), j1 = min(plan[1], a.n_list);
    device const float * evidence = evidence_all + h_kv*a.evidence_ld;
    device const int   * selected = selected_all + h_kv*a.selected_ld;
    device const int   * previous = previous_all + h_kv*a.previous_ld;

    float all = 0.0f, now = 0.0f, before = 0.0f, common = 0.0f;
    for (int j = j0 + tid; j < j1; j += select_threads) {
        all += cells[j] >= 0 ? evidence[j] : 0.0f;
    }
    for (int first = 0; first < a.n_selected; first += set_cells) {
        fill_set(sh.slots, selected + first, min(a.n_selected - first, set_cells), tid);
        now += evidence_on(sh.slots, evidence, cells, j0, j1, tid);
        for (int i = tid; i < a.n_previous; i += select_threads) {
            common += previous[i] >= 0 && has_cell(sh.slots, previous[i]) ? 1.0f : 0.0f;
        }
    }
    for (int first = 0; first < a.n_previous; first += set_cells) {
        fill_set(sh.slots, previous + first, min(a.n_previous - first, set_cells), tid);
        before += evidence_on(sh.slots, evidence, cells, j0, j1, tid);
    }
    all    = group_sum<select_simds>(all, sh.tmp, lane, sg);
    now    = group_sum<select_simds>(now, sh.tmp, lane, sg);
    before = group_sum<select_simds>(before, sh.tmp, lane, sg);
    common = group_sum<select_simds>(common, sh.tmp, lane, sg);
    const float n_now    = group_sum<select_simds>(count_cells(selected, a.n_selected, tid), sh.tmp, lane, sg);
    const float n_before = group_sum<select_simds>(count_cells(previous, a.n_previous, tid), sh.tmp, lane, sg);
    if (tid == 0) {
        const float either = n_now + n_before - common;
        out[4*h_kv]     = all;
        out[4*h_kv + 1] = now;
        out[4*h_kv + 2] = before;
        out[4*h_kv + 3] = either > 0.0f ? common/either : 1.0f;
    }
}

SFI_KERNEL(sfi_stability)
