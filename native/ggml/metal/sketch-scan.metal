// SKETCH_SCAN on Metal.
//
// The codes are read as they lie: a word of a plane of K has one byte for each of four components. The query's whole numbers and
// their products with codes are exact in floats.
//
//   pass 1  the query in the basis of each head, as whole numbers
//   pass 2  per chunk: logits of all cells from the first planes; their maximum and sum
//   pass 3  per chunk: the cells whose share by the first look is large enough, close together and in their order; their logits
//           from all planes, the maximum and the sum of these, and the sums over V
//   pass 4  per KV head: the selected cells
//   pass 5  per query head: take the selected cells out of the sums, and from components back to values
//
// No pass asks the host anything. Of most cells nothing but the first look is ever read. Sums are made in an order that depends on
// nothing but the sizes.

#include "top-k.metal"

static inline float4 codes_of(uint word, constant scan_field & f) {
    return (float4) as_type<uchar4>(word >> f.shift & ((1u << f.bits) - 1)*0x01010101u);
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
        SFI_POSITION) {
    SFI_SHARED(query_shared, sh);
    const int h = block.x, h_kv = h/a.group;
    device const float * q    = (device const float *) (q_rows + h*a.q_nb1);
    device const float * mean = basis + (long) h_kv*a.basis_size;
    device const half  * dec  = (device const half *) (mean + sketch_dec_at(a.n_k, a.d_k));

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
    float base = 0.0f, most = 0.0f, not_finite = 0.0f;
    for (int e = tid; e < a.d_k; e += scan_threads) {
        base = fma(mean[e], q[e], base);
    }
    for (int j = tid; j < a.n_k; j += scan_threads) {
        const bool finite = is_finite(sh.w[j]);
        most       = max(most, finite ? fabs(sh.w[j]) : 0.0f);
        not_finite = finite ? not_finite : 1.0f;
    }
    base = group_sum<scan_simds>(base, sh.tmp, lane, sg);
    most = group_max<scan_simds>(most, sh.tmp, lane, sg);
    not_finite = group_max<scan_simds>(is_finite(base) ? not_finite : 1.0f, sh.tmp, lane, sg);
    const float s = not_finite > 0.0f ? 0.0f : most/127.0f;

    float centre = 0.0f, later = 0.0f; // of the sums of both looks, if every code were at its own
    for (int f = tid; f < a.n_k_fields; f += scan_threads) {
        float whole[4], sum = 0.0f;
        for (int r = 0; r < 4; ++r) {
            whole[r] = s > 0.0f ? rint(min(max(sh.w[4*f + r]/s, -127.0f), 127.0f)) : 0.0f;
            sum     += whole[r]*0.5f*(float) ((1 << a.k[f].bits) - 1);
        }
        centre += f < a.n_first_fields ? sum : 0.0f;
        later  += f < a.n_first_fields ? 0.0f : sum;
        weights[h*a.n_k_fields + f] = float4(whole[0], whole[1], whole[2], whole[3]);
    }
    centre = group_sum<scan_simds>(centre, sh.tmp, lane, sg);
    later  = group_sum<scan_simds>(later, sh.tmp, lane, sg);
    if (tid == 0) {
        factor[3*h]     = a.scale*s;
        factor[3*h + 1] = not_finite > 0.0f ? no_logit : a.scale*(base - s*centre); // then all cells are left out
        factor[3*h + 2] = -a.scale*s*later;
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
    softmax_sum stats[scan_simds][G];
};

// logits [n_head, n_list]; stats [n_head, n_chunks]
template <int G>
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_logits(
        constant scan_args & a         [[buffer(0)]],
        device const char  * codes     [[buffer(1)]],
        device const int   * skip      [[buffer(2)]],
        device const int   * plan      [[buffer(3)]],
        device const float4 * weights  [[buffer(4)]],
        device const float * factor    [[buffer(5)]],
        device float       * logits    [[buffer(6)]],
        device softmax_sum * stats     [[buffer(7)]],
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
        const softmax_sum all = simd_merge(sum_of(most[g], sum[g]));
        if (lane == 0) {
            sh.stats[sg][g] = all;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < a.group) {
        softmax_sum all = no_cells();
        for (int i = 0; i < scan_simds; ++i) {
            all = merge(all, sh.stats[i][tid]);
        }
        stats[(long) (h0 + tid)*a.n_chunks + chunk] = all;
    }
}

// ---- pass 3: a threadgroup for each chunk ----------------------------------------------------------------------------------

// of a head by the first look, by one simdgroup
static inline softmax_sum merge_stats(device const softmax_sum * stats, int n_chunks, int lane) {
    softmax_sum all = no_cells();
    for (int c = lane; c < n_chunks; c += simd_size) {
        all = merge(all, stats[c]);
    }
    return simd_merge(all);
}

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
                    const int  bit  = 8*sketch_record_v(a.format) + sketch_bit_of_v(a.format, j); // of a record
                    const uint mask = (1u << sketch_bits_v(a.format, j)) - 1;
                    uint word[cells_under_way];
#pragma unroll
                    for (int u = 0; u < cells_under_way; ++u) { // all loads before the first use
                        const int i = i0 + u*step;
                        word[u] = i < n ? ((device const uint *) (records + (long) cells[i]*a.record_bytes))[bit/32] : 0u;
                    }
#pragma unroll
                    for (int u = 0; u < cells_under_way; ++u) {
                        const int i = i0 + u*step;
                        if (i < n) {
                            const float code = (float) (word[u] >> bit % 32 & mask);
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

template <int G, int V>
struct again_shared {
    float4 w[G*max_k_fields];    // [field, head], of the fields that the first look left
    float  x[G*scan_threads];    // [head, cell]: weights of a tile
    int    cells[max_chunk];     // those that are looked at again
    softmax_sum first[G];        // of the first look, the inverse of the sum
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
                share[g] = weight_of(x, sh.first[g].most)*sh.first[g].sum;
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
// one after the other where the chunk begins; n_again [n_head_kv, n_chunks]; again [n_head, n_chunks]; kept [n_head, n_chunks]: their
// share by the first look; values [n_head, n_chunks, n_v]: sum of their codes of V times exp(logit - maximum)
template <int G, int V>
[[max_total_threads_per_threadgroup(scan_threads)]] kernel void sfi_scan_again(
        constant scan_args & a          [[buffer(0)]],
        device const char   * codes     [[buffer(1)]],
        device const int    * plan      [[buffer(2)]],
        device const float4 * weights   [[buffer(3)]],
        device const float  * factor    [[buffer(4)]],
        device const softmax_sum * stats [[buffer(5)]],
        device float        * logits_all [[buffer(6)]],
        device int          * cells     [[buffer(7)]],
        device int          * n_again   [[buffer(8)]],
        device softmax_sum  * again     [[buffer(9)]],
        device float        * kept_all  [[buffer(10)]],
        device float        * values    [[buffer(11)]],
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
        const softmax_sum all = merge_stats(stats + (long) (h0 + sg)*a.n_chunks, a.n_chunks, lane);
        if (lane == 0) {
            sh.first[sg] = sum_of(all.most, all.sum > 0.0f ? 1.0f/all.sum : 0.0f);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float kept[G], most[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        most[g] = no_logit;
        kept[g] = sum[g] = 0.0f;
    }
    const float least = a.second_look/(float) min(max(plan[0], 1), mean_cells);
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
                again[at]    = sum_of(most[g], sum[g]);
                kept_all[at] = kept[g];
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

struct listed_items {
    device const uint2 * listed;
    uint key(int i) const { return listed[i].x; }
    uint number(int i) const { return listed[i].y; }
};

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
static inline head_sums add_up(device const softmax_sum * stats, device const softmax_sum * again, device const float * kept, int n_chunks, int lane) {
    const softmax_sum first = merge_stats(stats, n_chunks, lane), all = merge_stats(again, n_chunks, lane);
    float seen = 0.0f;
    for (int c = lane; c < n_chunks; c += simd_size) {
        seen += kept[c];
    }
    // a share that may be nothing but rounding errors counts for nothing, lest it outweigh cells that mattered less than the first
    // look said
    const float unseen = 1.0f - simd_sum(seen);
    head_sums s;
    s.top_first = first.most;
    s.top       = all.most;
    s.weight    = all.sum;
    s.others    = unseen > least_unseen ? unseen*first.sum : 0.0f;
    s.lse       = log_of(merge(all, sum_of(first.most, s.others)));
    return s;
}

// one that is no number is above all shares
static inline float least_share(constant scan_args & a, device const float * least, int h_kv) {
    return !a.has_least ? 0.0f : is_finite(least[h_kv]) ? least[h_kv] : 2.0f;
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
        device const softmax_sum * stats [[buffer(3)]],
        device const int   * n_again   [[buffer(4)]],
        device const softmax_sum * again [[buffer(5)]],
        device const float * kept      [[buffer(6)]],
        device const int   * cells_all [[buffer(7)]],
        device head_sums   * sums      [[buffer(8)]],
        device uint2       * listed_all [[buffer(9)]],
        device int         * selected_all [[buffer(10)]],
        device int         * counts    [[buffer(11)]],
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
        const head_sums s  = add_up(stats + at, again + at, kept + at, a.n_chunks, lane);
        if (lane == 0) {
            sums[h0 + sg] = s;
            sh.lse[sg]    = s.lse;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int n_listed = list_best(a, logits + (long) h0*a.n_list, least_share(a, least_all, h_kv), listed, sh, tid, lane, sg);
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
static inline void add_chunks(constant scan_args & a, device const softmax_sum * again, device const float * values, float top,
        thread head_values & v, int lane, int sg) {
    for (int c = sg; c < a.n_chunks; c += scan_simds) {
        const float w = weight_of(again[c].most, top);
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

// value e of V with the components scale*(those given) - centres*(centre of each)
static inline float decoded_v(constant scan_args & a, device const float * basis, int h_kv, threadgroup const float * components,
        float scale, float centres, int e) {
    device const float * mean = basis + (long) (h_kv + 1)*a.basis_size - sketch_half_size(a.n_v, a.d_v);
    device const half  * dec  = (device const half *) (mean + sketch_dec_at(a.n_v, a.d_v));
    float y = mean[e];
    for (int j = 0; j < a.n_v; ++j) {
        y = fma(components[j]*scale - centres*0.5f*(float) ((1 << sketch_bits_v(a.format, j)) - 1), (float) dec[(long) j*a.d_v + e], y);
    }
    return y;
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
        device const softmax_sum * again [[buffer(8)]],
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
    add_chunks(a, again + at, values + at*a.n_v, s.top, all, lane, sg);
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
    const bool none = counts[2*h_kv] == counts[2*h_kv + 1] && s.others == 0.0f; // where nothing is left, rounding errors would be
    write_tail(a, basis, h_kv, s, none ? 0.0f : s.weight - of_taken, sh.z[0], out + (long) h*(a.d_v + 1), tid);
}

SFI_KERNEL(sfi_scan_query)
SFI_KERNEL_AS("sfi_scan_logits_1", sfi_scan_logits<1>)
SFI_KERNEL_AS("sfi_scan_logits_2", sfi_scan_logits<2>)
SFI_KERNEL_AS("sfi_scan_logits_4", sfi_scan_logits<4>)
SFI_KERNEL_AS("sfi_scan_logits_8", sfi_scan_logits<8>)
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
