// GGML_OP_SKETCH_SCAN on Metal.
//
// The codes are read as they lie: a word of a plane of K has one byte for each of four components, a word of a plane of V
// four cells of one component. The query's whole numbers and their products with codes are exact in floats.
//
//   pass 1  the query in the basis of each head, as whole numbers
//   pass 2  logits of all cells; the softmax's maximum and sum per chunk of cells
//
// Where a sketch is looked at twice, sketch-looks.metal goes on from here. Else:
//
//   pass 3  scores, as keys; those that may be selected are listed
//   pass 4  the least rank among the best, and where each chunk writes its selected cells
//   pass 5  selected cells in order; what all others contribute, per chunk
//   pass 6  merge the chunks, and from components back to values
//
// No pass asks the host anything.

#include "top-k.metal"

static inline float4 codes_of(uint word, constant scan_field & f) {
    return (float4) as_type<uchar4>(word >> f.shift & ((1u << f.bits) - 1)*0x01010101u);
}

static inline float centre_of(constant scan_field & f) {
    return 0.5f*(float) ((1 << f.bits) - 1);
}

// ---- pass 1: a threadgroup for each query head ----------------------------------------------------------------------------

struct query_shared {
    float w[4*max_k_fields];
    float tmp[scan_simds];
};

// weights [n_head, n_k/4]: whole numbers; factor [n_head, 3]: logit = factor*sum + offset; after the second look also what its
// sum lacks
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_query(
        constant scan_args & a         [[buffer(0)]],
        device const char  * q_rows    [[buffer(1)]],
        device const float * basis     [[buffer(2)]],
        device float4      * weights   [[buffer(3)]],
        device float       * factor    [[buffer(4)]],
        device atomic_uint * n_listed  [[buffer(5)]],
        SFI_POSITION) {
    SFI_SHARED(query_shared, sh);
    const int h = block.x, h_kv = h/a.group;
    device const float * q    = (device const float *) (q_rows + h*a.q_nb1);
    device const float * mean = basis + (long) h_kv*a.basis_size;
    device const half  * dec  = (device const half *) (mean + (long) (1 + a.n_k)*a.d_k);

    for (int j = sg; j < a.n_k; j += scan_simds) {
        float sum = 0.0f;
        for (int e = lane; e < a.d_k; e += simd_size) {
            sum = fma((float) dec[(long) j*a.d_k + e], q[e], sum);
        }
        sum = simd_sum(sum);
        if (lane == 0) {
            sh.w[j] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float base = 0.0f, most = 0.0f;
    for (int e = tid; e < a.d_k; e += scan_threads) {
        base = fma(mean[e], q[e], base);
    }
    for (int j = tid; j < a.n_k; j += scan_threads) {
        most = max(most, fabs(sh.w[j]));
    }
    base = group_sum<scan_simds>(base, sh.tmp, lane, sg);
    most = group_max<scan_simds>(most, sh.tmp, lane, sg);
    const float s = most/127.0f;

    float centre = 0.0f, later = 0.0f; // of the sums of both looks, if every code were at its own
    for (int f = tid; f < a.n_k_fields; f += scan_threads) {
        float whole[4], sum = 0.0f;
        for (int r = 0; r < 4; ++r) {
            whole[r] = s > 0.0f ? rint(min(max(sh.w[4*f + r]/s, -127.0f), 127.0f)) : 0.0f;
            sum     += whole[r]*centre_of(a.k[f]);
        }
        centre += f < a.n_first_fields ? sum : 0.0f;
        later  += f < a.n_first_fields ? 0.0f : sum;
        weights[h*a.n_k_fields + f] = float4(whole[0], whole[1], whole[2], whole[3]);
    }
    centre = group_sum<scan_simds>(centre, sh.tmp, lane, sg);
    later  = group_sum<scan_simds>(later, sh.tmp, lane, sg);
    if (tid == 0) {
        factor[3*h]     = a.scale*s;
        factor[3*h + 1] = a.scale*(base - s*centre);
        factor[3*h + 2] = -a.scale*s*later;
        if (h % a.group == 0) {
            atomic_store_explicit(&n_listed[h_kv], 0u, memory_order_relaxed);
        }
    }
}

// ---- pass 2 ------------------------------------------------------------------------------------------------------------------

// Adds codes times weights of planes and their fields, from the first of each up to the last; words of a cell lie `stride` apart.
// w [field, head]: from the first field on
template <int G>
static inline void add_planes(constant scan_args & a, device const uint * words, int stride, int first_plane, int last_plane,
        int first_field, int last_field, threadgroup const float4 * w, thread float * acc) {
    for (int p0 = first_plane, f = first_field; p0 < last_plane; p0 += 4) {
        uint word[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) { // all loads before the first use
            word[p] = p0 + p < last_plane ? words[(p0 + p - first_plane)*stride] : 0u;
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            for (; f < last_field && a.k[f].plane == p0 + p; ++f) {
                const float4 c = codes_of(word[p], a.k[f]);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    acc[g] += dot(c, w[(f - first_field)*G + g]);
                }
            }
        }
    }
}

template <int G>
struct logits_shared {
    float4      w[G*max_k_fields];         // [field, head]
    atomic_uint left_out[max_chunk/32];    // a bit for each cell of the chunk
    float       stats[scan_simds][G][2];
};

// logits [n_head, n_list]; stats [n_head, n_chunks, 2]: maximum, sum
template <int G>
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_logits(
        constant scan_args & a         [[buffer(0)]],
        device const char  * codes     [[buffer(1)]],
        device const int   * skip      [[buffer(2)]],
        device const int   * plan      [[buffer(3)]],
        device const float4 * weights  [[buffer(4)]],
        device const float * factor    [[buffer(5)]],
        device float       * logits    [[buffer(6)]],
        device float       * stats     [[buffer(7)]],
        SFI_POSITION) {
    SFI_SHARED(logits_shared<G>, sh);
    const int chunk = block.x, h_kv = block.y, begin = chunk*a.chunk, n_used = min(plan[0], a.n_list), h0 = h_kv*a.group;

    for (int i = tid; i < a.n_first_fields*G; i += scan_threads) {
        const int f = i/G, g = i % G;
        sh.w[i] = g < a.group ? weights[(h0 + g)*a.n_k_fields + f] : float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int i = tid; i < max_chunk/32; i += scan_threads) {
        atomic_store_explicit(&sh.left_out[i], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < a.n_skip; i += scan_threads) {
        const int cell = skip[i], j = cell - begin;
        if (cell >= 0 && j >= 0 && j < a.chunk) {
            atomic_fetch_or_explicit(&sh.left_out[j/32], 1u << (j % 32), memory_order_relaxed);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float most[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        most[g] = no_logit;
        sum[g]  = 0.0f;
    }
    device const char * head = codes + h_kv*a.head_bytes;
    for (int j = tid; j < a.chunk && begin + j < a.n_list; j += scan_threads) {
        const int cell = begin + j;
        device const uint * words = (device const uint *) (head + (long) (cell/16)*a.block_bytes) + cell % 16;
        float acc[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            acc[g] = 0.0f;
        }
        add_planes<G>(a, words, 16, 0, a.first_planes, 0, a.n_first_fields, sh.w, acc);
        const bool out = cell >= n_used || (atomic_load_explicit(&sh.left_out[j/32], memory_order_relaxed) >> (j % 32) & 1u);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            if (g < a.group) {
                const float y = fma(factor[3*(h0 + g)], acc[g], factor[3*(h0 + g) + 1]);
                const float x = out ? no_logit : a.softcap > 0.0f ? soft_capped(y/a.softcap, a.softcap) : y;
                logits[(long) (h0 + g)*a.n_list + cell] = x;
                const float now = max(most[g], x);
                sum[g]  = sum[g]*weight_of(most[g], now) + weight_of(x, now);
                most[g] = now;
            }
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float now = simd_max(most[g]), all = simd_sum(sum[g]*weight_of(most[g], now));
        if (lane == 0) {
            sh.stats[sg][g][0] = now;
            sh.stats[sg][g][1] = all;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < a.group) {
        float now = no_logit, all = 0.0f;
        for (int i = 0; i < scan_simds; ++i) {
            const float both = max(now, sh.stats[i][tid][0]);
            all = all*weight_of(now, both) + sh.stats[i][tid][1]*weight_of(sh.stats[i][tid][0], both);
            now = both;
        }
        device float * mine = stats + ((long) (h0 + tid)*a.n_chunks + chunk)*2;
        mine[0] = now;
        mine[1] = all;
    }
}

// ---- pass 3 ------------------------------------------------------------------------------------------------------------------

// maximum and sum of a head by the first look, by one simdgroup
static inline float2 merge_stats(device const float * stats, int n_chunks, int lane) {
    float most = no_logit, sum = 0.0f;
    for (int c = lane; c < n_chunks; c += simd_size) {
        const float now = max(most, stats[2*c]);
        sum  = sum*weight_of(most, now) + stats[2*c + 1]*weight_of(stats[2*c], now);
        most = now;
    }
    const float now = simd_max(most);
    return float2(now, simd_sum(sum*weight_of(most, now)));
}

struct scan_keys_shared {
    float lse[max_group];
};

// Scores as keys. Those that single precision can hardly tell from 0 are ranked by their logarithm instead, below all others.
SFI_CONSTANT float tiny_score = 1e-30f; // bits 0x0da24260
SFI_CONSTANT float log_of_tiny = 69.1f, largest_log = 1e4f, keys_per_nat = 2e4f;

static inline uint key_of_log(float log_score) {
    return 1 + (uint) (keys_per_nat*max(log_score + log_of_tiny + largest_log, 0.0f));
}

// Of a cell with the logits x[0], x[ld] ...: 0 if it is left out, or its share is below `least` in every head of the group.
static inline uint key_of_cell(device const float * x, int ld, threadgroup const float * lse, int group, float least) {
    float score = 0.0f, most = 0.0f;
    bool  in = false;
    for (int g = 0; g < group; ++g) {
        const float y = x[(long) g*ld], share = weight_of(y, lse[g]);
        in     = in || y > no_logit;
        score += share;
        most   = max(most, share);
    }
    if (!in || most < least) {
        return 0;
    }
    if (score >= tiny_score) {
        return as_type<uint>(score) + 1;
    }
    float top = no_logit, sum = 0.0f;
    for (int g = 0; g < group; ++g) {
        top = max(top, x[(long) g*ld] - lse[g]);
    }
    for (int g = 0; g < group; ++g) {
        sum += exp(x[(long) g*ld] - lse[g] - top);
    }
    return key_of_log(top + log(sum));
}

// total [n_head, 2]: maximum, log-sum-exp; keys [n_head_kv, n_list]; listed [n_head_kv, n_list]: key, cell; n_listed [n_head_kv]
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_keys(
        constant scan_args & a         [[buffer(0)]],
        device const float * least_all [[buffer(1)]],
        device const float * logits    [[buffer(2)]],
        device const float * stats     [[buffer(3)]],
        device float       * total     [[buffer(4)]],
        device uint        * keys      [[buffer(5)]],
        device uint2       * listed    [[buffer(6)]],
        device atomic_uint * n_listed  [[buffer(7)]],
        SFI_POSITION) {
    SFI_SHARED(scan_keys_shared, sh);
    const int chunk = block.x, h_kv = block.y, begin = chunk*a.chunk, h0 = h_kv*a.group;
    if (sg < a.group) {
        const float2 m = merge_stats(stats + (long) (h0 + sg)*a.n_chunks*2, a.n_chunks, lane);
        if (lane == 0) {
            const float lse = m.y > 0.0f ? m.x + log(m.y) : no_logit;
            sh.lse[sg] = lse;
            if (chunk == 0) {
                total[2*(h0 + sg)]     = m.x;
                total[2*(h0 + sg) + 1] = lse;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float least = a.has_least ? least_all[h_kv] : 0.0f;
    for (int j0 = 0; j0 < a.chunk; j0 += scan_threads) {
        const int cell = begin + j0 + tid;
        uint key = 0;
        if (cell < a.n_list) {
            key = key_of_cell(logits + (long) h0*a.n_list + cell, a.n_list, sh.lse, a.group, least);
            keys[(long) h_kv*a.n_list + cell] = key;
        }
        const uint before = simd_prefix_exclusive_sum(key != 0 ? 1u : 0u), n = simd_sum(key != 0 ? 1u : 0u);
        uint at = 0;
        if (lane == 0 && n > 0) {
            at = atomic_fetch_add_explicit(&n_listed[h_kv], n, memory_order_relaxed);
        }
        at = simd_shuffle(at, (ushort) 0);
        if (key != 0) {
            listed[(long) h_kv*a.n_list + at + before] = uint2(key, (uint) cell);
        }
    }
}

// ---- pass 4: a threadgroup for each KV head ------------------------------------------------------------------------------------

struct listed_items {
    device const uint2 * listed;
    uint key(int i) const { return listed[i].x; }
    uint number(int i) const { return listed[i].y; }
};

struct best_shared {
    top_k_shared top_k;
    atomic_int of_chunk[max_chunks];
};

// best [n_head_kv]: the least rank that is selected; first [n_head_kv, n_chunks]: where the selected cells of a chunk go
[[max_total_threads_per_threadgroup(best_threads)]] kernel void sfi_scan_best(
        constant scan_args & a          [[buffer(0)]],
        device const uint2 * listed_all [[buffer(1)]],
        device const uint  * n_listed   [[buffer(2)]],
        device ulong       * best_all   [[buffer(3)]],
        device int         * first      [[buffer(4)]],
        device int         * selected   [[buffer(5)]],
        device int         * counts     [[buffer(6)]],
        SFI_POSITION) {
    SFI_SHARED(best_shared, sh);
    const int h_kv = block.x, n = (int) n_listed[h_kv];
    device const uint2 * listed = listed_all + (long) h_kv*a.n_list;
    const listed_items items = { listed };
    const ulong best = n <= a.n_selected ? (ulong) 0 :
        least_rank_of_best(n, (uint) a.n_selected, items, sh.top_k, best_threads, tid, lane, sg);
    for (int c = tid; c < a.n_chunks; c += best_threads) {
        atomic_store_explicit(&sh.of_chunk[c], 0, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < n; i += best_threads) {
        if (is_best(listed[i].x, listed[i].y, best)) {
            atomic_fetch_add_explicit(&sh.of_chunk[(int) listed[i].y/a.chunk], 1, memory_order_relaxed);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) { // exclusive sums, a simdgroup's width of chunks at a time
        int before = 0;
        for (int c0 = 0; c0 < a.n_chunks; c0 += simd_size) {
            const int c = c0 + lane, mine = c < a.n_chunks ? atomic_load_explicit(&sh.of_chunk[c], memory_order_relaxed) : 0;
            const int sum = simd_prefix_exclusive_sum(mine);
            if (c < a.n_chunks) {
                first[h_kv*a.n_chunks + c] = before + sum;
            }
            before += simd_sum(mine);
        }
        if (lane == 0) {
            best_all[h_kv] = best;
        }
    }
    for (int i = min(n, a.n_selected) + tid; i < a.n_selected; i += best_threads) {
        selected[h_kv*a.selected_ld + i] = -1;
    }
    if (tid == 0) {
        counts[2*h_kv]     = min(n, a.n_selected);
        counts[2*h_kv + 1] = 0;
    }
}

// ---- pass 5 ------------------------------------------------------------------------------------------------------------------

template <int G, int V>
struct tail_shared {
    float4 weights[scan_simds][G][simd_size/4];
    float  z[scan_simds][16*V + 1];
    int    of_simd[scan_simds];
};

// tails [n_head, n_chunks, n_v + 1]: components, sum of the weights
template <int G, int V>
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_tail(
        constant scan_args & a         [[buffer(0)]],
        device const char  * codes     [[buffer(1)]],
        device const float * logits    [[buffer(2)]],
        device const float * total     [[buffer(3)]],
        device const uint  * keys      [[buffer(4)]],
        device const ulong * best_all  [[buffer(5)]],
        device const int   * first     [[buffer(6)]],
        device int         * selected  [[buffer(7)]],
        device float       * tails     [[buffer(8)]],
        SFI_POSITION) {
    typedef tail_shared<G, V> shared_t;
    SFI_SHARED(shared_t, sh);
    const int   chunk = block.x, h_kv = block.y, begin = chunk*a.chunk, h0 = h_kv*a.group;
    const ulong best  = best_all[h_kv];
    device const char * head = codes + h_kv*a.head_bytes;
    int at = first[h_kv*a.n_chunks + chunk];

    float most[G], acc[V][G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        most[g] = g < a.group ? total[2*(h0 + g)] : no_logit;
        sum[g]  = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            acc[v][g] = 0.0f;
        }
    }
    for (int j0 = 0; j0 < a.chunk && begin + j0 < a.n_list; j0 += scan_threads) {
        const int  cell = begin + j0 + tid;
        const bool take = cell < a.n_list && is_best(keys[(long) h_kv*a.n_list + cell], (uint) cell, best);
        const int  place = next_place<scan_simds>(take, at, sh.of_simd, lane, sg);
        if (take) {
            selected[h_kv*a.selected_ld + place] = cell;
        }

        // weights of the others
#pragma unroll
        for (int g = 0; g < G; ++g) {
            if (g < a.group) {
                const float p = cell < a.n_list && !take ? weight_of(logits[(long) (h0 + g)*a.n_list + cell], most[g]) : 0.0f;
                sum[g] += p;
                ((threadgroup float *) sh.weights[sg][g])[lane] = p;
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        // a lane has a component of the cells of one block of codes
        const int  code_block = (begin + j0 + sg*simd_size)/16 + lane/16;
        const bool has_block  = 16*code_block < a.n_list;
        device const uint * words = (device const uint *) (head + (long) code_block*a.block_bytes) + lane % 16;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (v < a.n_v_groups) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    constant scan_field & f = a.v[v][s];
                    const float4 c = codes_of(has_block ? words[f.plane*16] : 0u, f);
#pragma unroll
                    for (int g = 0; g < G; ++g) {
                        if (g < a.group) {
                            acc[v][g] += dot(c, sh.weights[sg][g][lane/16*4 + s]);
                        }
                    }
                }
            }
        }
    }
    const int size = a.n_v + 1;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float both = acc[v][g] + simd_shuffle_xor(acc[v][g], (ushort) 16);
                if (lane < 16) {
                    sh.z[sg][16*v + lane] = both;
                }
            }
            const float of_simd = simd_sum(sum[g]);
            if (lane == 0) {
                sh.z[sg][16*V] = of_simd;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int j = tid; j < size; j += scan_threads) {
                float all = 0.0f;
                for (int i = 0; i < scan_simds; ++i) {
                    all += sh.z[i][j < a.n_v ? j : 16*V];
                }
                tails[((long) (h0 + g)*a.n_chunks + chunk)*size + j] = all;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
}

// ---- pass 6: a threadgroup for each query head --------------------------------------------------------------------------------

SFI_CONSTANT float least_tail_share = 1.0f/(1 << 20); // of a tail that counts

// value e of V with the components scale*(those given) - centres*(centre of each)
static inline float decoded_v(constant scan_args & a, device const float * basis, int h_kv, threadgroup const float * components,
        float scale, float centres, int e) {
    device const float * mean = basis + (long) (h_kv + 1)*a.basis_size - (long) (1 + a.n_v + a.n_v/2)*a.d_v;
    device const half  * dec  = (device const half *) (mean + (long) (1 + a.n_v)*a.d_v);
    float y = mean[e];
    for (int j = 0; j < a.n_v; ++j) {
        y = fma(components[j]*scale - centres*centre_of(a.v[j/16][0]), (float) dec[(long) j*a.d_v + e], y);
    }
    return y;
}

struct finish_shared {
    float z[16*max_v_groups + 1];
};

[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_finish(
        constant scan_args & a         [[buffer(0)]],
        device const float * basis     [[buffer(1)]],
        device const float * tails_all [[buffer(2)]],
        device const float * total     [[buffer(3)]],
        device float       * out_all   [[buffer(4)]],
        SFI_POSITION) {
    SFI_SHARED(finish_shared, sh);
    const int h = block.x, h_kv = h/a.group, size = a.n_v + 1;
    device const float * tails = tails_all + (long) h*a.n_chunks*size;
    device float       * out   = out_all + (long) h*(a.d_v + 1);
    for (int j = tid; j < size; j += scan_threads) {
        float sum = 0.0f;
        for (int c = 0; c < a.n_chunks; ++c) {
            sum += tails[c*size + j];
        }
        sh.z[j] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float sum = sh.z[a.n_v], share = sum*weight_of(total[2*h], total[2*h + 1]);
    const bool  counts = sum > 0.0f && share >= least_tail_share;
    for (int e = tid; e < a.d_v; e += scan_threads) {
        out[e] = counts ? decoded_v(a, basis, h_kv, sh.z, 1.0f/sum, 1.0f, e) : 0.0f;
    }
    if (tid == 0) {
        store_logit(out + a.d_v, counts, total[2*h] + log(max(sum, 1e-37f)));
    }
}

SFI_KERNEL(sfi_scan_query)
SFI_KERNEL(sfi_scan_keys)
SFI_KERNEL(sfi_scan_best)
SFI_KERNEL(sfi_scan_finish)
SFI_KERNEL_AS("sfi_scan_logits_1", sfi_scan_logits<1>)
SFI_KERNEL_AS("sfi_scan_logits_2", sfi_scan_logits<2>)
SFI_KERNEL_AS("sfi_scan_logits_4", sfi_scan_logits<4>)
SFI_KERNEL_AS("sfi_scan_logits_8", sfi_scan_logits<8>)
SFI_KERNEL_AS("sfi_scan_tail_1_2", sfi_scan_tail<1, 2>)
SFI_KERNEL_AS("sfi_scan_tail_2_2", sfi_scan_tail<2, 2>)
SFI_KERNEL_AS("sfi_scan_tail_4_2", sfi_scan_tail<4, 2>)
SFI_KERNEL_AS("sfi_scan_tail_8_2", sfi_scan_tail<8, 2>)
SFI_KERNEL_AS("sfi_scan_tail_1_8", sfi_scan_tail<1, 8>)
SFI_KERNEL_AS("sfi_scan_tail_2_8", sfi_scan_tail<2, 8>)
SFI_KERNEL_AS("sfi_scan_tail_4_8", sfi_scan_tail<4, 8>)
SFI_KERNEL_AS("sfi_scan_tail_8_8", sfi_scan_tail<8, 8>)
