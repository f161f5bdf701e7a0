// SPARSE_ATTN on CUDA.
//
// The support is split over blocks so that one token fills the card. A few lanes share a row, eight values each; a warp
// takes several rows at once, for the whole GQA group, so that every row is read once. While it computes with some rows
// it loads their V, the K of the next ones and the cells of those after them. No barrier until a block is done: each row
// group has its own online softmax.
//
//   pass 1  load the cells of the list, their first keys, and the query
//   pass 2  logits of the group. Summing over the lanes also deals them out: each lane ends with those of one row
//   pass 3  online softmax, a lane its own logits; then all lanes accumulate V with the weights of all
//   pass 4  merge the row groups of a warp, then the warps of a block
//   pass 5  the block that finishes last merges the splits, the tail and the learned sink

#include "gpu.cuh"

namespace sfi_cuda {

constexpr int attn_warps   = 4;
constexpr int attn_threads = attn_warps*warp_size;
constexpr int max_splits   = 64;

struct attn : attn_args {
    const char * q, * k, * v;
    const int32_t * always, * selected, * visible;
    const float * tail, * sinks;
    float * out, * mass;
    float * partials;  // [n_stream, n_tokens, n_head, n_split, D]: output
    float * stats;     // [n_stream, n_tokens, n_head, n_split, 2]: maximum, sum
    float * logits;    // [n_head, n_always], with evidence
    float * cells_lse; // [n_head], with evidence
    unsigned * counters;
};

static __device__ __forceinline__ int cell_at(const attn & a, const int32_t * always, const int32_t * selected, int seen, int p) {
    int cell = -1;
    if (p < a.n_always) {
        cell = p < seen ? always[p] : -1;
    } else if (p < a.n_always + a.n_selected) {
        cell = selected[p - a.n_always];
    }
    return cell < a.n_cells ? cell : -1;
}

// What the splits of the heads of a block, the tail and the sink weigh in the end; a warp for each head.
struct merge_weights {
    float split[8][max_splits];
    float tail[8];
};

// pass 5, for the heads [h0, h0 + n_heads) of a token. The partials of the first splits are on their way while their weights are made.
template <int D>
static __device__ void merge_splits(const attn & a, int s, int t, int h0, int n_heads, merge_weights & w) {
    constexpr int early = 16;
    const int     lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    const int64_t token = (int64_t) s*a.n_tokens + t;
    const float * stats    = a.stats    + (token*a.n_head + h0)*a.n_split*2;
    const float * partials = a.partials + (token*a.n_head + h0)*a.n_split*D;
    const auto partial_at = [&](int j, int i) {
        return *(const float4 *) (partials + ((int64_t) (j/(D/4))*a.n_split + i)*D + j % (D/4)*4);
    };

    float4 first[early];
#pragma unroll
    for (int i = 0; i < early; ++i) {
        first[i] = i < a.n_split && (int) threadIdx.x < n_heads*D/4 ? partial_at(threadIdx.x, i) : make_float4(0, 0, 0, 0);
    }
    for (int g = warp; g < n_heads; g += attn_warps) {
        constexpr int turns = max_splits/warp_size;
        const int     h = h0 + g;
        const float   tail_lse = a.tail ? a.tail[s*a.tail_s + t*a.tail_t + h*a.tail_h + D] : -INFINITY;
        const float   sink     = a.sinks ? a.sinks[h] : -INFINITY;

        float max[turns], sum[turns], most = fmaxf(tail_lse, sink);
#pragma unroll
        for (int j = 0; j < turns; ++j) {
            const int     i = j*warp_size + lane;
            const float * p = stats + (g*a.n_split + i)*2;
            max[j] = i < a.n_split ? p[0] : -INFINITY;
            sum[j] = i < a.n_split ? p[1] : 0.0f;
            most = fmaxf(most, max[j]);
        }
        most = warp_max(most);
        float cells = 0.0f;
#pragma unroll
        for (int j = 0; j < turns; ++j) {
            max[j] = weight_of(max[j], most);
            cells += max[j]*sum[j];
        }
        cells = warp_sum(cells);
        const float w_tail = weight_of(tail_lse, most), all = cells + w_tail + weight_of(sink, most);
        const float scale  = all > 0.0f ? 1.0f/all : 0.0f;
#pragma unroll
        for (int j = 0; j < turns; ++j) {
            w.split[g][j*warp_size + lane] = max[j]*scale;
        }
        if (lane == 0) {
            w.tail[g] = w_tail*scale;
            if (a.mass) {
                a.mass[2*h]     = all > 0.0f ? most + logf(all) : -INFINITY;
                a.mass[2*h + 1] = w_tail*scale;
            }
            if (a.cells_lse) {
                a.cells_lse[h] = cells > 0.0f ? most + logf(cells) : -INFINITY;
            }
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n_heads*D/4; j += attn_threads) {
        const int g = j/(D/4), d = j % (D/4)*4;
        float4 o = make_float4(0, 0, 0, 0);
        const auto add = [&](int i, const float4 & x) {
            const float y = w.split[g][i];
            o = make_float4(fmaf(y, x.x, o.x), fmaf(y, x.y, o.y), fmaf(y, x.z, o.z), fmaf(y, x.w, o.w));
        };
        const bool has_first = j == (int) threadIdx.x;
#pragma unroll
        for (int i = 0; i < early; ++i) {
            if (has_first && i < a.n_split) {
                add(i, first[i]);
            }
        }
#pragma unroll 16
        for (int i = has_first ? early : 0; i < a.n_split; ++i) {
            add(i, partial_at(j, i));
        }
        if (w.tail[g] > 0.0f) {
            const float * x = a.tail + s*a.tail_s + t*a.tail_t + (h0 + g)*a.tail_h + d, y = w.tail[g];
            o = make_float4(fmaf(y, x[0], o.x), fmaf(y, x[1], o.y), fmaf(y, x[2], o.z), fmaf(y, x[3], o.w));
        }
        *(float4 *) (a.out + (token*a.n_head + h0 + g)*D + d) = o;
    }
}

// rows that a lane has under way
static constexpr __host__ __device__ int flight_of(int G) { return G <= 4 ? 4 : 2; }

// Sums x[N] over the lanes of a group of L, numbered i. Lane i gets the sums of R values from i*R on, or if there are fewer
// values than lanes that of value i/(L/N).
template <int N, int L>
static __device__ __forceinline__ void deal_sums(float * x, int i) {
    int n = N;
#pragma unroll
    for (int o = L/2; o > 0; o >>= 1) {
        if (n > 1) {
            n /= 2;
            const bool upper = i & o;
#pragma unroll
            for (int j = 0; j < N/2; ++j) {
                if (j < n) {
                    const float keep = upper ? x[j + n] : x[j], give = upper ? x[j] : x[j + n];
                    x[j] = keep + __shfl_xor_sync(all_lanes, give, o);
                }
            }
        } else {
            x[0] += __shfl_xor_sync(all_lanes, x[0], o);
        }
    }
}

template <ggml_type T, int D, int G>
static __global__ void __launch_bounds__(attn_threads, G <= 4 ? 3 : 2) sparse_attn_kernel(const attn a) {
    follow_previous();
    constexpr int parts = D/8;                                      // of a row
    constexpr int lanes = parts <= 8 ? 8 : parts <= 16 ? 16 : 32;   // that share it
    constexpr int rows  = warp_size/lanes;                          // of a warp at once
    constexpr int U     = flight_of(G);
    constexpr int R     = U*G > lanes ? U*G/lanes : 1;              // logits that a lane gets, all of one row
    constexpr int per_u = lanes/U;                                  // lanes that get those of a row
    constexpr int step  = U*G > lanes ? 1 : lanes/(U*G);            // lanes that get the same

    __shared__ float merged[attn_warps*G*(D + 2)];
    __shared__ merge_weights weights;

    const int lane = threadIdx.x % warp_size, warp = threadIdx.x/warp_size;
    const int i = lane % lanes, sub = lane/lanes;
    const bool has_part = i < parts;

    const int split = blockIdx.x, h_kv = blockIdx.y/a.n_group_parts, g0 = blockIdx.y % a.n_group_parts*G;
    const int t = blockIdx.z % a.n_tokens, s = blockIdx.z/a.n_tokens;
    const int n_heads = min(G, a.group - g0), h0 = h_kv*a.group + g0;

    // pass 1
    const int32_t * always   = a.always   + t*a.always_t + s*a.always_s;
    const int32_t * selected = a.selected + h_kv*a.selected_h + t*a.selected_t + s*a.selected_s;
    const int       seen     = a.visible ? min(max(a.visible[s*a.visible_s + t], 0), a.n_always) : a.n_always;
    const char    * k        = a.k + h_kv*a.k_nb2 + s*a.k_nb3;
    const char    * v        = a.v + h_kv*a.v_nb2 + s*a.v_nb3;

    constexpr int stride = attn_warps*rows*U;
    const int begin = split*a.per_split, end = min(begin + a.per_split, a.n_always + a.n_selected);
    // of the logits that this lane gets: their row, and the first of their heads
    const int my_u = i/per_u, my_g = i % per_u/step*R;

    float my_max[R], my_sum[R], acc[G][8];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        my_max[r] = -INFINITY;
        my_sum[r] = 0.0f;
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int d = 0; d < 8; ++d) {
            acc[g][d] = 0.0f;
        }
    }
    const int first = begin + warp*rows*U;
    int       cell[U], next_cell[U];
    octet<T>  ks[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const int p = first + u*rows + sub;
        cell[u]      = first < end ? cell_at(a, always, selected, seen, p) : -1;
        next_cell[u] = first + stride < end ? cell_at(a, always, selected, seen, p + stride) : -1;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
        ks[u].clear();
        if (cell[u] >= 0 && has_part) {
            ks[u].load(k + cell[u]*a.k_nb1, i);
        }
    }
    // the query comes last: the first keys, which wait for the list, are on their way
    float q[G][8];
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int d = 0; d < 8; ++d) {
            q[g][d] = 0.0f;
        }
        if (g < n_heads && has_part) {
            octet<GGML_TYPE_F32> o;
            o.load(a.q + t*a.q_nb1 + (h0 + g)*a.q_nb2 + s*a.q_nb3, i);
            o.get(q[g]);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                q[g][d] *= scale;
            }
        }
    }
    for (int p0 = first; p0 < end; p0 += stride) {
        octet<T> vs[U], next_ks[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            vs[u].clear();
            if (cell[u] >= 0 && has_part) {
                vs[u].load(v + cell[u]*a.v_nb1, i);
            }
        }
        int cell_after[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            next_ks[u].clear();
            if (next_cell[u] >= 0 && has_part) {
                next_ks[u].load(k + next_cell[u]*a.k_nb1, i);
            }
            cell_after[u] = p0 + 2*stride < end ? cell_at(a, always, selected, seen, p0 + 2*stride + u*rows + sub) : -1;
        }
        // pass 2
        float x[U*G];
        bool  is_cell = false; // of the row whose logits this lane gets
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float row[8];
            ks[u].get(row);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float sum = 0.0f;
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    sum = fmaf(q[g][d], row[d], sum);
                }
                x[u*G + g] = octet<T>::is_scaled ? ks[u].scale()*sum : sum;
            }
            is_cell = u == my_u ? cell[u] >= 0 : is_cell;
        }
        deal_sums<U*G, lanes>(x, i);

        // pass 3
        float shrink[R];
        bool  grown = false;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            x[r] = is_cell ? soft_capped(x[r], a.softcap) : -INFINITY;
            const int p = p0 + my_u*rows + sub;
            if (a.logits && i % step == 0 && my_g + r < n_heads && p < a.n_always) {
                a.logits[(int64_t) (h0 + my_g + r)*a.n_always + p] = x[r];
            }
            float most = fmaxf(my_max[r], x[r]);
