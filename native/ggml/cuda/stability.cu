// SUPPORT_STABILITY on CUDA.
//
// A block has some of the candidates, and both sets in shared memory as bits, one for each cell; of a cache with more cells than
// there are bits, part after part.

#include "gpu.cuh"

namespace sfi_cuda {

constexpr int stability_threads = 512;
constexpr int stability_warps   = stability_threads/warp_size;
constexpr int stability_items   = 8;
constexpr int stability_chunk   = stability_items*stability_threads;
constexpr int part_words = 5*1024; // of a set
constexpr int part_cells = 32*part_words;

struct stability_task : stability_args {
    const float * evidence;
    const int32_t * cells, * plan, * selected, * previous;
    float * partials; // [n_head_kv, n_chunks, 3]
    float * out;
    unsigned * counters;
    int n_chunks;
};

struct cell_sets {
    unsigned now[part_words], before[part_words]; // selected, previous
};

static __device__ __forceinline__ bool has_cell(const unsigned * set, int cell) {
    return (unsigned) cell < part_cells && (set[cell/32] >> cell % 32 & 1);
}

// the cells first .. first + part_cells - 1 of a list
static __device__ void add_cells(unsigned * set, const int32_t * cells, int n, int first) {
    for (int i = threadIdx.x; i < n; i += stability_threads) {
        const int cell = cells[i] - first;
        if (cells[i] >= first && cell < part_cells) {
            atomicOr(&set[cell/32], 1u << cell % 32);
        }
    }
}

static __device__ void load_sets(const stability_task & a, int h_kv, int first, cell_sets & sets) {
    __syncthreads();
    for (int i = threadIdx.x; i < part_words; i += stability_threads) {
        sets.now[i] = sets.before[i] = 0;
    }
    __syncthreads();
    add_cells(sets.now,    a.selected + h_kv*a.selected_ld, a.n_selected, first);
    add_cells(sets.before, a.previous + h_kv*a.previous_ld, a.n_previous, first);
    __syncthreads();
}

static __device__ int last_cell(const int32_t * cells, int n) {
    int last = -1;
    for (int i = threadIdx.x; i < n; i += stability_threads) {
        last = max(last, cells[i]);
    }
    return last;
}

static __global__ void __launch_bounds__(stability_threads) stability_kernel(const stability_task a) {
    follow_previous();
    __shared__ cell_sets sets;
    __shared__ float     tmp[stability_warps];
    const int h_kv = blockIdx.y, j0 = max(a.plan[0], 0), j1 = min(a.plan[1], a.n_list);

    int   cell[stability_items];
    float e[stability_items], all = 0.0f, now = 0.0f, before = 0.0f, common = 0.0f, either = 0.0f;
#pragma unroll
    for (int c = 0; c < stability_items; ++c) {
        const int j = blockIdx.x*stability_chunk + c*stability_threads + threadIdx.x;
        cell[c] = j >= j0 && j < j1 ? a.cells[j] : -1;
        e[c]    = cell[c] >= 0 ? a.evidence[h_kv*a.evidence_ld + j] : 0.0f;
        all    += e[c];
    }
    // cells have few enough digits for a float
    const int last = (int) block_max<stability_warps>((float) max(last_cell(a.selected + h_kv*a.selected_ld, a.n_selected),
            last_cell(a.previous + h_kv*a.previous_ld, a.n_previous)), tmp);
    for (int first = 0; first <= last; first += part_cells) {
        load_sets(a, h_kv, first, sets);
#pragma unroll
        for (int c = 0; c < stability_items; ++c) {
            now    += cell[c] >= 0 && has_cell(sets.now,    cell[c] - first) ? e[c] : 0.0f;
            before += cell[c] >= 0 && has_cell(sets.before, cell[c] - first) ? e[c] : 0.0f;
        }
        for (int i = threadIdx.x; i < part_words && blockIdx.x == 0; i += stability_threads) {
            common += (float) __popc(sets.now[i] & sets.before[i]);
            either += (float) __popc(sets.now[i] | sets.before[i]);
        }
    }
    float * sums[] = { &all, &now, &before, &common, &either };
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        *sums[i] = block_sum<stability_warps>(*sums[i], tmp);
    }
    if (threadIdx.x == 0) {
        float * partial = a.partials + ((int64_t) h_kv*a.n_chunks + blockIdx.x)*3;
        partial[0] = all;
        partial[1] = now;
        partial[2] = before;
        if (blockIdx.x == 0) {
            a.out[4*h_kv + 3] = either > 0.0f ? common/either : 1.0f;
        }
    }
    if (is_last_block(a.counters + h_kv, a.n_chunks) && threadIdx.x < 3) {
        float sum = 0.0f;
#pragma unroll 8
        for (int c = 0; c < a.n_chunks; ++c) {
            sum += a.partials[((int64_t) h_kv*a.n_chunks + c)*3 + threadIdx.x];
        }
        a.out[4*h_kv + threadIdx.x] = sum;
    }
}

bool stability_supported(const ggml_tensor * dst) {
    return dst->ne[1] <= n_counters;
}

size_t stability_scratch(const ggml_tensor * dst, int) {
    return 3*dst->ne[1]*(n_chunks(dst->src[0]->ne[0], stability_chunk) + 1)*sizeof(float);
}

void stability(const gpu & g, const ggml_tensor * dst) {
    stability_task a = {};
    static_cast<stability_args &>(a) = stability_args_of(dst);
    a.evidence = (const float *) dst->src[0]->data;
    a.cells    = (const int32_t *) dst->src[1]->data;
    a.plan     = (const int32_t *) dst->src[2]->data;
    a.selected = (const int32_t *) dst->src[3]->data;
    a.previous = (const int32_t *) dst->src[4]->data;
    a.partials = (float *) g.scratch;
    a.out      = (float *) dst->data;
    a.counters = g.counters;
    a.n_chunks = (int) std::max<int64_t>(n_chunks(a.n_list, stability_chunk), 1);
    SFI_LAUNCH(stability_kernel, dim3(a.n_chunks, (unsigned) dst->ne[1]), dim3(stability_threads), g.stream, a);
}

} // namespace sfi_cuda
