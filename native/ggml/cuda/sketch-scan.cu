// SKETCH_SCAN on CUDA.
//
// The codes are read as they lie: a word of a plane of K has one byte for each of four components, which are multiplied by the query's
// whole numbers in one instruction (dp4a).
//
//   pass 1  the query in the basis of each head, as whole numbers
//   pass 2  per chunk: logits of all cells from the first planes; their maximum and sum
//   pass 3  per chunk: the cells whose share by the first look is large enough, close together and in their order; their logits
//           from all planes, the maximum and the sum of these, and the sums over V
//   pass 4  per KV head, one block: the selected cells, which are taken out of the sums again; decode once
//
// All passes are in one stream and none asks the host anything. Of most cells nothing but the first look is ever read. Sums are made
// in an order that depends on nothing but the sizes.

#include "top-k.cuh"

namespace sfi_cuda {

constexpr int scan_threads    = 256; // where a chunk has as many cells at once
constexpr int scan_warps      = scan_threads/warp_size;
constexpr int finish_threads  = 512;
constexpr int finish_warps    = finish_threads/warp_size;
constexpr int chosen_cells    = 512; // selected cells whose weights lie in shared memory
constexpr int cells_under_way = 8;   // whose codes of V a warp loads at a time

struct scan_task : scan_args {
    const char * q;
    const uint8_t * codes;
    const float * basis, * least;
    const int32_t * skip, * plan;
    int32_t * selected, * counts;
    float * out;
    // scratch
    int32_t     * weights; // [n_head, n_k/4]: four whole numbers in a word
    float       * factor;  // [n_head, 3]: logit = factor*sum + offset; after the second look also what its sum lacks
    float       * logits;  // [n_head, n_list]
    softmax_sum * stats;   // [n_head, n_chunks]: of the first look
    uint2       * listed;  // [n_head_kv, n_list]: key, cell
    // of the cells of each chunk that are looked at again, one after the other where the chunk begins
    int32_t     * cells;   // [n_head_kv, n_list]; their logits replace those of the first look
    int32_t     * n_again; // [n_head_kv, n_chunks]
    softmax_sum * again;   // [n_head, n_chunks]
    float       * kept;    // [n_head, n_chunks]: their share by the first look
    float       * values;  // [n_head, n_chunks, n_v]: sum of their codes of V times exp(logit - maximum)
};

// f(std::integral_constant of the number of heads that kernels are made for)
template <class F>
static void with_group(int group, F f) {
    if (group <= 1) {
        f(std::integral_constant<int, 1>());
    } else if (group <= 2) {
        f(std::integral_constant<int, 2>());
    } else if (group <= 4) {
        f(std::integral_constant<int, 4>());
    } else {
        f(std::integral_constant<int, max_group>());
    }
}

template <int G> struct alignas(G < 4 ? 4*G : 16) field_weights { int32_t of_head[G]; };

// Adds codes times weights of the fields of a plane, f and those after it up to `last`, for C cells. w: of the fields from `first` on
template <int G, int C>
static __device__ __forceinline__ void add_plane(const scan_task & a, int plane, const uint32_t * word, const field_weights<G> * w,
        int first, int last, int & f, int (*acc)[G]) {
    for (; f < last && a.k[f].plane == plane; ++f) {
        const int      shift = a.k[f].shift;
        const uint32_t mask  = ((1u << a.k[f].bits) - 1)*0x01010101u;
        const field_weights<G> wf = w[f - first];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const int codes = (int) (word[c] >> shift & mask);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                acc[c][g] = __dp4a(codes, wf.of_head[g], acc[c][g]);
            }
        }
    }
}

// of head h by the first look, by one warp
static __device__ softmax_sum merge_stats(const scan_task & a, int h) {
    softmax_sum all = no_cells();
    for (int c = threadIdx.x % warp_size; c < a.n_chunks; c += warp_size) {
        all = merge(all, a.stats[(int64_t) h*a.n_chunks + c]);
    }
    return warp_merge(all);
}

// Scores as keys. Those that single precision can hardly tell from 0 are ranked by their logarithm instead, below all others.
constexpr float tiny_score = 1e-30f; // bits 0x0da24260
constexpr float log_of_tiny = 69.1f, largest_log = 1e4f, keys_per_nat = 2e4f;

static __device__ __forceinline__ uint32_t key_of_log(float log_score) {
    return 1 + (uint32_t) (keys_per_nat*fmaxf(log_score + log_of_tiny + largest_log, 0.0f));
}