#pragma unroll
            for (int o = lanes/2; o >= per_u; o >>= 1) {
                most = fmaxf(most, __shfl_xor_sync(all_lanes, most, o));
            }
            grown     = grown || most > my_max[r];
            shrink[r] = weight_of(my_max[r], most);
            my_max[r] = most;
            x[r]      = weight_of(x[r], most);
            my_sum[r] = my_sum[r]*shrink[r] + x[r];
        }
        if (__any_sync(all_lanes, grown)) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float s = __shfl_sync(all_lanes, shrink[g % R], sub*lanes + g/R*step);
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    acc[g][d] *= s;
                }
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float row[8];
            vs[u].get(row);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float w = __shfl_sync(all_lanes, x[g % R], sub*lanes + u*per_u + g/R*step);
                w = octet<T>::is_scaled ? vs[u].scale()*w : w;
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    acc[g][d] = fmaf(w, row[d], acc[g][d]);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            cell[u]      = next_cell[u];
            next_cell[u] = cell_after[u];
            ks[u]        = next_ks[u];
        }
    }
    float max[G], sum[G];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int o = lanes/2; o >= per_u; o >>= 1) {
            my_sum[r] += __shfl_xor_sync(all_lanes, my_sum[r], o);
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        max[g] = __shfl_sync(all_lanes, my_max[g % R], sub*lanes + g/R*step);
        sum[g] = __shfl_sync(all_lanes, my_sum[g % R], sub*lanes + g/R*step);
    }

    // pass 4
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int o = lanes; o < warp_size; o <<= 1) {
            const float other = __shfl_xor_sync(all_lanes, max[g], o), most = fmaxf(max[g], other);
            const float mine = weight_of(max[g], most), theirs = weight_of(other, most);
            sum[g] = mine*sum[g] + theirs*__shfl_xor_sync(all_lanes, sum[g], o);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                acc[g][d] = mine*acc[g][d] + theirs*__shfl_xor_sync(all_lanes, acc[g][d], o);
            }
            max[g] = most;
        }
        float * mine = merged + (warp*G + g)*(D + 2);
        if (sub == 0 && has_part) {
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                mine[8*i + d] = acc[g][d];
            }
        }
        if (lane == 0) {
            mine[D]     = max[g];
            mine[D + 1] = sum[g];
        }
    }
    __syncthreads();
    for (int g = 0; g < n_heads; ++g) {
        float most = -INFINITY, w[attn_warps];
#pragma unroll
        for (int j = 0; j < attn_warps; ++j) {
            most = fmaxf(most, merged[(j*G + g)*(D + 2) + D]);
        }
#pragma unroll
        for (int j = 0; j < attn_warps; ++j) {
            w[j] = weight_of(merged[(j*G + g)*(D + 2) + D], most);
        }
        const int64_t at = (((int64_t) s*a.n_tokens + t)*a.n_head + h0 + g)*a.n_split + split;
        for (int d = threadIdx.x; d < D + 2; d += attn_threads) {
            float o = 0.0f;
#pragma unroll
            for (int j = 0; j < attn_warps; ++j) {
                o += w[j]*merged[(j*G + g)*(D + 2) + d];
            }
            (d < D ? a.partials + at*D + d : a.stats + at*2 + d - D)[0] = d == D ? most : o;
        }
    }
    if (is_last_block(a.counters + blockIdx.z*gridDim.y + blockIdx.y, a.n_split)) {
        merge_splits<D>(a, s, t, h0, n_heads, weights);
    }
}

