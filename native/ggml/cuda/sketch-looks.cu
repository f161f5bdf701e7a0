// GGML_OP_SKETCH_SCAN on CUDA with two looks: what follows the first look of sketch-scan.cu.
//
//   pass 3  per chunk: the cells whose share by the first look is large enough, close together and in their order; their logits
//           from all planes, the maximum and the sum of these, and the sums over V
//   pass 4  per KV head, one block: the selected cells, which are taken out of the sums again; decode once
//
// Of most cells nothing but the first look is ever read. Sums are made in an order that depends on nothing but the sizes.

#include "sketch-scan.cuh"

namespace sfi_cuda {

constexpr int   finish_threads = 512;
constexpr int   finish_warps   = finish_threads/warp_size;
constexpr int   chosen_cells     = 512; // selected cells whose weights lie in shared memory
constexpr int   cells_under_way = 8;  // whose codes of V a warp loads at a time
constexpr float least_unseen   = 1.0f/(1 << 19);

static __device__ __forceinline__ const uint8_t * record_of(const scan_args & a, int h_kv, int cell) {
    return a.codes + h_kv*a.head_bytes + a.records_at + (int64_t) cell*a.record_bytes;
}

// the word of a record with component j of V
static __device__ __forceinline__ uint32_t word_of_v(const scan_args & a, const uint8_t * record, int j) {
    const scan_field f = a.v[j/16][0];
    return ((const uint32_t *) record)[f.plane - a.first_planes + (f.bits == 4 ? j % 16/8 : 0)];
}

static __device__ __forceinline__ float code_of_v(const scan_args & a, uint32_t word, int j) {
    const int bits = a.v[j/16][0].bits;
    return (float) (word >> bits*(j % (32/bits)) & ((1u << bits) - 1));
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
    __device__ __forceinline__ void add(const scan_args & a, int h_kv, const int32_t * cells, const float * w, int ld, int first, int step, int n) {
        const int lane = threadIdx.x % warp_size;
        for (int i0 = first; i0 < n; i0 += cells_under_way*step) {
#pragma unroll
            for (int b = 0; b < V/2; ++b) {
                const int j = b*warp_size + lane;
                if (j >= a.n_v) {
                    continue;
                }
                uint32_t word[cells_under_way];
#pragma unroll
                for (int u = 0; u < cells_under_way; ++u) {
                    const int i = i0 + u*step;
                    word[u] = i < n ? word_of_v(a, record_of(a, h_kv, cells[i]), j) : 0;
                }
#pragma unroll
                for (int u = 0; u < cells_under_way; ++u) {
                    const int i = i0 + u*step;
                    if (i < n) {
                        const float code = code_of_v(a, word[u], j);
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
    float2  all[G]; // maximum and inverse sum of the first look
    float   tmp[scan_warps];
};

// the logits x of a cell by the first look become those by both
template <int G>
static __device__ __forceinline__ void look_at_record(const scan_args & a, const uint8_t * record, const field_weights<G> * w, int h0, float * x) {
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
static __global__ void __launch_bounds__(scan_threads) look_again_kernel(const scan_args a) {
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
        const float2 all = merge_stats(a, h0 + warp);
        if (lane == 0) {
            sh.all[warp] = make_float2(all.x, all.y > 0.0f ? 1.0f/all.y : 0.0f);
        }
    }
    __syncthreads();

    const float least = a.second_look/(float) min(max(a.plan[0], 1), sfi::sketch_mean_cells);
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
            share[g] = g < a.group ? weight_of(x[c][g], sh.all[g].x)*sh.all[g].y : 0.0f;
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
            float * out = a.again + ((int64_t) (h0 + g)*a.n_chunks + chunk)*3;
            out[0] = max[g];
            out[1] = sum[g];
            out[2] = kept[g];
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

// Of a head. Weights of cells that were looked at again are relative to exp(top), those of all others to exp(top_first).
struct head_sums { float top_first, others, top, weight, lse; };

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
static __device__ head_sums add_up(const scan_args & a, int h, const int * begin) {
    const int     lane  = threadIdx.x % warp_size;
    const float * again = a.again + (int64_t) h*a.n_chunks*3;
    const float2  first = merge_stats(a, h);
    float max = -INFINITY, sum = 0.0f, kept = 0.0f;
    for (int c = lane; c < a.n_chunks; c += warp_size) {
        if (begin[c + 1] > begin[c]) { // else nobody wrote anything
            const float most = fmaxf(max, again[3*c]);
            sum  = sum*weight_of(max, most) + again[3*c + 1]*weight_of(again[3*c], most);
            max  = most;
            kept += again[3*c + 2];
        }
    }
    head_sums s;
    s.top_first = first.x;
    s.top    = warp_max(max);
    s.weight = warp_sum(sum*weight_of(max, s.top));
    // a share that may be nothing but rounding errors counts for nothing, lest it outweigh cells that mattered less than the first look said
    const float unseen = 1.0f - warp_sum(kept);
    s.others = unseen > least_unseen ? unseen*first.y : 0.0f;
    const float top = fmaxf(s.top, s.top_first), all = s.weight*weight_of(s.top, top) + s.others*weight_of(s.top_first, top);
    s.lse = all > 0.0f ? top + logf(all) : -INFINITY;
    return s;
}

// The cells that were looked at again and may be selected, in their order: (key, where their logits lie). Returns how many.
template <int G>
static __device__ int list_best(const scan_args & a, int h_kv, const int * begin, const float * lse, uint2 * listed, int (*of_warp)[finish_warps]) {
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
static __device__ void add_values(const scan_args & a, int h_kv, finish_shared<G, V> & sh) {
    constexpr int slices = 4;
    const int n = a.group*a.n_v, h0 = h_kv*a.group;
    float * part = &sh.z[0][0][0]; // of each slice
    static_assert(slices*16*V <= finish_warps*warp_size, "room for the slices of all heads");
    for (int i = threadIdx.x; i < slices*n; i += finish_threads) {
        const int     g = i/slices/a.n_v, j = i/slices % a.n_v, slice = i % slices;
        const float * again  = a.again  + (int64_t) (h0 + g)*a.n_chunks*3;
        const float * values = a.values + (int64_t) (h0 + g)*a.n_chunks*a.n_v + j;
        float sum = 0.0f;
#pragma unroll 8
        for (int c = slice; c < a.n_chunks; c += slices) {
            if (sh.begin[c + 1] > sh.begin[c]) {
                sum = fmaf(weight_of(again[3*c], sh.sums[g].top), values[(int64_t) c*a.n_v], sum);
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
static __device__ void take_out(const scan_args & a, int h_kv, const uint2 * listed, int n, finish_shared<G, V> & sh) {
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
        if (threadIdx.x == 0) {
            sh.sums[g].weight -= all;
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

static __device__ void write_tail(const scan_args & a, int h_kv, int g, const head_sums & s, const float * v, int e) {
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
static __global__ void __launch_bounds__(finish_threads) finish_looks_kernel(const scan_args a) {
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

size_t take_looks_scratch(scan_args & a, scratch_parts & parts, int n_head_kv) {
    parts.take(a.cells,   (int64_t) n_head_kv*a.n_list);
    parts.take(a.n_again, (int64_t) n_head_kv*a.n_chunks);
    parts.take(a.again,   (int64_t) a.n_head*a.n_chunks*3);
    parts.take(a.values,  (int64_t) a.n_head*a.n_chunks*a.n_v);
    return parts.used;
}

template <int G, int V>
static void launch_looks(const gpu & g, const scan_args & a, int n_head_kv) {
    const dim3 grid(a.n_chunks, n_head_kv), block(scan_threads);
    if (a.chunk == scan_threads) {
        SFI_LAUNCH((look_again_kernel<G, V, 1>), grid, block, g.stream, a);
    } else {
        SFI_LAUNCH((look_again_kernel<G, V, 4>), grid, block, g.stream, a);
    }
    SFI_LAUNCH((finish_looks_kernel<G, V>), dim3(n_head_kv), dim3(finish_threads), g.stream, a);
}

void look_again(const gpu & g, const scan_args & a, int n_head_kv) {
    with_group(a.group, [&](auto group) {
        if (a.n_v_groups <= 2) {
            launch_looks<decltype(group)::value, 2>(g, a, n_head_kv);
        } else {
            launch_looks<decltype(group)::value, max_v_groups>(g, a, n_head_kv);
        }
    });
}

} // namespace sfi_cuda
