// The score of arXiv 2603.12038, by which GGML_SUPPORT_SELECTOR_PAPER selects.
//
//   pass 1  logs of evidence and prior, and per chunk of cells the maximum and the sum of what they are the logs of
//   pass 2  both as distributions f and r, and per chunk how far they are apart
//   pass 3  fused: the log score
//   pass 4  soft non-maximum suppression
//   pass 5  KV heads compete for cells
//
// CPUs compute in double. Floats do, for
//   * evidence^(1/alpha) and norm^-gamma, which may leave their range, are logs until they are shares. A share that vanishes is
//     nothing beside the eps of the score.
//   * the weight of the prior is f.(f - r)/|f - r|^2. Made of sums of f.f, f.r and r.r, it would be lost in their rounding where
//     f and r are alike; so would it if the shares of f summed to a little more than those of r. As they should sum to the same,
//     f.f sum(f - r) should be nothing, and taken off it takes that with it. Squares may vanish: f.f is at least 1 over the
//     number of cells, and where |f - r|^2 is nothing beside it, any weight gives the same score.
//   * no sum is of many terms in a row: they are by lanes, chunks, and threads that each take some of the chunks.
//
// f and r lie [n_head_kv, n_list]: f has the log of the evidence, its share, then the log score; r has the log of the prior, its
// share, then the score. of_f and of_r lie [n_head_kv, n_chunks, 2]: the maximum of the logs and the sum relative to it.

#pragma once

#include "gpu.metal"

// -1: no candidate, or a pad
static inline int candidate_cell(constant paper_args & a, device const int * cells, device const int * plan, int j) {
    const bool is_candidate = j >= max(plan[0], 0) && j < min(plan[1], a.n_list);
    const int  cell = is_candidate ? cells[j] : -1;
    return cell < a.n_cells ? cell : -1;
}

static inline float sum_over_row_lanes(float x) {
#pragma unroll
    for (int o = row_lanes/2; o > 0; o >>= 1) {
        x += simd_shuffle_xor(x, (ushort) o);
    }
    return x;
}

// this lane's part of the squares of a row
template <typename T>
static inline float sum_of_squares(device const char * row, int lane, int d) {
    float sum = 0.0f;
    for (int i = lane; i < d/8; i += row_lanes) {
        T o;
        o.load(row, i);
        float x[8];
        o.get(x);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            sum = fma(x[e], x[e], sum);
        }
    }
    return sum;
}

