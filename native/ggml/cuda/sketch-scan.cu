// GGML_OP_SKETCH_SCAN on CUDA.
//
// The codes are read as they lie: a word of a plane of K has one byte for each of four components, which are multiplied
// by the query's whole numbers in one instruction (dp4a); a word of a plane of V has four cells of one component.
//
//   pass 1  the query in the basis of each head, as whole numbers
//   pass 2  logits of all cells; the softmax's maximum and sum per chunk of cells
//
// Where a sketch is looked at twice, sketch-looks.cu goes on from here. Else:
//
//   pass 3  scores, as keys; those that may be selected are listed
//   pass 4  the least rank among the best, and where each chunk writes its selected cells
//   pass 5  selected cells in order; what all others contribute, merged by the block that finishes last
//
// All passes are in one stream and none asks the host anything.

#include "sketch-scan.cuh"

namespace sfi_cuda {

constexpr int pass4_threads = 512;

// ---- pass 1: a block for each query head ----------------------------------------------------------------------------------

static __device__ __forceinline__ float4 floats_of(uint2 halves) {
    const float2 lo = f16x2_to_f32(halves.x), hi = f16x2_to_f32(halves.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

static __global__ void __launch_bounds__(scan_threads) scan_query_kernel(const scan_args a) {
    follow_previous();
    __shared__ float w[4*max_k_fields + 1]; // of each component; then that of the mean
    const int h = blockIdx.x, h_kv = h/a.group, lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    const float * q    = (const float *) (a.q + h*a.q_nb1);
    const float * mean = a.basis + (int64_t) h_kv*a.basis_size;
    const uint2 * dec  = (const uint2 *) (mean + (int64_t) (1 + a.n_k)*a.d_k); // of four values in F16

    constexpr int at_once = 12; // 88 components and the mean, by 8 warps
    for (int j0 = warp; j0 <= a.n_k; j0 += at_once*scan_warps) {
        float sum[at_once] = {};
        for (int e = 4*lane; e < a.d_k; e += 4*warp_size) {
            const float4 x = *(const float4 *) (q + e);
#pragma unroll
            for (int i = 0; i < at_once; ++i) {
                const int    j = j0 + i*scan_warps;
                const float4 y = j < a.n_k ? floats_of(dec[((int64_t) j*a.d_k + e)/4]) : *(const float4 *) (mean + e);
                sum[i] = fmaf(y.x, x.x, fmaf(y.y, x.y, fmaf(y.z, x.z, fmaf(y.w, x.w, sum[i]))));
            }
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const float all = warp_sum(sum[i]);
            if (lane == 0 && j0 + i*scan_warps <= a.n_k) {
                w[j0 + i*scan_warps] = all;
            }
        }
    }
    __syncthreads();
    if (warp > 0) {
        return;
    }
    float most = 0.0f;
    for (int j = lane; j < a.n_k; j += warp_size) {
        most = fmaxf(most, fabsf(w[j]));
    }
    const float s = warp_max(most)/127.0f;
    float centre = 0.0f, later = 0.0f; // of the sums of both looks, if every code were at its own
    for (int f = lane; f < a.n_k_fields; f += warp_size) {
        uint32_t word = 0;
        int      sum  = 0;
        for (int r = 0; r < 4; ++r) {
            const int whole = s > 0.0f ? (int) rintf(fminf(fmaxf(w[4*f + r]/s, -127.0f), 127.0f)) : 0;
            word |= (uint32_t) (whole & 255) << 8*r;
            sum  += whole;
        }
        a.weights[(int64_t) h*a.n_k_fields + f] = (int32_t) word;
        (f < a.n_first_fields ? centre : later) += 0.5f*(float) (sum*((1 << a.k[f].bits) - 1));
    }
    centre = warp_sum(centre);
    later  = warp_sum(later);
    if (lane == 0) {
        a.factor[3*h]     = a.scale*s;
        a.factor[3*h + 1] = a.scale*(w[a.n_k] - s*centre);
        a.factor[3*h + 2] = -a.scale*s*later;
        if (a.n_listed && h % a.group == 0) {
            a.n_listed[h_kv] = 0;
        }
    }
}

// ---- pass 2 ------------------------------------------------------------------------------------------------------------------

template <int G, int C>
static __global__ void __launch_bounds__(scan_threads) scan_logits_kernel(const scan_args a) {
    follow_previous();
    __shared__ field_weights<G> w[max_k_fields];
    __shared__ unsigned left_out[C*scan_threads/32]; // a bit for each cell of the chunk
    __shared__ float    warp_stats[scan_warps][G][2];
    const int chunk = blockIdx.x, h_kv = blockIdx.y, begin = chunk*C*scan_threads, n_used = min(a.plan[0], a.n_list);
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size, h0 = h_kv*a.group;

    // the words of the first planes are under way while the rest is prepared
    const uint8_t * head = a.codes + h_kv*a.head_bytes;
    const uint32_t * words[C];
    uint32_t word[4][C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int cell = min(begin + c*scan_threads + (int) threadIdx.x, a.n_list - 1);
        words[c] = (const uint32_t *) (head + (int64_t) (cell/16)*a.block_bytes) + cell % 16;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            word[p][c] = p < a.first_planes ? words[c][p*16] : 0;
        }
    }
    for (int i = threadIdx.x; i < a.n_first_fields*G; i += scan_threads) {
        const int f = i/G, g = i % G;
        w[f].of_head[g] = g < a.group ? a.weights[(int64_t) (h0 + g)*a.n_k_fields + f] : 0;
    }
    for (int i = threadIdx.x; i < C*scan_threads/32; i += scan_threads) {
        left_out[i] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.n_skip; i += scan_threads) {
        const int cell = a.skip[i], j = cell - begin;
        if (cell >= 0 && j >= 0 && j < C*scan_threads) {
            atomicOr(&left_out[j/32], 1u << j % 32);
        }
    }
    __syncthreads();

    int acc[C][G];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
            acc[c][g] = 0;
        }
    }
    for (int p0 = 0, f = 0; p0 < a.first_planes; p0 += 4) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            add_plane<G, C>(a, p0 + p, word[p], w, 0, a.n_first_fields, f, acc);
        }
        if (p0 + 4 < a.first_planes) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    word[p][c] = p0 + 4 + p < a.first_planes ? words[c][(p0 + 4 + p)*16] : 0;
                }
            }
        }
    }
    float max[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        max[g] = -INFINITY;
        sum[g] = 0.0f;
        if (g < a.group) {
            const float f = a.factor[3*(h0 + g)], o = a.factor[3*(h0 + g) + 1];
            float x[C];
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int  j = c*scan_threads + threadIdx.x, cell = begin + j;
                const bool out = cell >= n_used || (left_out[j/32] >> j % 32 & 1);
                const float y = a.softcap > 0.0f ? soft_capped((f*(float) acc[c][g] + o)/a.softcap, a.softcap) : fmaf(f, (float) acc[c][g], o);
                x[c] = out ? -INFINITY : y;
                if (cell < a.n_list) {
                    a.logits[(int64_t) (h0 + g)*a.n_list + cell] = x[c];
                }
                max[g] = fmaxf(max[g], x[c]);
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
                sum[g] += weight_of(x[c], max[g]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float most = warp_max(max[g]), all = warp_sum(sum[g]*weight_of(max[g], most));
        if (lane == 0) {
            warp_stats[warp][g][0] = most;
            warp_stats[warp][g][1] = all;
        }
    }
    __syncthreads();
    if ((int) threadIdx.x < a.group) {
        float most = -INFINITY, all = 0.0f;
        for (int i = 0; i < scan_warps; ++i) {
            const float m = fmaxf(most, warp_stats[i][threadIdx.x][0]);
            all  = all*weight_of(most, m) + warp_stats[i][threadIdx.x][1]*weight_of(warp_stats[i][threadIdx.x][0], m);
            most = m;
        }
        float * out = a.stats + ((int64_t) (h0 + threadIdx.x)*a.n_chunks + chunk)*2;
        out[0] = most;
        out[1] = all;
    }
}

// ---- pass 3 ------------------------------------------------------------------------------------------------------------------

template <int G, int C>
static __global__ void __launch_bounds__(scan_threads) scan_keys_kernel(const scan_args a) {
    follow_previous();
    __shared__ float lse[G];
    const int chunk = blockIdx.x, h_kv = blockIdx.y, begin = chunk*C*scan_threads;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size, h0 = h_kv*a.group;
    float x[C][G];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int cell = begin + c*scan_threads + threadIdx.x;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            x[c][g] = g < a.group && cell < a.n_list ? a.logits[(int64_t) (h0 + g)*a.n_list + cell] : -INFINITY;
        }
    }
    if (warp < a.group) {
        const float2 m = merge_stats(a, h0 + warp);
        if (lane == 0) {
            lse[warp] = m.y > 0.0f ? m.x + logf(m.y) : -INFINITY;
            if (chunk == 0) {
                a.total[2*(h0 + warp)]     = m.x;
                a.total[2*(h0 + warp) + 1] = lse[warp];
            }
        }
    }
    __syncthreads();
    const float least = a.least ? a.least[h_kv] : 0.0f;
    uint2 item[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int cell = begin + c*scan_threads + threadIdx.x;
        const uint32_t key = key_of_cell<G>(x[c], lse, a.group, least);
        if (key != 0) {
            atomicAdd(&a.digits[h_kv*key_digits + digit_of(key)], 1u);
        }
        if (cell < a.n_list) {
            a.keys[(int64_t) h_kv*a.n_list + cell] = key;
        }
        item[c] = make_uint2(key, cell);
    }
    append_listed<C>(item, a.listed + (int64_t) h_kv*a.n_list, &a.n_listed[h_kv], a.n_list);
}

