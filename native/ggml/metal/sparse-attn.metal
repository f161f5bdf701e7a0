// SPARSE_ATTN on Metal.
//
// The support is split over threadgroups so that one token fills the GPU. A few lanes share a row, eight values each; a
// simdgroup takes several rows at once, for up to four heads of the GQA group. No barrier until a threadgroup is done: each
// row group has its own online softmax.
//
//   pass 1  load the query, and the cells of the list
//   pass 2  load K and V, logits of the group
//   pass 3  online softmax, accumulate V
//   pass 4  merge the row groups of a simdgroup, then the simdgroups of a threadgroup
//   pass 5  a kernel of its own merges the splits, the tail and the learned sink: threadgroups of one dispatch cannot wait
//           for each other

#include "gpu.metal"

static inline int cell_at(constant attn_args & a, device const int * always, device const int * selected, int seen, int p) {
    int cell = -1;
    if (p < a.n_always) {
        cell = p < seen ? always[p] : -1;
    } else if (p < a.n_always + a.n_selected) {
        cell = selected[p - a.n_always];
    }
    return cell < a.n_cells ? cell : -1;
}

template <int D, int G>
struct attn_shared {
    float merged[attn_simds*G*(D + 2)]; // output, maximum, sum
};

// partials [n_stream, n_tokens, n_head, n_split, D + 2]: output, maximum, sum; logits [n_head, n_always], with evidence
template <typename T, int D, int G>
[[max_total_threads_per_threadgroup(attn_threads)]] kernel void sfi_sparse_attn(
        constant attn_args & a          [[buffer(0)]],
        device const char  * q_rows     [[buffer(1)]],
        device const char  * k_rows     [[buffer(2)]],
        device const char  * v_rows     [[buffer(3)]],
        device const int   * always_all [[buffer(4)]],
        device const int   * selected_all [[buffer(5)]],
        device const int   * visible    [[buffer(6)]],
        device float       * partials   [[buffer(7)]],
        device float       * logits     [[buffer(8)]],
        SFI_POSITION) {
    constexpr int parts = D/8;                                    // of a row
    constexpr int lanes = parts <= 8 ? 8 : parts <= 16 ? 16 : 32; // that share it
    constexpr int rows  = simd_size/lanes;                        // of a simdgroup at once
    constexpr int U     = attn_flight;
    typedef attn_shared<D, G> shared_t;
    SFI_SHARED(shared_t, sh);

    const int  i = lane % lanes, sub = lane/lanes;
    const bool has_part = i < parts;
    const int  split = block.x, h_kv = block.y/a.n_group_parts, g0 = block.y % a.n_group_parts*G;
    const int  t = block.z % a.n_tokens, s = block.z/a.n_tokens;
    const int  n_heads = min(G, a.group - g0), h0 = h_kv*a.group + g0;

    // pass 1
    float q[G][8];
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int d = 0; d < 8; ++d) {
            q[g][d] = 0.0f;
        }
        if (g < n_heads && has_part) {
            octet_f32 o;
            o.load(q_rows + t*a.q_nb1 + (h0 + g)*a.q_nb2 + s*a.q_nb3, i);
            o.get(q[g]);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                q[g][d] *= scale;
            }
        }
    }
    device const int  * always   = always_all   + t*a.always_t + s*a.always_s;
    device const int  * selected = selected_all + h_kv*a.selected_h + t*a.selected_t + s*a.selected_s;
    const int           seen     = a.has_visible ? min(max(visible[s*a.visible_s + t], 0), a.n_always) : a.n_always;
    device const char * k        = k_rows + h_kv*a.k_nb2 + s*a.k_nb3;
    device const char * v        = v_rows + h_kv*a.v_nb2 + s*a.v_nb3;

    // whole strides of a threadgroup, so that splits end where simdgroups do
    constexpr int stride = attn_simds*rows*U;
    const int n_list = a.n_always + a.n_selected;
    const int per_split = ((n_list + stride - 1)/stride + a.n_split - 1)/a.n_split*stride;
    const int begin = split*per_split, end = min(begin + per_split, n_list);

    float most[G], sum[G], acc[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        most[g] = no_logit;
        sum[g]  = 0.0f;
#pragma unroll
        for (int d = 0; d < 8; ++d) {
            acc[g][d] = 0.0f;
        }
    }
    for (int p0 = begin + sg*rows*U; p0 < end; p0 += stride) {
        int cell[U];
        T   ks[U], vs[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            cell[u] = cell_at(a, always, selected, seen, p0 + u*rows + sub);
            ks[u].clear();
            vs[u].clear();
        }
        // pass 2
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (cell[u] >= 0 && has_part) {
                ks[u].load(k + cell[u]*a.k_nb1, i);
                vs[u].load(v + cell[u]*a.v_nb1, i);
            }
        }
        float x[U][G];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float row[8];
            ks[u].get(row);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                x[u][g] = 0.0f;
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    x[u][g] = fma(q[g][d], row[d], x[u][g]);
                }
            }
        }
