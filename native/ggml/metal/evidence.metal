// SUPPORT_EVIDENCE on Metal.
//
//   pass 1  of every row (a query of a head) the softmax's maximum and sum, per chunk of cells
//   pass 2  merge the chunks
//   pass 3  the logits again, now as shares; their mean over the rows
//
// A tile of keys lies in threadgroup memory; a lane has a cell, half a simdgroup some rows. Computing the logits twice
// costs less than keeping those of 64 queries.

#include "gpu.metal"

template <int D>
struct evidence_shared {
    float k[D*(tile_cells + 1)]; // [d, cell]
    float rows[max_rows][2];
    float sums[2*evidence_simds][tile_cells];
};

template <typename T>
static inline void load_keys(constant evidence_args & a, device const char * k_rows, device const int * cells, int h_kv, int first,
        threadgroup float * k, int tid) {
    const int parts = a.d/8;
    for (int j = tid; j < tile_cells*parts; j += evidence_threads) {
        const int c = j/parts, i = j % parts;
        const int cell = first + c < a.n_list ? cells[first + c] : -1;
        T o;
        o.clear();
        if (cell >= 0 && cell < a.n_cells) {
            o.load(k_rows + cell*a.k_nb1 + h_kv*a.k_nb2, i);
        }
        float x[8];
        o.get(x);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            k[(8*i + e)*(tile_cells + 1) + c] = x[e];
        }
    }
}

// logits of rows r0 .. r0 + rows_at_once - 1 with cell c of the tile
static inline void tile_logits(constant evidence_args & a, device const char * q_rows, int h_kv, int r0, threadgroup const float * k, int c,
        thread float * x) {
    device const float * q[rows_at_once];
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
        const int row = min(r0 + r, a.n_rows - 1);
        q[r] = (device const float *) (q_rows + (h_kv*a.group + row % a.group)*a.q_nb1 + (row/a.group)*a.q_nb2);
        x[r] = 0.0f;
    }
    for (int e = 0; e < a.d; e += 4) {
        float kk[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            kk[j] = k[(e + j)*(tile_cells + 1) + c];
        }
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            const float4 qq = *(device const float4 *) (q[r] + e);
            x[r] = fma(qq.x, kk[0], fma(qq.y, kk[1], fma(qq.z, kk[2], fma(qq.w, kk[3], x[r]))));
        }
    }
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
        x[r] = soft_capped(scale*x[r], a.softcap);
    }
}

static inline float half_max(float x) {
#pragma unroll
    for (int o = tile_cells/2; o > 0; o >>= 1) {
        x = max(x, simd_shuffle_xor(x, (ushort) o));
    }
    return x;
}

static inline float half_sum(float x) {
#pragma unroll
    for (int o = tile_cells/2; o > 0; o >>= 1) {
        x += simd_shuffle_xor(x, (ushort) o);
    }
    return x;
}