// ---- pass 4: a block for each KV head ----------------------------------------------------------------------------------------

static __global__ void __launch_bounds__(pass4_threads) scan_best_kernel(const scan_args a) {
    follow_previous();
    __shared__ best_shared sh;
    const int h_kv = blockIdx.x;
    choose_listed<pass4_threads>(a.listed + (int64_t) h_kv*a.n_list, (int) a.n_listed[h_kv], a.n_selected, a.digits + h_kv*key_digits,
            a.chunk, a.n_chunks, &a.best[h_kv], a.first + (int64_t) h_kv*a.n_chunks, a.selected + h_kv*a.selected_ld, sh);
    if (threadIdx.x == 0) {
        a.counts[2*h_kv]     = min((int) a.n_listed[h_kv], a.n_selected);
        a.counts[2*h_kv + 1] = 0;
    }
}

// ---- pass 5 ------------------------------------------------------------------------------------------------------------------

// the last block of a KV head: from components back to values; z: [group, n_v + 2]
static __device__ void finish_tail(const scan_args & a, int h_kv, float * z) {
    const int size = a.n_v + 2, h0 = h_kv*a.group;
    for (int i = threadIdx.x; i < a.group*size; i += scan_threads) {
        const float * tails = a.tails + (int64_t) (h0 + i/size)*a.n_chunks*size + i % size;
        float sum = 0.0f;
#pragma unroll 16
        for (int c = 0; c < a.n_chunks; ++c) {
            sum += tails[(int64_t) c*size];
        }
        z[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.group*a.d_v; i += scan_threads) {
        const int     e = i % a.d_v, h = h0 + i/a.d_v;
        const float * x = z + (i/a.d_v)*size, weight = x[a.n_v];
        const float   share = x[a.n_v + 1]*weight_of(a.total[2*h], a.total[2*h + 1]);
        const bool    counts = weight > 0.0f && share >= least_tail_share;
        a.out[(int64_t) h*(a.d_v + 1) + e] = counts ? decoded_v(a, h_kv, x, 1.0f/weight, 1.0f, e) : 0.0f;
        if (e == 0) {
            a.out[(int64_t) h*(a.d_v + 1) + a.d_v] = counts ? a.total[2*h] + logf(x[a.n_v + 1]) : -INFINITY;
        }
    }
}

// Bytes of a warp's weights: the low and the high ones of 32 cells.
struct alignas(16) weight_bytes { uint8_t of_cell[warp_size]; };

template <int G, int V, int C>
static __global__ void __launch_bounds__(scan_threads) scan_tail_kernel(const scan_args a) {
    follow_previous();
    __shared__ weight_bytes bytes[scan_warps][G][2];
    __shared__ float        z[scan_warps][G][16*V + 2];
    __shared__ int          of_warp[C][scan_warps];
    const int chunk = blockIdx.x, h_kv = blockIdx.y, begin = chunk*C*scan_threads;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size, h0 = h_kv*a.group;
    const uint64_t  best = a.best[h_kv];
    const uint8_t * head = a.codes + h_kv*a.head_bytes;

    // which are selected, and their places
    bool  take[C];
    int   place[C];
    float x[C][G];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int cell = begin + c*scan_threads + threadIdx.x;
        take[c] = cell < a.n_list && is_best(a.keys[(int64_t) h_kv*a.n_list + cell], cell, best);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            x[c][g] = g < a.group && cell < a.n_list ? a.logits[(int64_t) (h0 + g)*a.n_list + cell] : -INFINITY;
        }
    }
    places_of<C, scan_warps>(take, a.first[(int64_t) h_kv*a.n_chunks + chunk], of_warp, place);
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (take[c]) {
            a.selected[h_kv*a.selected_ld + place[c]] = begin + c*scan_threads + threadIdx.x;
        }
    }

    float max[G], acc[V][G], weight[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        max[g] = g < a.group ? a.total[2*(h0 + g)] : -INFINITY;
        weight[g] = sum[g] = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            acc[v][g] = 0.0f;
        }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
        // a lane has a component of the cells of one block of codes
        const int  block = (begin + c*scan_threads + warp*warp_size)/16 + lane/16;
        const bool has_block = 16*block < a.n_list;
        const uint32_t * words = (const uint32_t *) (head + (int64_t) block*a.block_bytes) + lane % 16;
        uint32_t word[V][2];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            word[v][0] = has_block && v < a.n_v_groups ? words[a.v[v][0].plane*16] : 0;
            word[v][1] = has_block && v < a.n_v_groups ? words[a.v[v][2].plane*16] : 0;
        }
        // weights of those that are not selected, in 15 bits of the largest of the warp
        float unit[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float p    = take[c] ? 0.0f : weight_of(x[c][g], max[g]);
            const float most = warp_max(p);
            const int whole  = most > 0.0f ? (int) (p*(32767.0f/most) + 0.5f) : 0;
            unit[g] = most/32767.0f;
            sum[g] += p;
            weight[g] = fmaf(unit[g], (float) whole, weight[g]);
            bytes[warp][g][0].of_cell[lane] = (uint8_t) (whole & 255);
            bytes[warp][g][1].of_cell[lane] = (uint8_t) (whole >> 8);
        }
        __syncwarp();
        if (a.n_v_groups > 0) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const uint4 lo4 = ((const uint4 *) bytes[warp][g][0].of_cell)[lane/16], hi4 = ((const uint4 *) bytes[warp][g][1].of_cell)[lane/16];
                const uint32_t lo[4] = { lo4.x, lo4.y, lo4.z, lo4.w }, hi[4] = { hi4.x, hi4.y, hi4.z, hi4.w };
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    unsigned sum_lo = 0, sum_hi = 0;
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        const scan_field f = a.v[v][s];
                        const uint32_t codes = word[v][s/2] >> f.shift & ((1u << f.bits) - 1)*0x01010101u;
                        sum_lo = __dp4a(codes, lo[s], sum_lo);
                        sum_hi = __dp4a(codes, hi[s], sum_hi);
                    }
                    acc[v][g] = fmaf(unit[g], (float) (sum_lo + 256*sum_hi), acc[v][g]);
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float both = acc[v][g] + __shfl_xor_sync(all_lanes, acc[v][g], 16);
            if (lane < 16) {
                z[warp][g][16*v + lane] = both;
            }
        }
        weight[g] = warp_sum(weight[g]);
        sum[g]    = warp_sum(sum[g]);
        if (lane == 0) {
            z[warp][g][16*V]     = weight[g];
            z[warp][g][16*V + 1] = sum[g];
        }
    }
    __syncthreads();
    const int size = a.n_v + 2;
    for (int i = threadIdx.x; i < a.group*size; i += scan_threads) {
        const int g = i/size, j = i % size, from = j < a.n_v ? j : 16*V + j - a.n_v;
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < scan_warps; ++w) {
            all += z[w][g][from];
        }
        a.tails[((int64_t) (h0 + g)*a.n_chunks + chunk)*size + j] = all;
    }
    if (is_last_block(a.counters + h_kv, a.n_chunks)) {
        finish_tail(a, h_kv, &z[0][0][0]);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------------------

// cells of a thread in passes 2, 3 and 5: several share what a block prepares, one fills the card where there are few
static int cells_of_thread(int64_t n_list) {
    return n_list < 24*1024 ? 1 : 4;
}

static size_t take_scratch(scan_args & a, char * base, int n_head_kv) {
    scratch_parts parts { base };
    parts.take(a.weights, (int64_t) a.n_head*a.n_k_fields);
    parts.take(a.factor,  3*a.n_head);
    parts.take(a.logits,  (int64_t) a.n_head*a.n_list);
    parts.take(a.stats,   (int64_t) a.n_head*a.n_chunks*2);
    parts.take(a.listed,  (int64_t) n_head_kv*a.n_list);
    if (a.record_bytes > 0) {
        return take_looks_scratch(a, parts, n_head_kv);
    }
    parts.take(a.total,    2*a.n_head);
    parts.take(a.keys,     (int64_t) n_head_kv*a.n_list);
    parts.take(a.n_listed, n_head_kv);
    parts.take(a.best,     n_head_kv);
    parts.take(a.first,    (int64_t) n_head_kv*a.n_chunks);
    parts.take(a.tails,    (int64_t) a.n_head*a.n_chunks*(a.n_v + 2));
    return parts.used;
}

static scan_args args_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1], * basis = dst->src[2], * skip = dst->src[3], * selected = dst->src[6];
    const sfi::sketch_layout layout(dst);
    scan_args a = {};
    a.q           = (const char *) q->data;
    a.q_nb1       = q->nb[1];
    a.codes       = (const uint8_t *) codes->data;
    a.head_bytes  = codes->nb[2];
    a.basis       = (const float *) basis->data;
    a.basis_size  = (int) basis->ne[0];
    a.skip        = (const int32_t *) skip->data;
    a.n_skip      = (int) skip->ne[0];
    a.plan        = (const int32_t *) dst->src[4]->data;
    a.least       = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
    a.selected    = (int32_t *) selected->data;
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.n_selected  = (int) selected->ne[0];
    a.counts      = (int32_t *) dst->src[7]->data;
    a.out         = (float *) dst->data;
    a.d_k         = (int) q->ne[0];
    a.d_v         = (int) dst->ne[0] - 1;
    a.n_k         = layout.n_k;
    a.n_v         = layout.n_v;
    a.n_list      = (int) sfi::sketch_n_list(dst);
    a.n_head      = (int) q->ne[1];
    a.group       = (int) (q->ne[1]/codes->ne[2]);
    a.chunk       = scan_threads*cells_of_thread(a.n_list);
    a.n_chunks    = (int) n_chunks(a.n_list, a.chunk);
    a.block_bytes = (int) layout.block_bytes();
    a.record_bytes = layout.record_bytes;
    a.records_at  = codes->ne[1]*layout.block_bytes();
    a.k_planes    = layout.k_planes;
    a.first_planes = layout.first_planes;
    a.n_k_fields  = layout.n_k_fields;
    a.n_first_fields = layout.k_first[layout.first_planes];
    a.n_v_groups  = layout.n_v_groups;
    a.scale       = float_param(dst, 0);
    a.softcap     = float_param(dst, 1);
    a.second_look = sfi::sketch_second_look(dst);
    const auto field = [](const sfi::sketch_field & f) {
        return scan_field { (uint8_t) f.plane, (uint8_t) f.shift, (uint8_t) f.bits() };
    };
    for (int i = 0; i < a.n_k_fields && i < max_k_fields; ++i) {
        a.k[i] = field(layout.k[i]);
    }
    for (int i = 0; i < a.n_v_groups && i < max_v_groups; ++i) {
        for (int s = 0; s < 4; ++s) {
            a.v[i][s] = field(layout.v[i][s]);
        }
    }
    return a;
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    if (!sfi::sketch_layout::supported(dst)) {
        return false;
    }
    const scan_args a = args_of(dst);
    return a.group <= max_group && a.n_k_fields <= max_k_fields && a.n_v_groups <= max_v_groups && a.n_chunks <= max_chunks
        && dst->src[1]->ne[2]*(key_digits + 1) <= n_counters;
}