// the evidence of the query that attended: the mean over the group of its softmax, for the candidates
static __global__ void own_evidence_kernel(const float * logits, const float * lse, const int32_t * cells, const int32_t * plan,
        int n_list, int group, float * evidence) {
    follow_previous();
    const int j = blockIdx.x*blockDim.x + threadIdx.x, h_kv = blockIdx.y;
    if (j >= n_list) {
        return;
    }
    float sum = 0.0f;
    if (j >= plan[0] && j < plan[1] && cells[j] >= 0) {
        for (int g = 0; g < group; ++g) {
            const int h = h_kv*group + g;
            sum += weight_of(logits[(int64_t) h*n_list + j], lse[h]);
        }
    }
    evidence[(int64_t) h_kv*n_list + j] = sum/group;
}

// ---- host ------------------------------------------------------------------------------------------------------------

static int group_part(int64_t group) {
    return group <= 2 ? 2 : group <= 4 ? 4 : 8;
}

struct split { int n, length; };

// So many blocks that every multiprocessor has a few, each with whole loads of its warps: with whole strides of blocks a short list would
// be split into too few, and some multiprocessors would have a fifth more to do than the mean. Tokens that see different lengths of one
// list are split as each alone, so that they give the same bits.
static split split_of(const ggml_tensor * dst, int n_sm) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    const int64_t group  = q->ne[2]/k->ne[2];
    const int64_t blocks = k->ne[2]*n_chunks(group, group_part(group))*(visible_of(dst) ? 1 : q->ne[1])*q->ne[3];
    const int64_t load   = flight_of(group_part(group))*(k->ne[0] <= 64 ? 4 : k->ne[0] <= 128 ? 2 : 1);
    const int64_t loads  = std::max<int64_t>(n_chunks(length(dst->src[3]) + length(dst->src[4]), load), 1);
    const int64_t at_once = n_sm*(group_part(group) <= 4 ? 3 : 2); // one more would run alone
    const int64_t wanted  = std::clamp<int64_t>(std::min(at_once/blocks, loads/attn_warps), 1, max_splits);
    const int64_t length  = n_chunks(loads, wanted);
    return { (int) n_chunks(loads, length), (int) (length*load) };
}