// partials [n_head_kv, n_chunks, n_rows, 2]: maximum, sum; lse [n_head_kv, n_rows]
template <typename T, int D, bool shares>
[[max_total_threads_per_threadgroup(evidence_threads)]] kernel void sfi_evidence(
        constant evidence_args & a  [[buffer(0)]],
        device const char * q_rows  [[buffer(1)]],
        device const char * k_rows  [[buffer(2)]],
        device const int  * cells   [[buffer(3)]],
        device const int  * plan    [[buffer(4)]],
        device float      * partials [[buffer(5)]],
        device const float * lse    [[buffer(6)]],
        device float      * out     [[buffer(7)]],
        SFI_POSITION) {
    SFI_SHARED(evidence_shared<D>, tile);
    const int chunk = block.x, h_kv = block.y, c = lane % tile_cells, part = 2*sg + lane/tile_cells;
    const int j0 = max(plan[0], 0), j1 = min(plan[1], a.n_list);

    for (int r = tid; r < a.n_rows; r += evidence_threads) {
        tile.rows[r][0] = shares ? lse[(long) h_kv*a.n_rows + r] : no_logit;
        tile.rows[r][1] = 0.0f;
    }
    int n_used = 0;
    for (int i = 0; i < a.n_queries; ++i) {
        n_used += plan[2 + i] > 0 ? a.group : 0;
    }
    for (int first = chunk*chunk_cells; first < min((chunk + 1)*chunk_cells, a.n_list); first += tile_cells) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_keys<T>(a, k_rows, cells, h_kv, first, tile.k, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);

        const int  j = first + c;
        const int  cell = j < a.n_list ? cells[j] : -1;
        const bool is_candidate = cell >= 0 && j >= j0 && j < j1, counts = a.candidates_only ? is_candidate : cell >= 0;
        float mean = 0.0f;
        // both halves of a simdgroup turn equally often, for they exchange values
        for (int first_row = 0; first_row < a.n_rows; first_row += 2*evidence_simds*rows_at_once) {
            const int r0 = first_row + part*rows_at_once;
            float x[rows_at_once];
            tile_logits(a, q_rows, h_kv, r0, tile.k, c, x);
#pragma unroll
            for (int r = 0; r < rows_at_once; ++r) {
                const int   row = r0 + r, seen = row < a.n_rows ? plan[2 + row/a.group] : 0;
                const float y   = counts && j < seen ? x[r] : no_logit;
                if (shares) {
                    const float p = is_candidate && seen > 0 ? weight_of(y, tile.rows[row][0]) : 0.0f;
                    mean += a.alpha == 1.0f ? p : p > 0.0f ? powr(p, a.alpha) : 0.0f;
                } else {
                    const float before = seen > 0 ? tile.rows[row][0] : no_logit, now = max(before, half_max(y));
                    const float sum    = half_sum(weight_of(y, now));
                    simdgroup_barrier(mem_flags::mem_threadgroup); // all have read; nobody reads again before the next tile
                    if (c == 0 && seen > 0) {
                        tile.rows[row][0] = now;
                        tile.rows[row][1] = tile.rows[row][1]*weight_of(before, now) + sum;
                    }
                }
            }
        }
        if (shares) {
            tile.sums[part][c] = mean;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (part == 0 && j < a.n_list) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 2*evidence_simds; ++i) {
                    sum += tile.sums[i][c];
                }
                out[(long) h_kv*a.n_list + j] = n_used > 0 ? sum/n_used : 0.0f;
            }
        }
    }
    if (!shares) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        device float * mine = partials + ((long) h_kv*a.n_chunks + chunk)*a.n_rows*2;
        for (int r = tid; r < a.n_rows; r += evidence_threads) {
            mine[2*r]     = tile.rows[r][0];
            mine[2*r + 1] = tile.rows[r][1];
        }
    }
}

kernel void sfi_evidence_lse(
        constant evidence_args & a    [[buffer(0)]],
        device const float * partials [[buffer(1)]],
        device float       * lse      [[buffer(2)]],
        SFI_POSITION) {
    const int r = block.x*lse_threads + tid, h_kv = block.y;
    if (r >= a.n_rows) {
        return;
    }
    softmax_sum all = no_cells();
    for (int c = 0; c < a.n_chunks; ++c) {
        device const float * p = partials + (((long) h_kv*a.n_chunks + c)*a.n_rows + r)*2;
        all = merge(all, sum_of(p[0], p[1]));
    }
    // of a row that sees nothing no share is asked for
    lse[(long) h_kv*a.n_rows + r] = all.sum > 0.0f ? log_of(all) : 0.0f;
}

#define SFI_EVIDENCE(type, D) \
    SFI_KERNEL_AS("sfi_evidence_" #type "_" #D "_stats",  sfi_evidence<octet_##type, D, false>) \
    SFI_KERNEL_AS("sfi_evidence_" #type "_" #D "_shares", sfi_evidence<octet_##type, D, true>)

SFI_KERNEL(sfi_evidence_lse)
SFI_EVIDENCE(f16, 128)
SFI_EVIDENCE(f16, 256)
SFI_EVIDENCE(bf16, 128)
SFI_EVIDENCE(bf16, 256)
SFI_EVIDENCE(q8_0, 128)
SFI_EVIDENCE(q8_0, 256)
SFI_EVIDENCE(q4_0, 128)
SFI_EVIDENCE(q4_0, 256)