// Of a cell with the logits x: 0 if it is left out, or its share is below `least` in every head of the group.
template <int G>
static __device__ __forceinline__ uint32_t key_of_cell(const float * x, const float * lse, int group, float least) {
    float score = 0.0f, most = 0.0f;
    bool  in = false;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < group) {
            const float share = weight_of(x[g], lse[g]);
            in    = in || x[g] > -INFINITY;
            score += share;
            most  = fmaxf(most, share);
        }
    }
    if (!in || !(most >= least)) { // nothing is, if `least` is no number
        return 0;
    }
    if (score >= tiny_score) {
        return __float_as_uint(score) + 1;
    }
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        top = g < group ? fmaxf(top, x[g] - lse[g]) : top;
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        sum += g < group ? expf(x[g] - lse[g] - top) : 0.0f;
    }
    return key_of_log(top + logf(sum));
}

static __device__ __forceinline__ float centre_of_v(const scan_task & a, int j) {
    return 0.5f*(float) ((1 << sketch_bits_v(a.format, j)) - 1);
}

// Value e of V with these components: what they are beside the mean, over `weight`
static __device__ __forceinline__ float decoded_v(const scan_task & a, int h_kv, const float * components, float scale, float centres, int e) {
    const float    * mean = a.basis + (int64_t) (h_kv + 1)*a.basis_size - sketch_half_size(a.n_v, a.d_v);
    const uint32_t * dec  = (const uint32_t *) (mean + sketch_dec_at(a.n_v, a.d_v)); // of two values in F16
    float y = mean[e];
#pragma unroll 16
    for (int j = 0; j < a.n_v; ++j) {
        const float2 pair = f16x2_to_f32(dec[((int64_t) j*a.d_v + e)/2]);
        y = fmaf(components[j]*scale - centres*centre_of_v(a, j), e % 2 ? pair.y : pair.x, y);
    }
    return y;
}

// ---- pass 1: a block for each query head ----------------------------------------------------------------------------------

static __device__ __forceinline__ float4 floats_of(uint2 halves) {
    const float2 lo = f16x2_to_f32(halves.x), hi = f16x2_to_f32(halves.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

// by its bits, which no fast math takes for granted
static __device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

static __global__ void __launch_bounds__(scan_threads) scan_query_kernel(const scan_task a) {
    follow_previous();
    __shared__ float w[4*max_k_fields + 1]; // of each component; then that of the mean
    const int h = blockIdx.x, h_kv = h/a.group, lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    const float * q    = (const float *) (a.q + h*a.q_nb1);
    const float * mean = a.basis + (int64_t) h_kv*a.basis_size;
    const uint2 * dec  = (const uint2 *) (mean + sketch_dec_at(a.n_k, a.d_k)); // of four values in F16

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
    bool  finite = true;
    for (int j = lane; j <= a.n_k; j += warp_size) {
        most   = fmaxf(most, j < a.n_k ? fabsf(w[j]) : 0.0f);
        finite = finite && is_finite(w[j]);
    }
    finite = !__any_sync(all_lanes, !finite);
    const float s = finite ? warp_max(most)/127.0f : 0.0f;
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
        a.factor[3*h + 1] = finite ? a.scale*(w[a.n_k] - s*centre) : -INFINITY; // then all cells are left out
        a.factor[3*h + 2] = -a.scale*s*later;
    }
}

// ---- pass 2 ------------------------------------------------------------------------------------------------------------------

template <int G, int C>
static __global__ void __launch_bounds__(scan_threads) scan_logits_kernel(const scan_task a) {
    follow_previous();
    __shared__ field_weights<G> w[max_k_fields];
    __shared__ unsigned left_out[C*scan_threads/32]; // a bit for each cell of the chunk
    __shared__ softmax_sum warp_stats[scan_warps][G];
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
        const softmax_sum all = warp_merge({ max[g], sum[g] });
        if (lane == 0) {
            warp_stats[warp][g] = all;
        }
    }
    __syncthreads();
    if ((int) threadIdx.x < a.group) {
        softmax_sum all = no_cells();
        for (int i = 0; i < scan_warps; ++i) {
            all = merge(all, warp_stats[i][threadIdx.x]);
        }
        a.stats[(int64_t) (h0 + threadIdx.x)*a.n_chunks + chunk] = all;
    }
}