size_t sketch_scan_scratch(const ggml_tensor * dst, int) {
    scan_args a = args_of(dst);
    return take_scratch(a, nullptr, (int) dst->src[1]->ne[2]);
}

template <int G, int C>
static void launch_cells(const gpu & g, const scan_args & a, int n_head_kv) {
    const dim3 grid(a.n_chunks, n_head_kv), block(scan_threads);
    SFI_LAUNCH(scan_query_kernel, dim3(a.n_head), block, g.stream, a);
    SFI_LAUNCH((scan_logits_kernel<G, C>), grid, block, g.stream, a);
    if (a.record_bytes > 0) {
        look_again(g, a, n_head_kv);
        return;
    }
    SFI_LAUNCH((scan_keys_kernel<G, C>), grid, block, g.stream, a);
    SFI_LAUNCH(scan_best_kernel, dim3(n_head_kv), dim3(pass4_threads), g.stream, a);
    if (a.n_v_groups <= 2) {
        SFI_LAUNCH((scan_tail_kernel<G, 2, C>), grid, block, g.stream, a);
    } else {
        SFI_LAUNCH((scan_tail_kernel<G, max_v_groups, C>), grid, block, g.stream, a);
    }
}

template <int G>
static void launch_scan(const gpu & g, const scan_args & a, int n_head_kv) {
    if (a.chunk == scan_threads) {
        launch_cells<G, 1>(g, a, n_head_kv);
    } else {
        launch_cells<G, 4>(g, a, n_head_kv);
    }
}

void sketch_scan(const gpu & g, ggml_tensor * dst) {
    const int n_head_kv = (int) dst->src[1]->ne[2];
    scan_args a = args_of(dst);
    take_scratch(a, g.scratch, n_head_kv);
    a.counters = g.counters;
    a.digits   = g.counters + n_head_kv;
    with_group(a.group, [&](auto group) { launch_scan<decltype(group)::value>(g, a, n_head_kv); });
}

} // namespace sfi_cuda
