// GGML_OP_SUPPORT_EVIDENCE, GGML_OP_SUPPORT_SELECT and GGML_OP_SUPPORT_STABILITY on CUDA: what a slow step needs to
// choose the support without the host.

#include "top-k.cuh"

#include <algorithm>

namespace sfi_cuda {

// ---- evidence ----------------------------------------------------------------------------------------------------------
//
//   pass 1  of every row (a query of a head) the softmax's maximum and sum, per chunk of cells
//   pass 2  merge the chunks
//   pass 3  the logits again, now as shares; their mean over the rows
//
// A tile of keys lies in shared memory, a lane has a cell, a warp some rows. Computing the logits twice costs less than
// keeping those of 64 queries.

constexpr int evidence_warps   = 4;
constexpr int evidence_threads = evidence_warps*warp_size;
constexpr int tile_cells       = warp_size;
constexpr int chunk_tiles      = 8;
constexpr int chunk_cells      = chunk_tiles*tile_cells;
constexpr int max_head_size    = 256;
constexpr int max_rows         = 512; // of a KV head
constexpr int rows_at_once     = 4;

struct evidence_args {
    const char * q, * k;
    const int32_t * cells, * plan;
    float * partials; // [n_head_kv, n_chunks, n_rows, 2]: maximum, sum
    float * lse;      // [n_head_kv, n_rows]
    float * out;
    int64_t q_nb1, q_nb2, k_nb1, k_nb2;
    int d, group, n_queries, n_rows, n_list, n_chunks, n_cells;
    float scale, softcap, alpha;
    bool  candidates_only;
};

struct evidence_tile {
    float k[max_head_size*(tile_cells + 1)]; // [d, cell]
    float rows[max_rows][2];
    float sums[evidence_warps][tile_cells];
};

template <ggml_type T>
static __device__ void load_keys(const evidence_args & a, int h_kv, int first, float * k) {
    const int parts = a.d/8;
    for (int j = threadIdx.x; j < tile_cells*parts; j += evidence_threads) {
        const int c = j/parts, i = j % parts;
        const int cell = first + c < a.n_list ? a.cells[first + c] : -1;
        octet<T> o;
        o.clear();
        if (cell >= 0 && cell < a.n_cells) {
            o.load(a.k + cell*a.k_nb1 + h_kv*a.k_nb2, i);
        }
        float x[8];
        o.get(x);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            k[(8*i + e)*(tile_cells + 1) + c] = o.scale()*x[e];
        }
    }
}

// logits of rows r0 .. r0 + rows_at_once - 1 with this lane's cell
static __device__ void tile_logits(const evidence_args & a, int h_kv, int r0, const float * k, float * x) {
    const int lane = threadIdx.x % warp_size;
    const float * q[rows_at_once];
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
        const int row = min(r0 + r, a.n_rows - 1);
        q[r] = (const float *) (a.q + (h_kv*a.group + row % a.group)*a.q_nb1 + (row/a.group)*a.q_nb2);
        x[r] = 0.0f;
    }
    for (int e = 0; e < a.d; e += 4) {
        float kk[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            kk[j] = k[(e + j)*(tile_cells + 1) + lane];
        }
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            const float4 qq = *(const float4 *) (q[r] + e);
            x[r] = fmaf(qq.x, kk[0], fmaf(qq.y, kk[1], fmaf(qq.z, kk[2], fmaf(qq.w, kk[3], x[r]))));
        }
    }
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
        x[r] = soft_capped(scale*x[r], a.softcap);
    }
}

static __device__ __forceinline__ int n_visible(const evidence_args & a, int row) {
    return row < a.n_rows ? a.plan[2 + row/a.group] : 0;
}