static __device__ __forceinline__ const uint8_t * record_of(const scan_task & a, int h_kv, int cell) {
    return a.codes + h_kv*a.head_bytes + a.records_at + (int64_t) cell*a.record_bytes;
}

// Sums over V, for the components that the lanes of a warp have: lane + 32 b.
template <int G, int V>
struct value_sums {
    float of[V/2][G];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int b = 0; b < V/2; ++b) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                of[b][g] = 0.0f;
            }
        }
    }

    // the cells i = first, first + step ... below n, with the weights w[g*ld + i]
    __device__ __forceinline__ void add(const scan_task & a, int h_kv, const int32_t * cells, const float * w, int ld, int first, int step, int n) {
        const int lane = threadIdx.x % warp_size;
        for (int i0 = first; i0 < n; i0 += cells_under_way*step) {
#pragma unroll
            for (int b = 0; b < V/2; ++b) {
                const int j = b*warp_size + lane;
                if (j >= a.n_v) {
                    continue;
                }
                const int bit = 8*sketch_record_v(a.format) + sketch_bit_of_v(a.format, j); // of a record
                const unsigned mask = (1u << sketch_bits_v(a.format, j)) - 1;
                uint32_t word[cells_under_way];
#pragma unroll
                for (int u = 0; u < cells_under_way; ++u) {
                    const int i = i0 + u*step;
                    word[u] = i < n ? ((const uint32_t *) record_of(a, h_kv, cells[i]))[bit/32] : 0;
                }
#pragma unroll
                for (int u = 0; u < cells_under_way; ++u) {
                    const int i = i0 + u*step;
                    if (i < n) {
                        const float code = (float) (word[u] >> bit % 32 & mask);
#pragma unroll
                        for (int g = 0; g < G; ++g) {
                            of[b][g] = fmaf(w[g*ld + i], code, of[b][g]);
                        }
                    }
                }
            }
        }
    }
};

// ---- pass 3 ------------------------------------------------------------------------------------------------------------------

template <int G, int V, int C>
struct again_shared {
    field_weights<G> w[max_k_fields]; // of the fields that the first look left
    union {
        float x[G*C*scan_threads];    // logits, then weights, of the cells that are looked at again
        float z[scan_warps][G][16*V];
    };
    int32_t cells[C*scan_threads];
    int     of_warp[C][scan_warps];
    softmax_sum all[G]; // of the first look, the inverse of the sum
    float   tmp[scan_warps];
};

// the logits x of a cell by the first look become those by both
template <int G>
static __device__ __forceinline__ void look_at_record(const scan_task & a, const uint8_t * record, const field_weights<G> * w, int h0, float * x) {
    const uint32_t * words = (const uint32_t *) record;
    int acc[1][G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        acc[0][g] = 0;
    }
    for (int p0 = a.first_planes, f = a.n_first_fields; p0 < a.k_planes; p0 += 4) {
        uint32_t word[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            word[p] = p0 + p < a.k_planes ? words[p0 + p - a.first_planes] : 0;
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            add_plane<G, 1>(a, p0 + p, &word[p], w, a.n_first_fields, a.n_k_fields, f, acc);
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
            x[g] += fmaf(a.factor[3*(h0 + g)], (float) acc[0][g], a.factor[3*(h0 + g) + 2]);
        }
    }
}