bool sparse_attn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    const int64_t group = q->ne[2]/k->ne[2];
    return attn_supported(dst) && q->ne[1]*q->ne[3]*k->ne[2]*n_chunks(group, group_part(group)) <= n_counters;
}

static int64_t n_partials(const ggml_tensor * dst, const split & s) {
    const ggml_tensor * q = dst->src[0];
    return q->ne[1]*q->ne[2]*q->ne[3]*s.n;
}

size_t sparse_attn_scratch(const ggml_tensor * dst, int n_sm) {
    const int64_t n_head = dst->src[0]->ne[2];
    return (n_partials(dst, split_of(dst, n_sm))*(dst->src[2]->ne[0] + 2) + (ggml_sparse_attn_has_evidence(dst) ? n_head*(dst->src[3]->ne[0] + 1) : 0))*sizeof(float);
}

template <ggml_type T, int D, int G>
static void launch(const gpu & g, const attn & a, int n_stream) {
    const dim3 grid(a.n_split, a.n_head_kv*a.n_group_parts, a.n_tokens*n_stream);
    SFI_LAUNCH((sparse_attn_kernel<T, D, G>), grid, dim3(attn_threads), g.stream, a);
}

template <ggml_type T, int D>
static void launch_group(const gpu & g, const attn & a, int n_stream) {
    switch (group_part(a.group)) {
        case 2:  launch<T, D, 2>(g, a, n_stream); break;
        case 4:  launch<T, D, 4>(g, a, n_stream); break;
        default: launch<T, D, 8>(g, a, n_stream); break;
    }
}