#pragma unroll
        for (int o = lanes/2; o > 0; o >>= 1) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    x[u][g] += simd_shuffle_xor(x[u][g], (ushort) o);
                }
            }
        }
        // pass 3
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float now = most[g];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                x[u][g] = cell[u] >= 0 ? soft_capped(x[u][g], a.softcap) : no_logit;
                now = max(now, x[u][g]);
                const int p = p0 + u*rows + sub;
                if (a.has_evidence && i == 0 && g < n_heads && p < a.n_always) {
                    logits[(long) (h0 + g)*a.n_always + p] = x[u][g];
                }
            }
            const float shrink = weight_of(most[g], now);
            most[g] = now;
            sum[g] *= shrink;
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                acc[g][d] *= shrink;
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                x[u][g] = weight_of(x[u][g], now);
                sum[g] += x[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float row[8];
            vs[u].get(row);
#pragma unroll
            for (int g = 0; g < G; ++g) {
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    acc[g][d] = fma(x[u][g], row[d], acc[g][d]);
                }
            }
        }
    }

    // pass 4
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int o = lanes; o < simd_size; o <<= 1) {
            const float other = simd_shuffle_xor(most[g], (ushort) o), both = max(most[g], other);
            const float mine = weight_of(most[g], both), theirs = weight_of(other, both);
            sum[g] = mine*sum[g] + theirs*simd_shuffle_xor(sum[g], (ushort) o);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                acc[g][d] = mine*acc[g][d] + theirs*simd_shuffle_xor(acc[g][d], (ushort) o);
            }
            most[g] = both;
        }
        threadgroup float * mine = sh.merged + (sg*G + g)*(D + 2);
        if (sub == 0 && has_part) {
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                mine[8*i + d] = acc[g][d];
            }
        }
        if (lane == 0) {
            mine[D]     = most[g];
            mine[D + 1] = sum[g];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int g = 0; g < n_heads; ++g) {
        float all = no_logit, w[attn_simds];
#pragma unroll
        for (int j = 0; j < attn_simds; ++j) {
            all = max(all, sh.merged[(j*G + g)*(D + 2) + D]);
        }
#pragma unroll
        for (int j = 0; j < attn_simds; ++j) {
            w[j] = weight_of(sh.merged[(j*G + g)*(D + 2) + D], all);
        }
        device float * partial = partials + ((((long) s*a.n_tokens + t)*a.n_head + h0 + g)*a.n_split + split)*(D + 2);
        for (int d = tid; d < D + 2; d += attn_threads) {
            float o = 0.0f;
#pragma unroll
            for (int j = 0; j < attn_simds; ++j) {
                o += w[j]*sh.merged[(j*G + g)*(D + 2) + d];
            }
            partial[d] = d == D ? all : o;
        }
    }
}

// What the splits and the tail weigh in the end.
struct merge_shared {
    float split[max_splits];
    float tail;
};