template <int G, int V, int C>
static __global__ void __launch_bounds__(scan_threads) look_again_kernel(const scan_task a) {
    follow_previous();
    constexpr int ld = C*scan_threads;
    __shared__ again_shared<G, V, C> sh;
    const int chunk = blockIdx.x, h_kv = blockIdx.y, begin = chunk*ld, h0 = h_kv*a.group;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    float * logits = a.logits + (int64_t) h0*a.n_list + begin;

    float x[C][G];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int j = c*scan_threads + threadIdx.x;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            x[c][g] = g < a.group && begin + j < a.n_list ? logits[(int64_t) g*a.n_list + j] : -INFINITY;
        }
    }
    if (warp < a.group) {
        const softmax_sum all = merge_stats(a, h0 + warp);
        if (lane == 0) {
            sh.all[warp] = { all.max, all.sum > 0.0f ? 1.0f/all.sum : 0.0f };
        }
    }
    __syncthreads();

    const float least = a.second_look/(float) min(max(a.plan[0], 1), mean_cells);
    bool  take[C];
    int   place[C];
    float kept[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        kept[g] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
        float share[G], most = 0.0f;
        bool  in = false;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            share[g] = g < a.group ? weight_of(x[c][g], sh.all[g].max)*sh.all[g].sum : 0.0f;
            most = fmaxf(most, share[g]);
            in   = in || x[c][g] > -INFINITY;
        }
        take[c] = in && most >= least;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            kept[g] += take[c] ? share[g] : 0.0f;
        }
    }
    const int n = places_of<C, scan_warps>(take, 0, sh.of_warp, place);
    if (threadIdx.x == 0) {
        a.n_again[(int64_t) h_kv*a.n_chunks + chunk] = n;
    }
    if (n == 0) { // of the whole block
        return;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (take[c]) {
            sh.cells[place[c]] = begin + c*scan_threads + threadIdx.x;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                sh.x[g*ld + place[c]] = x[c][g];
            }
        }
    }
    for (int i = threadIdx.x; i < (a.n_k_fields - a.n_first_fields)*G; i += scan_threads) {
        const int f = a.n_first_fields + i/G, g = i % G;
        sh.w[i/G].of_head[g] = g < a.group ? a.weights[(int64_t) (h0 + g)*a.n_k_fields + f] : 0;
    }
    __syncthreads();

    float max[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        max[g] = -INFINITY;
        sum[g] = 0.0f;
    }
    for (int i = threadIdx.x; i < n; i += scan_threads) {
        const int cell = sh.cells[i];
        float y[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            y[g] = sh.x[g*ld + i];
        }
        look_at_record<G>(a, record_of(a, h_kv, cell), sh.w, h0, y);
        a.cells[(int64_t) h_kv*a.n_list + begin + i] = cell;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            if (g < a.group) {
                sh.x[g*ld + i] = logits[(int64_t) g*a.n_list + i] = y[g];
                max[g] = fmaxf(max[g], y[g]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        kept[g] = block_sum<scan_warps>(kept[g], sh.tmp);
        max[g]  = block_max<scan_warps>(max[g], sh.tmp);
    }
    for (int i = threadIdx.x; i < n; i += scan_threads) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float w = g < a.group ? weight_of(sh.x[g*ld + i], max[g]) : 0.0f;
            sh.x[g*ld + i] = w;
            sum[g] += w;
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        sum[g] = block_sum<scan_warps>(sum[g], sh.tmp);
        if ((int) threadIdx.x == g && g < a.group) {
            a.again[(int64_t) (h0 + g)*a.n_chunks + chunk] = { max[g], sum[g] };
            a.kept [(int64_t) (h0 + g)*a.n_chunks + chunk] = kept[g];
        }
    }
    if (a.n_v == 0) {
        return;
    }
    value_sums<G, V> v;
    v.clear();
    __syncthreads();
    v.add(a, h_kv, sh.cells, sh.x, ld, warp, scan_warps, n);
    __syncthreads(); // x and z share their place
#pragma unroll
    for (int b = 0; b < V/2; ++b) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
            sh.z[warp][g][b*warp_size + lane] = v.of[b][g];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.group*a.n_v; i += scan_threads) {
        const int g = i/a.n_v, j = i % a.n_v;
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < scan_warps; ++w) {
            all += sh.z[w][g][j];
        }
        a.values[((int64_t) (h0 + g)*a.n_chunks + chunk)*a.n_v + j] = all;
    }
}

// ---- pass 4: a block for each KV head ----------------------------------------------------------------------------------------

template <int G, int V>
struct finish_shared {
    int begin[max_chunks + 1]; // of the chunks' cells, counted through
    int of_warp[4][finish_warps];
    head_sums sums[G];
    float lse[G], tmp[finish_warps];
    float v[G][16*V];
    float z[finish_warps][G][warp_size];
    union {
        top_k_shared top;
        struct {
            float   w[G*chosen_cells];
            int32_t cells[chosen_cells];
        } tile;
    };
};

// begin[0 .. n_chunks]; one warp
static __device__ void count_through(const int32_t * n, int n_chunks, int * begin) {
    const int lane = threadIdx.x % warp_size;
    int before = 0;
    for (int c0 = 0; c0 < n_chunks; c0 += warp_size) {
        const int mine = c0 + lane < n_chunks ? n[c0 + lane] : 0, sum = warp_prefix_sum(mine);
        if (c0 + lane < n_chunks) {
            begin[c0 + lane] = before + sum - mine;
        }
        before += __shfl_sync(all_lanes, sum, warp_size - 1);
    }
    if (lane == 0) {
        begin[n_chunks] = before;
    }
}