template <ggml_type T, bool shares>
static __global__ void __launch_bounds__(evidence_threads) evidence_kernel(const evidence_args a) {
    follow_previous();
    __shared__ evidence_tile tile;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size, chunk = blockIdx.x, h_kv = blockIdx.y;
    const int j0 = max(a.plan[0], 0), j1 = min(a.plan[1], a.n_list);

    for (int r = threadIdx.x; r < a.n_rows; r += evidence_threads) {
        tile.rows[r][0] = shares ? a.lse[(int64_t) h_kv*a.n_rows + r] : -INFINITY;
        tile.rows[r][1] = 0.0f;
    }
    int n_used = 0;
    for (int i = 0; i < a.n_queries; ++i) {
        n_used += a.plan[2 + i] > 0 ? a.group : 0;
    }
    for (int t = 0; t < chunk_tiles; ++t) {
        const int first = chunk*chunk_cells + t*tile_cells;
        if (first >= a.n_list) {
            break;
        }
        __syncthreads();
        load_keys<T>(a, h_kv, first, tile.k);
        __syncthreads();

        const int  j = first + lane;
        const int  cell = j < a.n_list ? a.cells[j] : -1;
        const bool is_candidate = cell >= 0 && j >= j0 && j < j1, counts = a.candidates_only ? is_candidate : cell >= 0;
        float mean = 0.0f;
        for (int r0 = warp*rows_at_once; r0 < a.n_rows; r0 += evidence_warps*rows_at_once) {
            float x[rows_at_once];
            tile_logits(a, h_kv, r0, tile.k, x);
#pragma unroll
            for (int r = 0; r < rows_at_once; ++r) {
                const int row = r0 + r, seen = n_visible(a, row);
                if (seen <= 0) { // the same for the whole warp
                    continue;
                }
                const float y = counts && j < seen ? x[r] : -INFINITY;
                if (shares) {
                    const float p = is_candidate ? weight_of(y, tile.rows[row][0]) : 0.0f;
                    mean += a.alpha == 1.0f ? p : p > 0.0f ? powf(p, a.alpha) : 0.0f;
                } else {
                    const float max = tile.rows[row][0], most = fmaxf(max, warp_max(y)), sum = warp_sum(weight_of(y, most));
                    __syncwarp();
                    if (lane == 0) {
                        tile.rows[row][0] = most;
                        tile.rows[row][1] = tile.rows[row][1]*weight_of(max, most) + sum;
                    }
                    __syncwarp();
                }
            }
        }
        if (shares) {
            tile.sums[warp][lane] = mean;
            __syncthreads();
            if (warp == 0 && j < a.n_list) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < evidence_warps; ++w) {
                    sum += tile.sums[w][lane];
                }
                a.out[(int64_t) h_kv*a.n_list + j] = n_used > 0 ? sum/n_used : 0.0f;
            }
        }
    }
    if (!shares) {
        __syncthreads();
        float * out = a.partials + ((int64_t) h_kv*a.n_chunks + chunk)*a.n_rows*2;
        for (int r = threadIdx.x; r < a.n_rows; r += evidence_threads) {
            out[2*r]     = tile.rows[r][0];
            out[2*r + 1] = tile.rows[r][1];
        }
    }
}

static __global__ void evidence_lse_kernel(const evidence_args a) {
    follow_previous();
    const int r = blockIdx.x*blockDim.x + threadIdx.x, h_kv = blockIdx.y;
    if (r >= a.n_rows) {
        return;
    }
    float max = -INFINITY, sum = 0.0f;
    for (int c = 0; c < a.n_chunks; ++c) {
        const float * p = a.partials + (((int64_t) h_kv*a.n_chunks + c)*a.n_rows + r)*2;
        const float most = fmaxf(max, p[0]);
        sum = sum*weight_of(max, most) + p[1]*weight_of(p[0], most);
        max = most;
    }
    // of a row that sees nothing no share is asked for
    a.lse[(int64_t) h_kv*a.n_rows + r] = sum > 0.0f ? max + logf(sum) : 0.0f;
}

bool support_evidence_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    return is_kv_type(k->type) && k->ne[0] % 16 == 0 && k->ne[0] % ggml_blck_size(k->type) == 0 && k->ne[0] <= max_head_size
        && has_aligned_rows(k) && q->nb[1] % 16 == 0 && q->nb[2] % 16 == 0 && evidence_rows(dst) <= max_rows && k->ne[2] <= 65535;
}

size_t support_evidence_scratch(const ggml_tensor * dst, int) {
    const int64_t chunks = n_chunks(dst->ne[0], chunk_cells);
    return dst->ne[1]*evidence_rows(dst)*(2*chunks + 1)*sizeof(float);
}

