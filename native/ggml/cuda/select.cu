// SUPPORT_SELECT on CUDA.
//
//   pass 1  keys of the pooled evidence, and how many there are of each leading digit
//   pass 2  list those whose digit is not below that of the last one selected: a few more than are selected
//   pass 3  a block for each KV head: the least rank among the best, and where each chunk writes
//   pass 4  the selected cells in position order

#include "top-k.cuh"

namespace sfi_cuda {

constexpr int select_threads = 256;
constexpr int select_warps   = select_threads/warp_size;
constexpr int select_items   = 4; // of a thread
constexpr int select_chunk   = select_items*select_threads;
constexpr int best_threads   = 512;

struct select_task : select_args {
    const float * evidence;
    const int32_t * cells, * plan;
    int32_t * selected;
    int n_chunks;
    unsigned * digits;  // [n_head_kv, key_digits], zeros before and after
    uint32_t * keys;    // [n_head_kv, n_list]
    uint2 * listed;     // [n_head_kv, n_list]: key, place in the list of cells
    unsigned * n_listed;// [n_head_kv]
    uint64_t * best;    // [n_head_kv]
    int32_t * first;    // [n_head_kv, n_chunks]
};

// A candidate's key is that of the best evidence from pool_after before it to pool_before after it.
static __global__ void __launch_bounds__(select_threads) select_keys_kernel(const select_task a) {
    follow_previous();
    __shared__ unsigned digits[key_digits];
    const int h_kv = blockIdx.y, j0 = max(a.plan[0], 0), j1 = min(a.plan[1], a.n_list);
    for (int i = threadIdx.x; i < key_digits; i += select_threads) {
        digits[i] = 0;
    }
    __syncthreads();
    const float * e = a.evidence + h_kv*a.evidence_ld;
    for (int c = 0; c < select_items; ++c) {
        const int j = blockIdx.x*select_chunk + c*select_threads + threadIdx.x;
        uint32_t key = 0;
        if (j >= j0 && j < j1 && a.cells[j] >= 0) {
            float best = e[j];
#pragma unroll 8
            for (int i = max(j - a.behind, j0), last = min(j + a.ahead, j1 - 1); i <= last; ++i) {
                best = fmaxf(best, e[i]);
            }
            key = sortable(best);
            atomicAdd(&digits[digit_of(key)], 1u);
        }
        if (j < a.n_list) {
            a.keys[(int64_t) h_kv*a.n_list + j] = key;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < key_digits; i += select_threads) {
        if (digits[i] > 0) {
            atomicAdd(&a.digits[h_kv*key_digits + i], digits[i]);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        a.n_listed[h_kv] = 0;
    }
}

static __global__ void __launch_bounds__(select_threads) select_list_kernel(const select_task a) {
    follow_previous();
    const int h_kv = blockIdx.y;
    const unsigned least = least_digit<select_threads>(a.digits + h_kv*key_digits, a.n_selected);
    uint2 item[select_items];
#pragma unroll
    for (int c = 0; c < select_items; ++c) {
        const int j = blockIdx.x*select_chunk + c*select_threads + threadIdx.x;
        const uint32_t key = j < a.n_list ? a.keys[(int64_t) h_kv*a.n_list + j] : 0;
        item[c] = make_uint2(digit_of(key) >= least ? key : 0, j);
    }
    append_listed<select_items>(item, a.listed + (int64_t) h_kv*a.n_list, &a.n_listed[h_kv], a.n_list);
}

static __global__ void __launch_bounds__(best_threads) select_best_kernel(const select_task a) {
    follow_previous();
    __shared__ best_shared sh;
    const int h_kv = blockIdx.x;
    choose_listed<best_threads>(a.listed + (int64_t) h_kv*a.n_list, (int) a.n_listed[h_kv], a.n_selected, a.digits + h_kv*key_digits,
            select_chunk, a.n_chunks, &a.best[h_kv], a.first + (int64_t) h_kv*a.n_chunks, a.selected + h_kv*a.selected_ld, sh);
}

static __global__ void __launch_bounds__(select_threads) select_write_kernel(const select_task a) {
    follow_previous();
    __shared__ int of_warp[select_items][select_warps];
    const int h_kv = blockIdx.y, begin = blockIdx.x*select_chunk;
    const uint64_t best = a.best[h_kv];
    bool take[select_items];
    int  place[select_items];
#pragma unroll
    for (int c = 0; c < select_items; ++c) {
        const int j = begin + c*select_threads + threadIdx.x;
        take[c] = j < a.n_list && is_best(a.keys[(int64_t) h_kv*a.n_list + j], j, best);
    }
    places_of<select_items, select_warps>(take, a.first[(int64_t) h_kv*a.n_chunks + blockIdx.x], of_warp, place);
#pragma unroll
    for (int c = 0; c < select_items; ++c) {
        if (take[c]) {
            a.selected[h_kv*a.selected_ld + place[c]] = a.cells[begin + c*select_threads + threadIdx.x];
        }
    }
}

bool select_supported(const ggml_tensor * dst) {
    return select_supported_by_both(dst) && dst->ne[1]*key_digits <= n_counters && n_chunks(dst->src[0]->ne[0], select_chunk) <= max_chunks;
}

static size_t take_scratch(select_task & a, char * base, int n_head_kv) {
    scratch_parts parts { base };
    parts.take(a.keys,     (int64_t) n_head_kv*a.n_list);
    parts.take(a.listed,   (int64_t) n_head_kv*a.n_list);
    parts.take(a.n_listed, n_head_kv);
    parts.take(a.best,     n_head_kv);
    parts.take(a.first,    (int64_t) n_head_kv*a.n_chunks);
    return parts.used;
}

static select_task select_task_of(const ggml_tensor * dst) {
    select_task a = {};
    static_cast<select_args &>(a) = select_args_of(dst);
    a.evidence = (const float *) dst->src[0]->data;
    a.cells    = (const int32_t *) dst->src[1]->data;
    a.plan     = (const int32_t *) dst->src[2]->data;
    a.selected = (int32_t *) dst->data;
    a.n_chunks = (int) std::max<int64_t>(n_chunks(a.n_list, select_chunk), 1);
    return a;
}

size_t select_scratch(const ggml_tensor * dst, int) {
    select_task a = select_task_of(dst);
    return take_scratch(a, nullptr, (int) dst->ne[1]);
}

void select(const gpu & g, const ggml_tensor * dst) {
    const int n_head_kv = (int) dst->ne[1];
    select_task a = select_task_of(dst);
    take_scratch(a, g.scratch, n_head_kv);
    a.digits = g.counters;
    const dim3 grid(a.n_chunks, n_head_kv);
    SFI_LAUNCH(select_keys_kernel,  grid,            dim3(select_threads), g.stream, a);
    SFI_LAUNCH(select_list_kernel,  grid,            dim3(select_threads), g.stream, a);
    SFI_LAUNCH(select_best_kernel,  dim3(n_head_kv), dim3(best_threads),   g.stream, a);
    SFI_LAUNCH(select_write_kernel, grid,            dim3(select_threads), g.stream, a);
}

} // namespace sfi_cuda