// the last chunk with begin[chunk] <= i
static __device__ __forceinline__ int chunk_with(const int * begin, int n_chunks, int i) {
    int low = 0, high = n_chunks;
    while (high - low > 1) {
        const int middle = (low + high)/2;
        (begin[middle] <= i ? low : high) = middle;
    }
    return low;
}

// of head h, by one warp, which knows how many cells of each chunk were looked at again
static __device__ head_sums add_up(const scan_task & a, int h, const int * begin) {
    const softmax_sum first = merge_stats(a, h);
    softmax_sum all = no_cells();
    float kept = 0.0f;
    for (int c = threadIdx.x % warp_size; c < a.n_chunks; c += warp_size) {
        if (begin[c + 1] > begin[c]) { // else nobody wrote anything
            all   = merge(all, a.again[(int64_t) h*a.n_chunks + c]);
            kept += a.kept[(int64_t) h*a.n_chunks + c];
        }
    }
    all = warp_merge(all);
    // a share that may be nothing but rounding errors counts for nothing, lest it outweigh cells that mattered less than the first look said
    const float unseen = 1.0f - warp_sum(kept);
    const float others = unseen > least_unseen ? unseen*first.sum : 0.0f;
    return { first.max, others, all.max, all.sum, log_of(merge(all, { first.max, others })) };
}

// The cells that were looked at again and may be selected, in their order: (key, where their logits lie). Returns how many.
template <int G>
static __device__ int list_best(const scan_task & a, int h_kv, const int * begin, const float * lse, uint2 * listed, int (*of_warp)[finish_warps]) {
    constexpr int U = 4;
    const float least = a.least ? a.least[h_kv] : 0.0f;
    const float * logits = a.logits + (int64_t) h_kv*a.group*a.n_list;
    const int n = begin[a.n_chunks];
    int n_listed = 0;
    for (int i0 = 0; i0 < n; i0 += U*finish_threads) {
        float x[U][G];
        int   at[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = i0 + u*finish_threads + threadIdx.x, chunk = chunk_with(begin, a.n_chunks, min(i, n - 1));
            at[u] = chunk*a.chunk + i - begin[chunk];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                x[u][g] = i < n && g < a.group ? logits[(int64_t) g*a.n_list + at[u]] : -INFINITY;
            }
        }
        uint32_t key[U];
        bool     take[U];
        int      place[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            key[u]  = key_of_cell<G>(x[u], lse, a.group, least);
            take[u] = key[u] != 0;
        }
        n_listed = places_of<U, finish_warps>(take, n_listed, of_warp, place);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (take[u]) {
                listed[place[u]] = make_uint2(key[u], at[u]);
            }
        }
        __syncthreads(); // of_warp is read
    }
    return n_listed;
}

// Those of the listed that are among the best move to the front, in their order.
static __device__ void keep_best(uint2 * listed, int n, uint64_t best, int (*of_warp)[finish_warps]) {
    int n_kept = 0;
    for (int i0 = 0; i0 < n; i0 += finish_threads) {
        const int   i    = i0 + threadIdx.x;
        const uint2 item = i < n ? listed[i] : make_uint2(0, 0);
        const bool  take[1] = { is_best(item.x, item.y, best) };
        int place[1];
        n_kept = places_of<1, finish_warps>(take, n_kept, of_warp, place);
        if (take[0]) {
            listed[place[0]] = item;
        }
        __syncthreads();
    }
}