// pass 5: a threadgroup for each head of a token
[[max_total_threads_per_threadgroup(attn_threads)]] kernel void sfi_sparse_attn_merge(
        constant attn_args & a         [[buffer(0)]],
        device const float * partials  [[buffer(1)]],
        device const float * tails     [[buffer(2)]],
        device const float * sinks     [[buffer(3)]],
        device float       * out       [[buffer(4)]],
        device float       * mass      [[buffer(5)]],
        device float       * cells_lse [[buffer(6)]], // [n_head], with evidence
        SFI_POSITION) {
    SFI_SHARED(merge_shared, w);
    constexpr int turns = max_splits/simd_size;
    const int  h = block.x, t = block.y, s = block.z, D = a.head_size;
    const long row = ((long) s*a.n_tokens + t)*a.n_head + h;
    device const float * mine = partials + row*a.n_split*(D + 2);
    device const float * tail = tails + s*a.tail_s + t*a.tail_t + h*a.tail_h;

    if (sg == 0) {
        const float tail_lse = a.has_tail ? load_logit(tail + D) : no_logit, sink = a.has_sinks ? load_logit(sinks + h) : no_logit;
        float max_of[turns], sum_of[turns], most = max(tail_lse, sink), cells = 0.0f;
        for (int j = 0; j < turns; ++j) {
            const int i = j*simd_size + lane;
            max_of[j] = i < a.n_split ? mine[i*(D + 2) + D]     : no_logit;
            sum_of[j] = i < a.n_split ? mine[i*(D + 2) + D + 1] : 0.0f;
            most = max(most, max_of[j]);
        }
        most = simd_max(most);
        for (int j = 0; j < turns; ++j) {
            max_of[j] = weight_of(max_of[j], most);
            cells += max_of[j]*sum_of[j];
        }
        cells = simd_sum(cells);
        const float of_tail = weight_of(tail_lse, most), all = cells + of_tail + weight_of(sink, most);
        const float scale   = all > 0.0f ? 1.0f/all : 0.0f;
        for (int j = 0; j < turns; ++j) {
            w.split[j*simd_size + lane] = max_of[j]*scale;
        }
        if (lane == 0) {
            w.tail = of_tail*scale;
            if (a.has_mass) {
                store_logit(mass + 2*h, all > 0.0f, most + log(max(all, 1e-30f)));
                mass[2*h + 1] = of_tail*scale;
            }
            if (a.has_evidence) {
                cells_lse[h] = cells > 0.0f ? most + log(cells) : no_logit;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = tid; d < D; d += attn_threads) {
        float o = w.tail > 0.0f ? w.tail*tail[d] : 0.0f;
        for (int i = 0; i < a.n_split; ++i) {
            o = fma(w.split[i], mine[i*(D + 2) + d], o);
        }
        out[row*D + d] = o;
    }
}

// the evidence of the query that attended: the mean over the group of its softmax, for the candidates
kernel void sfi_own_evidence(
        constant own_evidence_args & a [[buffer(0)]],
        device const float * logits    [[buffer(1)]],
        device const float * lse       [[buffer(2)]],
        device const int   * cells     [[buffer(3)]],
        device const int   * plan      [[buffer(4)]],
        device float       * evidence  [[buffer(5)]],
        SFI_POSITION) {
    const int j = block.x*list_threads + tid, h_kv = block.y;
    if (j >= a.n_list) {
        return;
    }
    float sum = 0.0f;
    if (j >= plan[0] && j < plan[1] && cells[j] >= 0) {
        for (int h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
            sum += weight_of(logits[(long) h*a.n_list + j], lse[h]);
        }
    }
    evidence[(long) h_kv*a.n_list + j] = sum/a.group;
}

#define SFI_SPARSE_ATTN(type, D) \
    SFI_KERNEL_AS("sfi_sparse_attn_" #type "_" #D "_1", sfi_sparse_attn<octet_##type, D, 1>) \
    SFI_KERNEL_AS("sfi_sparse_attn_" #type "_" #D "_2", sfi_sparse_attn<octet_##type, D, 2>) \
    SFI_KERNEL_AS("sfi_sparse_attn_" #type "_" #D "_4", sfi_sparse_attn<octet_##type, D, 4>)
#define SFI_SPARSE_ATTN_SIZES(type) \
    SFI_SPARSE_ATTN(type, 64) SFI_SPARSE_ATTN(type, 96) SFI_SPARSE_ATTN(type, 128) SFI_SPARSE_ATTN(type, 256)

SFI_KERNEL(sfi_sparse_attn_merge)
SFI_KERNEL(sfi_own_evidence)
SFI_SPARSE_ATTN_SIZES(f16)
SFI_SPARSE_ATTN_SIZES(bf16)
SFI_SPARSE_ATTN_SIZES(q8_0)
SFI_SPARSE_ATTN_SIZES(q4_0)
SFI_SPARSE_ATTN(f16, 80) // no multiple of 32
SFI_SPARSE_ATTN(bf16, 80)
