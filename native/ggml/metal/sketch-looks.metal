// GGML_OP_SKETCH_SCAN on Metal with two looks: what follows the first look of sketch-scan.metal.
//
//   pass 3  per chunk: the cells whose share by the first look is large enough, close together and in their order; their logits
//           from all planes, the maximum and the sum of these, and the sums over V
//   pass 4  per KV head: the selected cells
//   pass 5  per query head: take the selected cells out of the sums, and from components back to values
//
// Of most cells nothing but the first look is ever read. Sums are made in an order that depends on nothing but the sizes.

#include "sketch-scan.metal"

SFI_CONSTANT int cells_under_way = 8; // whose codes of V a simdgroup loads at a time

static inline device const char * records_of(constant scan_args & a, device const char * codes, int h_kv) {
    return codes + h_kv*a.head_bytes + a.records_at;
}

// Sums over V, for the components that the lanes of a simdgroup have: lane + 32 b.
template <int G, int V>
struct value_sums {
    float of[V/2][G];

    void clear() {
#pragma unroll
        for (int b = 0; b < V/2; ++b) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                of[b][g] = 0.0f;
            }
        }
    }

    // the cells i = first, first + step ... below n, with the weights w[g*ld + i]
    void add(constant scan_args & a, device const char * records, threadgroup const int * cells, threadgroup const float * w, int ld,
            int first, int step, int n, int lane) {
        for (int i0 = first; i0 < n; i0 += cells_under_way*step) {
#pragma unroll
            for (int b = 0; b < V/2; ++b) {
                const int j = b*simd_size + lane;
                if (j < a.n_v) {
                    const int bits = a.v[j/16][0].bits;
                    const int at   = a.v[j/16][0].plane - a.first_planes + (bits == 4 ? j % 16/8 : 0); // of the word in a record
                    uint word[cells_under_way];
#pragma unroll
                    for (int u = 0; u < cells_under_way; ++u) { // all loads before the first use
                        const int i = i0 + u*step;
                        word[u] = i < n ? ((device const uint *) (records + (long) cells[i]*a.record_bytes))[at] : 0u;
                    }
#pragma unroll
                    for (int u = 0; u < cells_under_way; ++u) {
                        const int i = i0 + u*step;
                        if (i < n) {
                            const float code = (float) (word[u] >> bits*(j % (32/bits)) & ((1u << bits) - 1));
#pragma unroll
                            for (int g = 0; g < G; ++g) {
                                of[b][g] = fma(w[g*ld + i], code, of[b][g]);
                            }
                        }
                    }
                }
            }
        }
    }
};

// ---- pass 3: a threadgroup for each chunk ----------------------------------------------------------------------------------

template <int G, int V>
struct again_shared {
    float4 w[G*max_k_fields];    // [field, head], of the fields that the first look left
    float  x[G*scan_threads];    // [head, cell]: weights of a tile
    int    cells[max_chunk];     // those that are looked at again
    float  first[G][2];          // maximum and inverse sum of the first look
    float  z[scan_simds][16*V];
    float  tmp[scan_simds];
    int    of_simd[scan_simds];
};

// Lists the cells of the chunk that are looked at again, and returns how many they are; `kept` gets this thread's part of their
// shares. All threads call it.
template <int G, int V>
static inline int list_again(constant scan_args & a, device const float * logits, int begin, float least,
        threadgroup again_shared<G, V> & sh, thread float * kept, int tid, int lane, int sg) {
    uint taken = 0; // a bit for each of the thread's cells
    for (int j = tid; j < a.chunk && begin + j < a.n_list; j += scan_threads) {
        float share[G], most = 0.0f;
        bool  in = false;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            share[g] = 0.0f;
            if (g < a.group) {
                const float x = logits[(long) g*a.n_list + begin + j];
                share[g] = weight_of(x, sh.first[g][0])*sh.first[g][1];
                most     = max(most, share[g]);
                in       = in || x > no_logit;
            }
        }
        if (in && most >= least) {
            taken |= 1u << (j/scan_threads);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                kept[g] += share[g];
            }
        }
    }
    int n = 0;
    for (int c = 0; c*scan_threads < a.chunk; ++c) {
        const bool take  = (taken >> c & 1u) != 0;
        const int  place = next_place<scan_simds>(take, n, sh.of_simd, lane, sg);
        if (take) {
            sh.cells[place] = begin + c*scan_threads + tid;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return n;
}

// the logits x of a cell by the first look become those by both
template <int G>
static inline void look_at_record(constant scan_args & a, device const char * record, threadgroup const float4 * w,
        device const float * factor, thread float * x) {
    float acc[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        acc[g] = 0.0f;
    }
    add_planes<G>(a, (device const uint *) record, 1, a.first_planes, a.k_planes, a.n_first_fields, a.n_k_fields, w, acc);
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
            x[g] += fma(factor[3*g], acc[g], factor[3*g + 2]);
        }
    }
}

