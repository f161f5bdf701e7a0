// SUPPORT_EVIDENCE on CUDA.
//
//   pass 1  of every row (a query of a head) the softmax's maximum and sum, per chunk of cells
//   pass 2  merge the chunks
//   pass 3  the logits again, now as shares; their mean over the rows
//
// A tile of keys lies in shared memory, a lane has a cell, a warp some rows. Computing the logits twice costs less than
// keeping those of 64 queries.

#include "gpu.cuh"

namespace sfi_cuda {

constexpr int evidence_warps   = 4;
constexpr int evidence_threads = evidence_warps*warp_size;
constexpr int tile_cells       = warp_size;
constexpr int chunk_tiles      = 8;
constexpr int chunk_cells      = chunk_tiles*tile_cells;
constexpr int rows_at_once     = 4;

struct evidence_task : evidence_args {
    const char * q, * k;
    const int32_t * cells, * plan;
    float * partials; // [n_head_kv, n_chunks, n_rows, 2]: maximum, sum
    float * lse;      // [n_head_kv, n_rows]
    float * out;
};

struct evidence_tile {
    float k[evidence_max_head_size*(tile_cells + 1)]; // [d, cell]
    float rows[evidence_max_rows][2];
    float sums[evidence_warps][tile_cells];
};

template <ggml_type T>
static __device__ void load_keys(const evidence_task & a, int h_kv, int first, float * k) {
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
static __device__ void tile_logits(const evidence_task & a, int h_kv, int r0, const float * k, float * x) {
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

static __device__ __forceinline__ int n_visible(const evidence_task & a, int row) {
    return row < a.n_rows ? a.plan[2 + row/a.group] : 0;
}

template <ggml_type T, bool shares>
static __global__ void __launch_bounds__(evidence_threads) evidence_kernel(const evidence_task a) {
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

static __global__ void evidence_lse_kernel(const evidence_task a) {
    follow_previous();
    const int r = blockIdx.x*blockDim.x + threadIdx.x, h_kv = blockIdx.y;
    if (r >= a.n_rows) {
        return;
    }
    softmax_sum all = no_cells();
    for (int c = 0; c < a.n_chunks; ++c) {
        const float * p = a.partials + (((int64_t) h_kv*a.n_chunks + c)*a.n_rows + r)*2;
        all = merge(all, { p[0], p[1] });
    }
    // of a row that sees nothing no share is asked for
    a.lse[(int64_t) h_kv*a.n_rows + r] = all.sum > 0.0f ? log_of(all) : 0.0f;
}

bool evidence_supported(const ggml_tensor * dst) {
    return evidence_supported_by_both(dst);
}

size_t evidence_scratch(const ggml_tensor * dst, int) {
    const int64_t chunks = n_chunks(dst->ne[0], chunk_cells);
    return dst->ne[1]*evidence_rows(dst)*(2*chunks + 1)*sizeof(float);
}

template <ggml_type T>
static void launch_evidence(const gpu & g, const evidence_task & a, int n_head_kv) {
    const dim3 grid(a.n_chunks, n_head_kv);
    SFI_LAUNCH((evidence_kernel<T, false>), grid, dim3(evidence_threads), g.stream, a);
    SFI_LAUNCH(evidence_lse_kernel, dim3((unsigned) n_chunks(a.n_rows, 64), n_head_kv), dim3(64), g.stream, a);
    SFI_LAUNCH((evidence_kernel<T, true>), grid, dim3(evidence_threads), g.stream, a);
}

void evidence(const gpu & g, const ggml_tensor * dst) {
    const int n_head_kv = (int) dst->ne[1];
    evidence_task a = {};
    static_cast<evidence_args &>(a) = evidence_args_of(dst, chunk_cells);
    a.q     = (const char *) dst->src[0]->data;
    a.k     = (const char *) dst->src[1]->data;
    a.cells = (const int32_t *) dst->src[2]->data;
    a.plan  = (const int32_t *) dst->src[3]->data;
    a.out   = (float *) dst->data;
    a.lse      = (float *) g.scratch;
    a.partials = a.lse + (int64_t) n_head_kv*a.n_rows;
    with_kv_type(dst->src[1]->type, [&](auto type) { launch_evidence<decltype(type)::value>(g, a, n_head_kv); });
}

} // namespace sfi_cuda