template <ggml_type T>
static void launch_evidence(const gpu & g, const evidence_args & a, int n_head_kv) {
    const dim3 grid(a.n_chunks, n_head_kv);
    SFI_LAUNCH((evidence_kernel<T, false>), grid, dim3(evidence_threads), g.stream, a);
    SFI_LAUNCH(evidence_lse_kernel, dim3((unsigned) n_chunks(a.n_rows, 64), n_head_kv), dim3(64), g.stream, a);
    SFI_LAUNCH((evidence_kernel<T, true>), grid, dim3(evidence_threads), g.stream, a);
}

void support_evidence(const gpu & g, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    const int n_head_kv = (int) dst->ne[1];
    evidence_args a = {};
    a.q = (const char *) q->data; a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2];
    a.k = (const char *) k->data; a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.cells = (const int32_t *) dst->src[2]->data;
    a.plan  = (const int32_t *) dst->src[3]->data;
    a.out   = (float *) dst->data;
    a.d         = (int) k->ne[0];
    a.n_cells   = (int) k->ne[1];
    a.group     = (int) (q->ne[1]/k->ne[2]);
    a.n_queries = (int) q->ne[2];
    a.n_rows    = (int) evidence_rows(dst);
    a.n_list    = (int) dst->ne[0];
    a.n_chunks  = (int) n_chunks(a.n_list, chunk_cells);
    a.lse       = (float *) g.scratch;
    a.partials  = a.lse + (int64_t) n_head_kv*a.n_rows;
    a.scale     = float_param(dst, 0);
    a.softcap   = float_param(dst, 1);
    a.alpha     = float_param(dst, 2);
    a.candidates_only = dst->op_params[3] == GGML_SUPPORT_SOFTMAX_CANDIDATES;
    with_kv_type(k->type, [&](auto type) { launch_evidence<decltype(type)::value>(g, a, n_head_kv); });
}

// ---- selection ---------------------------------------------------------------------------------------------------------
//
//   pass 1  keys of the pooled evidence, and how many there are of each leading digit
//   pass 2  list those whose digit is not below that of the last one selected: a few more than are selected
//   pass 3  a block for each KV head: the least rank among the best, and where each chunk writes
//   pass 4  the selected cells in position order

constexpr int select_threads = 256;
constexpr int select_warps   = select_threads/warp_size;
constexpr int select_items   = 4; // of a thread
constexpr int select_chunk   = select_items*select_threads;
constexpr int best_threads   = 512;

struct select_args {
    const float * evidence;
    const int32_t * cells, * plan;
    int32_t * selected;
    unsigned * digits;  // [n_head_kv, key_digits], zeros before and after
    uint32_t * keys;    // [n_head_kv, n_list]
    uint2 * listed;     // [n_head_kv, n_list]: key, place in the list of cells
    unsigned * n_listed;// [n_head_kv]
    uint64_t * best;    // [n_head_kv]
    int32_t * first;    // [n_head_kv, n_chunks]
    int64_t evidence_ld, selected_ld;
    int n_list, n_selected, n_chunks, behind, ahead;
};