// the sums over V of all chunks
template <int G, int V>
static __device__ void add_values(const scan_task & a, int h_kv, finish_shared<G, V> & sh) {
    constexpr int slices = 4;
    const int n = a.group*a.n_v, h0 = h_kv*a.group;
    float * part = &sh.z[0][0][0]; // of each slice
    static_assert(slices*16*V <= finish_warps*warp_size, "room for the slices of all heads");
    for (int i = threadIdx.x; i < slices*n; i += finish_threads) {
        const int     g = i/slices/a.n_v, j = i/slices % a.n_v, slice = i % slices;
        const softmax_sum * again = a.again + (int64_t) (h0 + g)*a.n_chunks;
        const float * values = a.values + (int64_t) (h0 + g)*a.n_chunks*a.n_v + j;
        float sum = 0.0f;
#pragma unroll 8
        for (int c = slice; c < a.n_chunks; c += slices) {
            if (sh.begin[c + 1] > sh.begin[c]) {
                sum = fmaf(weight_of(again[c].max, sh.sums[g].top), values[(int64_t) c*a.n_v], sum);
            }
        }
        part[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += finish_threads) {
        sh.v[i/a.n_v][i % a.n_v] = part[slices*i] + part[slices*i + 1] + part[slices*i + 2] + part[slices*i + 3];
    }
    __syncthreads();
}

// What the n selected cells gave. Writes which they are.
template <int G, int V>
static __device__ void take_out(const scan_task & a, int h_kv, const uint2 * listed, int n, finish_shared<G, V> & sh) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    const int32_t * cells = a.cells + (int64_t) h_kv*a.n_list;
    const float * logits  = a.logits + (int64_t) h_kv*a.group*a.n_list;
    float weight[G];
    value_sums<G, V> v;
    v.clear();
#pragma unroll
    for (int g = 0; g < G; ++g) {
        weight[g] = 0.0f;
    }
    for (int i0 = 0; i0 < n; i0 += chosen_cells) {
        const int n_tile = min(n - i0, chosen_cells);
        __syncthreads();
        for (int i = threadIdx.x; i < n_tile; i += finish_threads) {
            const int at = (int) listed[i0 + i].y, cell = cells[at];
            sh.tile.cells[i] = a.selected[h_kv*a.selected_ld + i0 + i] = cell;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float w = g < a.group ? weight_of(logits[(int64_t) g*a.n_list + at], sh.sums[g].top) : 0.0f;
                sh.tile.w[g*chosen_cells + i] = w;
                weight[g] += w;
            }
        }
        __syncthreads();
        v.add(a, h_kv, sh.tile.cells, sh.tile.w, chosen_cells, warp, finish_warps, n_tile);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float all = block_sum<finish_warps>(weight[g], sh.tmp);
        if (threadIdx.x == 0) { // where nothing is left, rounding errors would be
            const bool none = n == sh.begin[a.n_chunks] && sh.sums[g].others == 0.0f;
            sh.sums[g].weight = none ? 0.0f : sh.sums[g].weight - all;
        }
    }
#pragma unroll
    for (int b = 0; b < V/2; ++b) {
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; ++g) {
            sh.z[warp][g][lane] = v.of[b][g];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < G*warp_size; i += finish_threads) {
            float all = 0.0f;
#pragma unroll
            for (int w = 0; w < finish_warps; ++w) {
                all += sh.z[w][i/warp_size][i % warp_size];
            }
            sh.v[i/warp_size][b*warp_size + i % warp_size] -= all;
        }
    }
    __syncthreads();
}

static __device__ void write_tail(const scan_task & a, int h_kv, int g, const head_sums & s, const float * v, int e) {
    float * out = a.out + (int64_t) (h_kv*a.group + g)*(a.d_v + 1);
    const float top = fmaxf(s.top, s.top_first), kept = fmaxf(s.weight, 0.0f);
    const float weight = kept*weight_of(s.top, top), others = s.others*weight_of(s.top_first, top);
    const bool  counts = weight + others > 0.0f && (weight + others)*weight_of(top, s.lse) >= least_tail_share;
    const float of_others = counts ? others/(weight + others) : 0.0f;
    const float known = counts && kept > 0.0f ? (1.0f - of_others*of_others)/kept : 0.0f;
    out[e] = counts ? decoded_v(a, h_kv, v, known, known*kept, e) : 0.0f;
    if (e == 0) {
        out[a.d_v] = counts ? top + logf(weight + others) : -INFINITY;
    }
}