// norms[i]: of the key of candidate first + i
template <typename T>
static inline void key_norms(constant paper_args & a, device const char * k_rows, device const int * cells, device const int * plan,
        int h_kv, int first, threadgroup float * norms, int tid) {
    const int lane = tid % row_lanes;
    for (int i = tid/row_lanes; i < paper_threads; i += paper_threads/row_lanes) {
        const int   cell = candidate_cell(a, cells, plan, first + i);
        const float mine = cell >= 0 ? sum_of_squares<T>(k_rows + cell*a.k_nb1 + h_kv*a.k_nb2, lane, a.d) : 0.0f;
        const float sum  = sum_over_row_lanes(mine);
        if (lane == 0) {
            norms[i] = sqrt(sum);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// u^p; powers of fast math take the log of 0
static inline float power_of_age(float u, float p) {
    return u > 0.0f ? powr(u, p) : p > 0.0f ? 0.0f : p < 0.0f ? 1e30f : 1.0f;
}

// of candidate i of n
static inline float log_prior(constant paper_args & a, float norm, int i, int n) {
    const float u    = n > 1 ? (float) i/(float) (n - 1) : 0.0f;
    const float left = n > 1 ? (float) (n - 1 - i)/(float) (n - 1) : 1.0f; // 1 - u would lose the last digits of the newest cells
    return a.eta*log(left + paper_eps) - a.gamma*log(norm + paper_eps) - a.beta*power_of_age(u, a.p);
}

// the maximum of the logs, and the sum relative to it
static inline void store_chunk_of_logs(float x, device float * chunk, threadgroup float * tmp, int tid, int lane, int sg) {
    const float most = group_max<paper_simds>(x, tmp, lane, sg);
    const float sum  = group_sum<paper_simds>(weight_of(x, most), tmp, lane, sg);
    if (tid == 0) {
        chunk[0] = most;
        chunk[1] = sum;
    }
}

struct paper_shared {
    float norms[paper_threads];
    float tmp[paper_simds];
};

template <typename T>
[[max_total_threads_per_threadgroup(paper_threads)]] kernel void sfi_paper_logs(
        constant paper_args & a       [[buffer(0)]],
        device const float * evidence [[buffer(1)]],
        device const char  * k_rows   [[buffer(2)]],
        device const int   * cells    [[buffer(3)]],
        device const int   * plan     [[buffer(4)]],
        device float       * f_all    [[buffer(5)]],
        device float       * r_all    [[buffer(6)]],
        device float       * of_f     [[buffer(7)]],
        device float       * of_r     [[buffer(8)]],
        SFI_POSITION) {
    SFI_SHARED(paper_shared, sh);
    const int h_kv = block.y, first = block.x*paper_threads, j = first + tid;
    key_norms<T>(a, k_rows, cells, plan, h_kv, first, sh.norms, tid);

    float f = no_logit, r = no_logit;
    if (candidate_cell(a, cells, plan, j) >= 0) {
        const int   j0 = max(plan[0], 0), j1 = min(plan[1], a.n_list);
        const float e  = evidence[h_kv*a.evidence_ld + j];
        f = e > 0.0f ? log(e)/a.alpha : no_logit;
        r = log_prior(a, sh.norms[tid], j - j0, j1 - j0);
    }
    if (j < a.n_list) {
        f_all[(long) h_kv*a.n_list + j] = f;
        r_all[(long) h_kv*a.n_list + j] = r;
    }
    const long chunk = (long) h_kv*a.n_chunks + block.x;
    store_chunk_of_logs(f, of_f + 2*chunk, sh.tmp, tid, lane, sg);
    store_chunk_of_logs(r, of_r + 2*chunk, sh.tmp, tid, lane, sg);
}

// The log of the sum over all chunks; where there is nothing, 0, as there are no logs then.
static inline float log_of_sum(device const float * chunks, int n, threadgroup float * tmp, int tid, int lane, int sg) {
    float most = no_logit, sum = 0.0f;
    for (int c = tid; c < n; c += paper_threads) {
        most = max(most, chunks[2*c]);
    }
    most = group_max<paper_simds>(most, tmp, lane, sg);
    for (int c = tid; c < n; c += paper_threads) {
        sum += chunks[2*c + 1]*weight_of(chunks[2*c], most);
    }
    sum = group_sum<paper_simds>(sum, tmp, lane, sg);
    return sum > 0.0f ? most + log(sum) : 0.0f;
}

static inline float4 group_sums(float4 x, threadgroup float * tmp, int lane, int sg) {
    x.x = group_sum<paper_simds>(x.x, tmp, lane, sg);
    x.y = group_sum<paper_simds>(x.y, tmp, lane, sg);
    x.z = group_sum<paper_simds>(x.z, tmp, lane, sg);
    x.w = group_sum<paper_simds>(x.w, tmp, lane, sg);
    return x;
}

// apart [n_head_kv, n_chunks, 4]: f.(f - r), |f - r|^2, sum(f - r), f.f
[[max_total_threads_per_threadgroup(paper_threads)]] kernel void sfi_paper_shares(
        constant paper_args & a   [[buffer(0)]],
        device const float * of_f [[buffer(1)]],
        device const float * of_r [[buffer(2)]],
        device float * f_all      [[buffer(3)]],
        device float * r_all      [[buffer(4)]],
        device float4 * apart_all [[buffer(5)]],
        SFI_POSITION) {
    SFI_SHARED(paper_shared, sh);
    const int  h_kv = block.y, j = block.x*paper_threads + tid;
    const long chunks = (long) h_kv*a.n_chunks, at = (long) h_kv*a.n_list + j;
    const float all_f = log_of_sum(of_f + 2*chunks, a.n_chunks, sh.tmp, tid, lane, sg);
    const float all_r = log_of_sum(of_r + 2*chunks, a.n_chunks, sh.tmp, tid, lane, sg);

    float f = 0.0f, r = 0.0f;
    if (j < a.n_list) {
        f = weight_of(f_all[at], all_f);
        r = weight_of(r_all[at], all_r);
        f_all[at] = f;
        r_all[at] = r;
    }
    const float4 apart = group_sums(float4(f*(f - r), (f - r)*(f - r), f - r, f*f), sh.tmp, lane, sg);
    if (tid == 0) {
        apart_all[chunks + block.x] = apart;
    }
}

// the weight of the prior that minimises (1-l) KL(f||s) + l KL(r||s)
static inline float fusion_weight(device const float4 * chunks, int n, float clip, threadgroup float * tmp, int tid, int lane, int sg) {
    float4 all = float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int c = tid; c < n; c += paper_threads) {
        const float4 x = chunks[c];
        all = float4(all.x + x.x, all.y + x.y, all.z + x.z, all.w + x.w);
    }
    all = group_sums(all, tmp, lane, sg);
    return all.y > 0.0f ? min(max((all.x - all.w*all.z)/all.y, 0.0f), clip) : 0.0f;
}

[[max_total_threads_per_threadgroup(paper_threads)]] kernel void sfi_paper_fuse(
        constant paper_args & a     [[buffer(0)]],
        device const float4 * apart [[buffer(1)]],
        device const float  * r_all [[buffer(2)]],
        device float        * f_all [[buffer(3)]],
        SFI_POSITION) {
    SFI_SHARED(paper_shared, sh);
    const int   h_kv = block.y, j = block.x*paper_threads + tid;
    const float weight = fusion_weight(apart + (long) h_kv*a.n_chunks, a.n_chunks, a.lambda_clip, sh.tmp, tid, lane, sg);
    if (j < a.n_list) {
        const long at = (long) h_kv*a.n_list + j;
        f_all[at] = log((1.0f - weight)*f_all[at] + weight*r_all[at] + paper_eps);
    }
}

kernel void sfi_paper_nms(
        constant paper_args & a    [[buffer(0)]],
        device const int   * plan  [[buffer(1)]],
        device const float * f_all [[buffer(2)]],
        device float       * r_all [[buffer(3)]],
        SFI_POSITION) {
    const int h_kv = block.y, j = block.x*paper_threads + tid;
    const int j0 = max(plan[0], 0), j1 = min(plan[1], a.n_list);
    if (j < j0 || j >= j1) {
        return;
    }
    device const float * log_score = f_all + (long) h_kv*a.n_list;
    float best = log_score[j];
    for (int i = max(j - a.nms_radius, j0), last = min(j + a.nms_radius, j1 - 1); i <= last; ++i) {
        best = max(best, log_score[i]);
    }
    r_all[(long) h_kv*a.n_list + j] = log_score[j] - a.a_soft*(best - log_score[j]);
}

kernel void sfi_paper_compete(
        constant paper_args & a  [[buffer(0)]],
        device const int * plan  [[buffer(1)]],
        device float     * r_all [[buffer(2)]],
        SFI_POSITION) {
    const int j = block.x*paper_threads + tid;
    if (j < max(plan[0], 0) || j >= min(plan[1], a.n_list)) {
        return;
    }
    device float * z = r_all + j;
    float most = z[0], sum = 0.0f;
    for (int h = 1; h < a.n_head_kv; ++h) {
        most = max(most, z[(long) h*a.n_list]);
    }
    for (int h = 0; h < a.n_head_kv; ++h) {
        sum += exp((z[(long) h*a.n_list] - most)/a.temperature);
    }
    const float of_all = log(sum);
    for (int h = 0; h < a.n_head_kv; ++h) {
        const float x = z[(long) h*a.n_list];
        z[(long) h*a.n_list] = x + a.a_cross*((x - most)/a.temperature - of_all);
    }
}

SFI_KERNEL_AS("sfi_paper_logs_f16",  sfi_paper_logs<octet_f16>)
SFI_KERNEL_AS("sfi_paper_logs_bf16", sfi_paper_logs<octet_bf16>)
SFI_KERNEL_AS("sfi_paper_logs_q8_0", sfi_paper_logs<octet_q8_0>)
SFI_KERNEL_AS("sfi_paper_logs_q4_0", sfi_paper_logs<octet_q4_0>)
SFI_KERNEL(sfi_paper_shares)
SFI_KERNEL(sfi_paper_fuse)
SFI_KERNEL(sfi_paper_nms)
SFI_KERNEL(sfi_paper_compete)