// A candidate's key is that of the best evidence from pool_after before it to pool_before after it.
static __global__ void __launch_bounds__(select_threads) select_keys_kernel(const select_args a) {
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

static __global__ void __launch_bounds__(select_threads) select_list_kernel(const select_args a) {
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

static __global__ void __launch_bounds__(best_threads) select_best_kernel(const select_args a) {
    follow_previous();
    __shared__ best_shared sh;
    const int h_kv = blockIdx.x;
    choose_listed<best_threads>(a.listed + (int64_t) h_kv*a.n_list, (int) a.n_listed[h_kv], a.n_selected, a.digits + h_kv*key_digits,
            select_chunk, a.n_chunks, &a.best[h_kv], a.first + (int64_t) h_kv*a.n_chunks, a.selected + h_kv*a.selected_ld, sh);
}

static __global__ void __launch_bounds__(select_threads) select_write_kernel(const select_args a) {
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

bool support_select_supported(const ggml_tensor * dst) {
    return selector_of(dst).kind == GGML_SUPPORT_SELECTOR_TOPK && dst->ne[1]*key_digits <= n_counters
        && n_chunks(dst->src[0]->ne[0], select_chunk) <= max_chunks;
}

static size_t take_scratch(select_args & a, char * base, int n_head_kv) {
    scratch_parts parts { base };
    parts.take(a.keys,     (int64_t) n_head_kv*a.n_list);
    parts.take(a.listed,   (int64_t) n_head_kv*a.n_list);
    parts.take(a.n_listed, n_head_kv);
    parts.take(a.best,     n_head_kv);
    parts.take(a.first,    (int64_t) n_head_kv*a.n_chunks);
    return parts.used;
}

static select_args select_args_of(const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0];
    const ggml_support_selector s = selector_of(dst);
    select_args a = {};
    a.evidence    = (const float *) evidence->data;
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.cells       = (const int32_t *) dst->src[1]->data;
    a.plan        = (const int32_t *) dst->src[2]->data;
    a.selected    = (int32_t *) dst->data;
    a.selected_ld = dst->nb[1]/sizeof(int32_t);
    a.n_list      = (int) evidence->ne[0];
    a.n_selected  = (int) dst->ne[0];
    a.n_chunks    = (int) std::max<int64_t>(n_chunks(a.n_list, select_chunk), 1);
    a.behind      = s.pool_after;
    a.ahead       = s.pool_before;
    return a;
}

size_t support_select_scratch(const ggml_tensor * dst, int) {
    select_args a = select_args_of(dst);
    return take_scratch(a, nullptr, (int) dst->ne[1]);
}

void support_select(const gpu & g, ggml_tensor * dst) {
    const int n_head_kv = (int) dst->ne[1];
    select_args a = select_args_of(dst);
    take_scratch(a, g.scratch, n_head_kv);
    a.digits = g.counters;
    const dim3 grid(a.n_chunks, n_head_kv);
    SFI_LAUNCH(select_keys_kernel,  grid,            dim3(select_threads), g.stream, a);
    SFI_LAUNCH(select_list_kernel,  grid,            dim3(select_threads), g.stream, a);
    SFI_LAUNCH(select_best_kernel,  dim3(n_head_kv), dim3(best_threads),   g.stream, a);
    SFI_LAUNCH(select_write_kernel, grid,            dim3(select_threads), g.stream, a);
}

// ---- stability ---------------------------------------------------------------------------------------------------------
//
// A block has some of the candidates, and both sets in shared memory as bits, one for each cell; of a cache with more cells than
// there are bits, part after part.

constexpr int stability_threads = 512;
constexpr int stability_warps   = stability_threads/warp_size;
constexpr int stability_items   = 8;
constexpr int stability_chunk   = stability_items*stability_threads;
constexpr int part_words = 5*1024; // of a set
constexpr int part_cells = 32*part_words;

struct stability_args {
    const float * evidence;
    const int32_t * cells, * plan, * selected, * previous;
    float * partials; // [n_head_kv, n_chunks, 3]
    float * out;
    unsigned * counters;
    int64_t evidence_ld, selected_ld, previous_ld;
    int n_list, n_selected, n_previous, n_chunks;
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

static __device__ void load_sets(const stability_args & a, int h_kv, int first, cell_sets & sets) {
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

static __global__ void __launch_bounds__(stability_threads) stability_kernel(const stability_args a) {
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

bool support_stability_supported(const ggml_tensor * dst) {
    return dst->ne[1] <= n_counters;
}

size_t support_stability_scratch(const ggml_tensor * dst, int) {
    return 3*dst->ne[1]*(n_chunks(dst->src[0]->ne[0], stability_chunk) + 1)*sizeof(float);
}

void support_stability(const gpu & g, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    stability_args a = {};
    a.evidence    = (const float *) evidence->data;
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.cells       = (const int32_t *) dst->src[1]->data;
    a.plan        = (const int32_t *) dst->src[2]->data;
    a.selected    = (const int32_t *) selected->data;
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.n_selected  = (int) selected->ne[0];
    a.previous    = (const int32_t *) previous->data;
    a.previous_ld = previous->nb[1]/sizeof(int32_t);
    a.n_previous  = (int) previous->ne[0];
    a.partials    = (float *) g.scratch;
    a.out         = (float *) dst->data;
    a.counters    = g.counters;
    a.n_list      = (int) evidence->ne[0];
    a.n_chunks    = (int) std::max<int64_t>(n_chunks(a.n_list, stability_chunk), 1);
    SFI_LAUNCH(stability_kernel, dim3(a.n_chunks, (unsigned) dst->ne[1]), dim3(stability_threads), g.stream, a);
}

} // namespace sfi_cuda