// of all chunks: cells and, in the place of those by the first look, logits [n_head, n_list] of the cells that are looked at again,
// one after the other where the chunk begins; n_again [n_head_kv, n_chunks]; again [n_head, n_chunks, 3]: maximum, sum, their share
// by the first look; values [n_head, n_chunks, n_v]: sum of their codes of V times exp(logit - maximum)
template <int G, int V>
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_again(
        constant scan_args & a          [[buffer(0)]],
        device const char   * codes     [[buffer(1)]],
        device const int    * plan      [[buffer(2)]],
        device const float4 * weights   [[buffer(3)]],
        device const float  * factor    [[buffer(4)]],
        device const float  * stats     [[buffer(5)]],
        device float        * logits_all [[buffer(6)]],
        device int          * cells     [[buffer(7)]],
        device int          * n_again   [[buffer(8)]],
        device float        * again     [[buffer(9)]],
        device float        * values    [[buffer(10)]],
        SFI_POSITION) {
    typedef again_shared<G, V> shared_t;
    SFI_SHARED(shared_t, sh);
    const int chunk = block.x, h_kv = block.y, begin = chunk*a.chunk, h0 = h_kv*a.group;
    device const char * records = records_of(a, codes, h_kv);
    device float      * logits  = logits_all + (long) h0*a.n_list;

    for (int i = tid; i < (a.n_k_fields - a.n_first_fields)*G; i += scan_threads) {
        const int f = a.n_first_fields + i/G, g = i % G;
        sh.w[i] = g < a.group ? weights[(h0 + g)*a.n_k_fields + f] : float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (sg < a.group) {
        const float2 all = merge_stats(stats + (long) (h0 + sg)*a.n_chunks*2, a.n_chunks, lane);
        if (lane == 0) {
            sh.first[sg][0] = all.x;
            sh.first[sg][1] = all.y > 0.0f ? 1.0f/all.y : 0.0f;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float kept[G], most[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        most[g] = no_logit;
        kept[g] = sum[g] = 0.0f;
    }
    const float least = a.second_look/(float) min(max(plan[0], 1), a.mean_cells);
    const int n = list_again<G, V>(a, logits, begin, least, sh, kept, tid, lane, sg);
    if (tid == 0) {
        n_again[h_kv*a.n_chunks + chunk] = n;
    }

    for (int i0 = 0; i0 < n; i0 += scan_threads) {
        const int i = i0 + tid;
        float x[G];
        if (i < n) {
            const int cell = sh.cells[i];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                x[g] = g < a.group ? logits[(long) g*a.n_list + cell] : no_logit;
            }
            look_at_record<G>(a, records + (long) cell*a.record_bytes, sh.w, factor + 3*h0, x);
            cells[(long) h_kv*a.n_list + begin + i] = cell;
        }
        threadgroup_barrier(mem_flags::mem_device); // logits of this tile are read, and overwritten
        if (i < n) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                if (g < a.group) {
                    logits[(long) g*a.n_list + begin + i] = x[g];
                    most[g] = max(most[g], x[g]);
                }
            }
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
            most[g] = group_max<scan_simds>(most[g], sh.tmp, lane, sg);
            kept[g] = group_sum<scan_simds>(kept[g], sh.tmp, lane, sg);
        }
    }

    value_sums<G, V> v;
    v.clear();
    for (int i0 = 0; i0 < n; i0 += scan_threads) {
        const int i = i0 + tid;
        threadgroup_barrier(mem_flags::mem_threadgroup); // weights may still be read
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float w = i < n && g < a.group ? weight_of(logits[(long) g*a.n_list + begin + i], most[g]) : 0.0f;
            sh.x[g*scan_threads + tid] = w;
            sum[g] += w;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v.add(a, records, sh.cells + i0, sh.x, scan_threads, sg, scan_simds, min(n - i0, scan_threads), lane);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (g < a.group) {
            const long at = (long) (h0 + g)*a.n_chunks + chunk;
            sum[g] = group_sum<scan_simds>(sum[g], sh.tmp, lane, sg);
            if (tid == 0) {
                again[3*at]     = most[g];
                again[3*at + 1] = sum[g];
                again[3*at + 2] = kept[g];
            }
#pragma unroll
            for (int b = 0; b < V/2; ++b) {
                sh.z[sg][b*simd_size + lane] = v.of[b][g];
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int j = tid; j < a.n_v; j += scan_threads) {
                float all = 0.0f;
                for (int s = 0; s < scan_simds; ++s) {
                    all += sh.z[s][j];
                }
                values[at*a.n_v + j] = all;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
}

// ---- pass 4: a threadgroup for each KV head ----------------------------------------------------------------------------------

SFI_CONSTANT float least_unseen = 1.0f/(1 << 19);
SFI_CONSTANT int   best_simds   = best_threads/simd_size;

struct choose_shared {
    top_k_shared top_k;
    int   begin[max_chunks + 1]; // of the chunks' cells, counted through
    int   of_simd[best_simds];
    float lse[max_group];
};

// begin[0 .. n_chunks], by one simdgroup
static inline void count_through(device const int * n, int n_chunks, threadgroup int * begin, int lane) {
    int before = 0;
    for (int c0 = 0; c0 < n_chunks; c0 += simd_size) {
        const int c = c0 + lane, mine = c < n_chunks ? n[c] : 0, sum = simd_prefix_exclusive_sum(mine);
        if (c < n_chunks) {
            begin[c] = before + sum;
        }
        before += simd_sum(mine);
    }
    if (lane == 0) {
        begin[n_chunks] = before;
    }
}

// the last chunk with begin[chunk] <= i
static inline int chunk_with(threadgroup const int * begin, int n_chunks, int i) {
    int low = 0, high = n_chunks;
    while (high - low > 1) {
        const int middle = (low + high)/2;
        if (begin[middle] <= i) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// of one head, by one simdgroup
static inline head_sums add_up(device const float * stats, device const float * again, int n_chunks, int lane) {
    const float2 first = merge_stats(stats, n_chunks, lane);
    float most = no_logit, sum = 0.0f, kept = 0.0f;
    for (int c = lane; c < n_chunks; c += simd_size) {
        const float now = max(most, again[3*c]);
        sum   = sum*weight_of(most, now) + again[3*c + 1]*weight_of(again[3*c], now);
        most  = now;
        kept += again[3*c + 2];
    }
    head_sums s;
    s.top_first = first.x;
    s.top       = simd_max(most);
    s.weight    = simd_sum(sum*weight_of(most, s.top));
    // a share that may be nothing but rounding errors counts for nothing, lest it outweigh cells that mattered less than the first
    // look said
    const float unseen = 1.0f - simd_sum(kept);
    s.others = unseen > least_unseen ? unseen*first.y : 0.0f;
    const float top = max(s.top, s.top_first), all = s.weight*weight_of(s.top, top) + s.others*weight_of(s.top_first, top);
    s.lse = all > 0.0f ? top + log(all) : no_logit;
    return s;
}

// The cells that were looked at again and may be selected, in their order: (key, where their logits lie). Returns how many there
// are. All threads call it.
static inline int list_best(constant scan_args & a, device const float * logits, float least, device uint2 * listed,
        threadgroup choose_shared & sh, int tid, int lane, int sg) {
    const int n = sh.begin[a.n_chunks];
    int n_listed = 0;
    for (int i0 = 0; i0 < n; i0 += best_threads) {
        const int i = i0 + tid;
        int  at  = 0;
        uint key = 0;
        if (i < n) {
            const int chunk = chunk_with(sh.begin, a.n_chunks, i);
            at  = chunk*a.chunk + i - sh.begin[chunk];
            key = key_of_cell(logits + at, a.n_list, sh.lse, a.group, least);
        }
        const int place = next_place<best_simds>(key != 0, n_listed, sh.of_simd, lane, sg);
        if (key != 0) {
            listed[place] = uint2(key, (uint) at);
        }
    }
    threadgroup_barrier(mem_flags::mem_device);
    return n_listed;
}

// sums [n_head]; listed [n_head_kv, n_list]: in the end those of the selected cells come first
[[max_total_threads_per_threadgroup(best_threads)]] kernel void sfi_scan_choose(
        constant scan_args & a         [[buffer(0)]],
        device const float * least_all [[buffer(1)]],
        device const float * logits    [[buffer(2)]],
        device const float * stats     [[buffer(3)]],
        device const int   * n_again   [[buffer(4)]],
        device const float * again     [[buffer(5)]],
        device const int   * cells_all [[buffer(6)]],
        device head_sums   * sums      [[buffer(7)]],
        device uint2       * listed_all [[buffer(8)]],
        device int         * selected_all [[buffer(9)]],
        device int         * counts    [[buffer(10)]],
        SFI_POSITION) {
    SFI_SHARED(choose_shared, sh);
    const int h_kv = block.x, h0 = h_kv*a.group;
    device const int * cells    = cells_all + (long) h_kv*a.n_list;
    device uint2     * listed   = listed_all + (long) h_kv*a.n_list;
    device int       * selected = selected_all + h_kv*a.selected_ld;
    if (sg == 0) {
        count_through(n_again + h_kv*a.n_chunks, a.n_chunks, sh.begin, lane);
    }
    if (sg < a.group) {
        const long      at = (long) (h0 + sg)*a.n_chunks;
        const head_sums s  = add_up(stats + 2*at, again + 3*at, a.n_chunks, lane);
        if (lane == 0) {
            sums[h0 + sg] = s;
            sh.lse[sg]    = s.lse;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int n_listed = list_best(a, logits + (long) h0*a.n_list, a.has_least ? least_all[h_kv] : 0.0f, listed, sh, tid, lane, sg);
    const listed_items items = { listed };
    const ulong best = n_listed <= a.n_selected ? (ulong) 0 :
        least_rank_of_best(n_listed, (uint) a.n_selected, items, sh.top_k, best_threads, tid, lane, sg);
    int n = 0;
    for (int i0 = 0; i0 < n_listed; i0 += best_threads) {
        const int   i     = i0 + tid;
        const uint2 item  = i < n_listed ? listed[i] : uint2(0u, 0u);
        const bool  take  = is_best(item.x, item.y, best);
        const int   place = next_place<best_simds>(take, n, sh.of_simd, lane, sg);
        if (take) {
            listed[place]   = item;
            selected[place] = cells[item.y];
        }
    }
    for (int i = n + tid; i < a.n_selected; i += best_threads) {
        selected[i] = -1;
    }
    if (tid == 0) {
        counts[2*h_kv]     = n;
        counts[2*h_kv + 1] = sh.begin[a.n_chunks];
    }
}

// ---- pass 5: a threadgroup for each query head --------------------------------------------------------------------------------

struct take_out_shared {
    float w[scan_threads];  // of a tile of selected cells
    int   cells[scan_threads];
    float z[scan_simds][16*max_v_groups];
    float tmp[scan_simds];
};

typedef value_sums<1, max_v_groups> head_values;

// the sums over V of all chunks, of which each simdgroup takes some
static inline void add_chunks(constant scan_args & a, device const float * again, device const float * values, float top,
        thread head_values & v, int lane, int sg) {
    for (int c = sg; c < a.n_chunks; c += scan_simds) {
        const float w = weight_of(again[3*c], top);
#pragma unroll
        for (int b = 0; b < max_v_groups/2; ++b) {
            const int j = b*simd_size + lane;
            v.of[b][0] = fma(w, j < a.n_v ? values[c*a.n_v + j] : 0.0f, v.of[b][0]);
        }
    }
}

// of the n selected cells, whose logits lie where `listed` says; returns the sum of their weights
static inline float add_selected(constant scan_args & a, device const char * records, device const float * logits,
        device const int * cells, device const uint2 * listed, int n, float top, threadgroup take_out_shared & sh,
        thread head_values & v, int tid, int lane, int sg) {
    float weight = 0.0f;
    for (int i0 = 0; i0 < n; i0 += scan_threads) {
        const int n_tile = min(n - i0, scan_threads);
        threadgroup_barrier(mem_flags::mem_threadgroup); // the tile before may still be read
        if (tid < n_tile) {
            const int at = (int) listed[i0 + tid].y;
            sh.w[tid]     = weight_of(logits[at], top);
            sh.cells[tid] = cells[at];
            weight += sh.w[tid];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v.add(a, records, sh.cells, sh.w, scan_threads, sg, scan_simds, n_tile, lane);
    }
    return group_sum<scan_simds>(weight, sh.tmp, lane, sg);
}

static inline void write_tail(constant scan_args & a, device const float * basis, int h_kv, head_sums s, float weight_left,
        threadgroup const float * v, device float * out, int tid) {
    const float top = max(s.top, s.top_first), kept = max(weight_left, 0.0f);
    const float weight = kept*weight_of(s.top, top), others = s.others*weight_of(s.top_first, top), all = weight + others;
    const bool  counts = all > 0.0f && all*weight_of(top, s.lse) >= least_tail_share;
    const float of_others = counts ? others/all : 0.0f;
    const float known = counts && kept > 0.0f ? (1.0f - of_others*of_others)/kept : 0.0f;
    for (int e = tid; e < a.d_v; e += scan_threads) {
        out[e] = counts ? decoded_v(a, basis, h_kv, v, known, known*kept, e) : 0.0f;
    }
    if (tid == 0) {
        store_logit(out + a.d_v, counts, top + log(max(all, 1e-37f)));
    }
}

[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_take_out(
        constant scan_args & a          [[buffer(0)]],
        device const char      * codes  [[buffer(1)]],
        device const float     * basis  [[buffer(2)]],
        device const float     * logits [[buffer(3)]],
        device const int       * cells  [[buffer(4)]],
        device const uint2     * listed [[buffer(5)]],
        device const int       * counts [[buffer(6)]],
        device const head_sums * sums   [[buffer(7)]],
        device const float     * again  [[buffer(8)]],
        device const float     * values [[buffer(9)]],
        device float           * out    [[buffer(10)]],
        SFI_POSITION) {
    SFI_SHARED(take_out_shared, sh);
    const int       h = block.x, h_kv = h/a.group;
    const head_sums s = sums[h];
    const long at = (long) h*a.n_chunks, at_list = (long) h_kv*a.n_list;
    head_values all, taken;
    all.clear();
    taken.clear();
    add_chunks(a, again + 3*at, values + at*a.n_v, s.top, all, lane, sg);
    const float of_taken = add_selected(a, records_of(a, codes, h_kv), logits + (long) h*a.n_list, cells + at_list, listed + at_list,
        counts[2*h_kv], s.top, sh, taken, tid, lane, sg);
#pragma unroll
    for (int b = 0; b < max_v_groups/2; ++b) {
        sh.z[sg][b*simd_size + lane] = all.of[b][0] - taken.of[b][0];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = tid; j < a.n_v; j += scan_threads) {
        float sum = 0.0f;
        for (int i = 0; i < scan_simds; ++i) {
            sum += sh.z[i][j];
        }
        sh.z[0][j] = sum; // which only this thread has read
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write_tail(a, basis, h_kv, s, s.weight - of_taken, sh.z[0], out + (long) h*(a.d_v + 1), tid);
}

SFI_KERNEL(sfi_scan_choose)
SFI_KERNEL(sfi_scan_take_out)
SFI_KERNEL_AS("sfi_scan_again_1_2", sfi_scan_again<1, 2>)
SFI_KERNEL_AS("sfi_scan_again_2_2", sfi_scan_again<2, 2>)
SFI_KERNEL_AS("sfi_scan_again_4_2", sfi_scan_again<4, 2>)
SFI_KERNEL_AS("sfi_scan_again_8_2", sfi_scan_again<8, 2>)
SFI_KERNEL_AS("sfi_scan_again_1_8", sfi_scan_again<1, 8>)
SFI_KERNEL_AS("sfi_scan_again_2_8", sfi_scan_again<2, 8>)
SFI_KERNEL_AS("sfi_scan_again_4_8", sfi_scan_again<4, 8>)
SFI_KERNEL_AS("sfi_scan_again_8_8", sfi_scan_again<8, 8>)