template <ggml_type T>
static void launch_size(const gpu & g, const attn & a, int n_stream, int64_t head_size) {
    switch (head_size) {
        case 64:  launch_group<T, 64> (g, a, n_stream); break;
        case 96:  launch_group<T, 96> (g, a, n_stream); break;
        case 128: launch_group<T, 128>(g, a, n_stream); break;
        case 256: launch_group<T, 256>(g, a, n_stream); break;
        default:
            if constexpr (T == GGML_TYPE_F16 || T == GGML_TYPE_BF16) { // 80 is no multiple of 32
                launch_group<T, 80>(g, a, n_stream);
            }
            break;
    }
}

void sparse_attn(const gpu & g, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    const auto data = [](const ggml_tensor * t) { return t ? t->data : nullptr; };
    const split   s = split_of(dst, g.n_sm);
    const int64_t n = n_partials(dst, s);

    attn a = {};
    static_cast<attn_args &>(a) = attn_args_of(dst);
    a.q = (const char *) q->data;
    a.k = (const char *) k->data;
    a.v = (const char *) v->data;
    a.always   = (const int32_t *) data(dst->src[3]);
    a.selected = (const int32_t *) data(dst->src[4]);
    a.visible  = (const int32_t *) data(visible_of(dst));
    a.tail     = (const float *) data(dst->src[5]);
    a.sinks    = (const float *) data(dst->src[6]);
    a.mass     = (float *) data(mass_of(dst));
    a.out      = (float *) dst->data;
    a.n_group_parts = (int) n_chunks(a.group, group_part(a.group));
    a.n_split   = s.n;
    a.per_split = s.length;
    a.partials  = (float *) g.scratch;
    a.stats     = a.partials + n*v->ne[0];
    a.counters  = g.counters;
    if (a.has_evidence) {
        a.logits    = a.stats + 2*n;
        a.cells_lse = a.logits + (int64_t) a.n_head*a.n_always;
    }
    with_kv_type(k->type, [&](auto type) { launch_size<decltype(type)::value>(g, a, (int) q->ne[3], k->ne[0]); });
    if (a.has_evidence && a.n_always > 0) { // no GPU accepts a launch of nothing
        constexpr int threads = 256;
        SFI_LAUNCH(own_evidence_kernel, dim3((unsigned) n_chunks(a.n_always, threads), a.n_head_kv), dim3(threads), g.stream,
            a.logits, a.cells_lse, a.always, (const int32_t *) dst->src[8]->data, a.n_always, a.group,
            a.out + v->ne[0]*a.n_head);
    }
}

} // namespace sfi_cuda