template <int G, int V>
static __global__ void __launch_bounds__(finish_threads) finish_looks_kernel(const scan_task a) {
    follow_previous();
    __shared__ finish_shared<G, V> sh;
    const int h_kv = blockIdx.x, lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    uint2 * listed = a.listed + (int64_t) h_kv*a.n_list;
    if (warp == 0) {
        count_through(a.n_again + (int64_t) h_kv*a.n_chunks, a.n_chunks, sh.begin);
    }
    __syncthreads();
    if (warp < a.group) {
        const head_sums s = add_up(a, h_kv*a.group + warp, sh.begin);
        if (lane == 0) {
            sh.sums[warp] = s;
            sh.lse[warp]  = s.lse;
        }
    } else if (warp < G && lane == 0) {
        sh.sums[warp] = { -INFINITY, 0.0f, -INFINITY, 0.0f, -INFINITY };
    }
    __syncthreads();
    add_values(a, h_kv, sh);
    int n = list_best<G>(a, h_kv, sh.begin, sh.lse, listed, sh.of_warp);
    if (n > a.n_selected) {
        keep_best(listed, n, least_rank_of_best(listed, n, a.n_selected, sh.top), sh.of_warp);
        n = a.n_selected;
    }
    take_out(a, h_kv, listed, n, sh);
    for (int i = n + threadIdx.x; i < a.n_selected; i += finish_threads) {
        a.selected[h_kv*a.selected_ld + i] = -1;
    }
    if (threadIdx.x == 0) {
        a.counts[2*h_kv]     = n;
        a.counts[2*h_kv + 1] = sh.begin[a.n_chunks];
    }
    for (int i = threadIdx.x; i < a.group*a.d_v; i += finish_threads) {
        const int g = i/a.d_v;
        write_tail(a, h_kv, g, sh.sums[g], sh.v[g], i % a.d_v);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------------------

// cells of a chunk: a thread has several, which share what a block prepares, but where there are few one, which fills the card
static int chunk_of(const ggml_tensor * dst) {
    return scan_threads*(scan_list(dst) < 24*1024 ? 1 : 4);
}

static size_t take_scratch(scan_task & a, char * base) {
    const int64_t n_head_kv = a.n_head/a.group;
    scratch_parts parts { base };
    parts.take(a.weights, (int64_t) a.n_head*a.n_k_fields);
    parts.take(a.factor,  3*a.n_head);
    parts.take(a.logits,  (int64_t) a.n_head*a.n_list);
    parts.take(a.stats,   (int64_t) a.n_head*a.n_chunks);
    parts.take(a.listed,  n_head_kv*a.n_list);
    parts.take(a.cells,   n_head_kv*a.n_list);
    parts.take(a.n_again, n_head_kv*a.n_chunks);
    parts.take(a.again,   (int64_t) a.n_head*a.n_chunks);
    parts.take(a.kept,    (int64_t) a.n_head*a.n_chunks);
    parts.take(a.values,  (int64_t) a.n_head*a.n_chunks*a.n_v);
    return parts.used;
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    return scan_supported(dst, chunk_of(dst));
}

size_t sketch_scan_scratch(const ggml_tensor * dst, int) {
    scan_task a = {};
    static_cast<scan_args &>(a) = scan_args_of(dst, chunk_of(dst));
    return take_scratch(a, nullptr);
}

template <int G, int V, int C>
static void launch_scan(const gpu & g, const scan_task & a) {
    const int  n_head_kv = a.n_head/a.group;
    const dim3 grid(a.n_chunks, n_head_kv), block(scan_threads);
    SFI_LAUNCH(scan_query_kernel, dim3(a.n_head), block, g.stream, a);
    SFI_LAUNCH((scan_logits_kernel<G, C>), grid, block, g.stream, a);
    SFI_LAUNCH((look_again_kernel<G, V, C>), grid, block, g.stream, a);
    SFI_LAUNCH((finish_looks_kernel<G, V>), dim3(n_head_kv), dim3(finish_threads), g.stream, a);
}

void sketch_scan(const gpu & g, const ggml_tensor * dst) {
    scan_task a = {};
    static_cast<scan_args &>(a) = scan_args_of(dst, chunk_of(dst));
    a.q        = (const char *) dst->src[0]->data;
    a.codes    = (const uint8_t *) dst->src[1]->data;
    a.basis    = (const float *) dst->src[2]->data;
    a.skip     = (const int32_t *) dst->src[3]->data;
    a.plan     = (const int32_t *) dst->src[4]->data;
    a.least    = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
    a.selected = (int32_t *) dst->src[6]->data;
    a.counts   = (int32_t *) dst->src[7]->data;
    a.out      = (float *) dst->data;
    take_scratch(a, g.scratch);
    with_group(a.group, [&](auto group) {
        constexpr int G = decltype(group)::value;
        const bool few_values = a.n_v <= 32;
        if (a.chunk == scan_threads) {
            few_values ? launch_scan<G, 2, 1>(g, a) : launch_scan<G, max_v_groups, 1>(g, a);
        } else {
            few_values ? launch_scan<G, 2, 4>(g, a) : launch_scan<G, max_v_groups, 4>(g, a);
        }
    });
}

} // namespace sfi_cuda
