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

#include "paper-score.cuh"

#include <algorithm>

namespace sfi_cuda {

constexpr int   paper_threads = 256;
constexpr int   paper_warps   = paper_threads/warp_size;
constexpr int   row_lanes     = 8; // that read a row of K together
constexpr float paper_eps     = 1e-8f;

struct paper_args {
    const float * evidence;
    const char * k;
    const int32_t * cells, * plan;
    float * f;         // [n_head_kv, n_list]: log of evidence, its share, log score
    float * r;         // [n_head_kv, n_list]: log of prior, its share, score
    float2 * of_f;     // [n_head_kv, n_chunks]: maximum of logs, sum relative to it
    float2 * of_r;     // likewise
    float4 * apart;    // [n_head_kv, n_chunks]: f.(f - r), |f - r|^2, sum(f - r), f.f
    int64_t evidence_ld, k_nb1, k_nb2;
    int d, n_list, n_cells, n_head_kv, n_chunks;
    ggml_support_selector s;
};

struct candidates {
    int j0, j1;
    __device__ explicit candidates(const paper_args & a) : j0(max(a.plan[0], 0)), j1(min(a.plan[1], a.n_list)) {}
    __device__ bool has(int j) const { return j >= j0 && j < j1; }
};

// -1: no candidate, or a pad
static __device__ __forceinline__ int candidate_cell(const paper_args & a, const candidates & c, int j) {
    const int cell = c.has(j) ? a.cells[j] : -1;
    return cell < a.n_cells ? cell : -1;
}

// this lane's part of the squares of a row
template <ggml_type T>
static __device__ __forceinline__ float sum_of_squares(const char * row, int lane, int d) {
    float sum = 0.0f;
    for (int i = lane; i < d/8; i += row_lanes) {
        octet<T> o;
        o.load(row, i);
        float x[8], squares = 0.0f;
        o.get(x);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            squares = fmaf(x[e], x[e], squares);
        }
        sum = fmaf(o.scale()*o.scale(), squares, sum);
    }
    return sum;
}

// norms[i]: of the key of candidate first + i
template <ggml_type T>
static __device__ void key_norms(const paper_args & a, const candidates & c, int h_kv, int first, float * norms) {
    const int lane = threadIdx.x % row_lanes;
    for (int i = threadIdx.x/row_lanes; i < paper_threads; i += paper_threads/row_lanes) {
        const int   cell = candidate_cell(a, c, first + i);
        const float mine = cell >= 0 ? sum_of_squares<T>(a.k + cell*a.k_nb1 + h_kv*a.k_nb2, lane, a.d) : 0.0f;
        const float sum  = warp_sum<row_lanes>(mine);
        if (lane == 0) {
            norms[i] = sqrtf(sum);
        }
    }
    __syncthreads();
}

// u^p; powers of fast math take the log of 0
static __device__ __forceinline__ float power_of_age(float u, float p) {
    return u > 0.0f ? powf(u, p) : p > 0.0f ? 0.0f : p < 0.0f ? 1e30f : 1.0f;
}

// of candidate i of n
static __device__ float log_prior(const ggml_support_selector & s, float norm, int i, int n) {
    const float u    = n > 1 ? (float) i/(float) (n - 1) : 0.0f;
    const float left = n > 1 ? (float) (n - 1 - i)/(float) (n - 1) : 1.0f; // 1 - u would lose the last digits of the newest cells
    return s.eta*logf(left + paper_eps) - s.gamma*logf(norm + paper_eps) - s.beta*power_of_age(u, s.p);
}

static __device__ float2 chunk_of_logs(float x, float * tmp) {
    const float most = block_max<paper_warps>(x, tmp);
    return make_float2(most, block_sum<paper_warps>(weight_of(x, most), tmp));
}

template <ggml_type T>
static __global__ void __launch_bounds__(paper_threads) paper_logs_kernel(const paper_args a) {
    follow_previous();
    __shared__ float norms[paper_threads], tmp[paper_warps];
    const int h_kv = blockIdx.y, first = blockIdx.x*paper_threads, j = first + threadIdx.x;
    const candidates c(a);
    key_norms<T>(a, c, h_kv, first, norms);

    float f = -INFINITY, r = -INFINITY;
    if (candidate_cell(a, c, j) >= 0) {
        const float e = a.evidence[h_kv*a.evidence_ld + j];
        f = e > 0.0f ? logf(e)/a.s.alpha : -INFINITY;
        r = log_prior(a.s, norms[threadIdx.x], j - c.j0, c.j1 - c.j0);
    }
    if (j < a.n_list) {
        a.f[(int64_t) h_kv*a.n_list + j] = f;
        a.r[(int64_t) h_kv*a.n_list + j] = r;
    }
    const float2 of_f = chunk_of_logs(f, tmp), of_r = chunk_of_logs(r, tmp);
    if (threadIdx.x == 0) {
        a.of_f[h_kv*a.n_chunks + blockIdx.x] = of_f;
        a.of_r[h_kv*a.n_chunks + blockIdx.x] = of_r;
    }
}

// The log of the sum over all chunks; where there is nothing, 0, as all logs are -INFINITY then.
static __device__ float log_of_sum(const float2 * chunks, int n, float * tmp) {
    float most = -INFINITY, sum = 0.0f;
    for (int c = threadIdx.x; c < n; c += paper_threads) {
        most = fmaxf(most, chunks[c].x);
    }
    most = block_max<paper_warps>(most, tmp);
    for (int c = threadIdx.x; c < n; c += paper_threads) {
        sum += chunks[c].y*weight_of(chunks[c].x, most);
    }
    sum = block_sum<paper_warps>(sum, tmp);
    return sum > 0.0f ? most + logf(sum) : 0.0f;
}

static __device__ float4 block_sums(float4 x, float * tmp) {
    x.x = block_sum<paper_warps>(x.x, tmp);
    x.y = block_sum<paper_warps>(x.y, tmp);
    x.z = block_sum<paper_warps>(x.z, tmp);
    x.w = block_sum<paper_warps>(x.w, tmp);
    return x;
}

static __global__ void __launch_bounds__(paper_threads) paper_shares_kernel(const paper_args a) {
    follow_previous();
    __shared__ float tmp[paper_warps];
    const int h_kv = blockIdx.y, j = blockIdx.x*paper_threads + threadIdx.x;
    const float all_f = log_of_sum(a.of_f + h_kv*a.n_chunks, a.n_chunks, tmp);
    const float all_r = log_of_sum(a.of_r + h_kv*a.n_chunks, a.n_chunks, tmp);

    float f = 0.0f, r = 0.0f;
    if (j < a.n_list) {
        const int64_t at = (int64_t) h_kv*a.n_list + j;
        a.f[at] = f = weight_of(a.f[at], all_f);
        a.r[at] = r = weight_of(a.r[at], all_r);
    }
    const float4 apart = block_sums(make_float4(f*(f - r), (f - r)*(f - r), f - r, f*f), tmp);
    if (threadIdx.x == 0) {
        a.apart[h_kv*a.n_chunks + blockIdx.x] = apart;
    }
}

// the weight of the prior that minimises (1-l) KL(f||s) + l KL(r||s)
static __device__ float fusion_weight(const float4 * chunks, int n, float clip, float * tmp) {
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int c = threadIdx.x; c < n; c += paper_threads) {
        const float4 x = chunks[c];
        all = make_float4(all.x + x.x, all.y + x.y, all.z + x.z, all.w + x.w);
    }
    all = block_sums(all, tmp);
    return all.y > 0.0f ? fminf(fmaxf((all.x - all.w*all.z)/all.y, 0.0f), clip) : 0.0f;
}

static __global__ void __launch_bounds__(paper_threads) paper_fuse_kernel(const paper_args a) {
    follow_previous();
    __shared__ float tmp[paper_warps];
    const int h_kv = blockIdx.y, j = blockIdx.x*paper_threads + threadIdx.x;
    const float weight = fusion_weight(a.apart + h_kv*a.n_chunks, a.n_chunks, a.s.lambda_clip, tmp);
    if (j < a.n_list) {
        const int64_t at = (int64_t) h_kv*a.n_list + j;
        a.f[at] = logf((1.0f - weight)*a.f[at] + weight*a.r[at] + paper_eps);
    }
}

static __global__ void __launch_bounds__(paper_threads) paper_nms_kernel(const paper_args a) {
    follow_previous();
    const int h_kv = blockIdx.y, j = blockIdx.x*paper_threads + threadIdx.x;
    const candidates c(a);
    if (!c.has(j)) {
        return;
    }
    const float * log_score = a.f + (int64_t) h_kv*a.n_list;
    float best = log_score[j];
#pragma unroll 8
    for (int i = max(j - a.s.nms_radius, c.j0), last = min(j + a.s.nms_radius, c.j1 - 1); i <= last; ++i) {
        best = fmaxf(best, log_score[i]);
    }
    a.r[(int64_t) h_kv*a.n_list + j] = log_score[j] - a.s.a_soft*(best - log_score[j]);
}

static __global__ void __launch_bounds__(paper_threads) paper_compete_kernel(const paper_args a) {
    follow_previous();
    const int j = blockIdx.x*paper_threads + threadIdx.x;
    if (!candidates(a).has(j)) {
        return;
    }
    float * z = a.r + j;
    float most = z[0], sum = 0.0f;
    for (int h = 1; h < a.n_head_kv; ++h) {
        most = fmaxf(most, z[(int64_t) h*a.n_list]);
    }
    for (int h = 0; h < a.n_head_kv; ++h) {
        sum += expf((z[(int64_t) h*a.n_list] - most)/a.s.temperature);
    }
    const float of_all = logf(sum);
    for (int h = 0; h < a.n_head_kv; ++h) {
        const float x = z[(int64_t) h*a.n_list];
        z[(int64_t) h*a.n_list] = x + a.s.a_cross*((x - most)/a.s.temperature - of_all);
    }
}

bool paper_score_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[3];
    return is_kv_type(k->type) && k->ne[0] % 8 == 0 && k->ne[0] % ggml_blck_size(k->type) == 0 && has_aligned_rows(k) && k->ne[2] <= 65535;
}

static size_t take_scratch(paper_args & a, char * base) {
    scratch_parts parts { base };
    parts.take(a.f,     (int64_t) a.n_head_kv*a.n_list);
    parts.take(a.r,     (int64_t) a.n_head_kv*a.n_list);
    parts.take(a.of_f,  (int64_t) a.n_head_kv*a.n_chunks);
    parts.take(a.of_r,  (int64_t) a.n_head_kv*a.n_chunks);
    parts.take(a.apart, (int64_t) a.n_head_kv*a.n_chunks);
    return parts.used;
}

static paper_args paper_args_of(const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * k = dst->src[3];
    paper_args a = {};
    a.evidence    = (const float *) evidence->data;
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.cells       = (const int32_t *) dst->src[1]->data;
    a.plan        = (const int32_t *) dst->src[2]->data;
    a.k           = (const char *) k->data; a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.d           = (int) k->ne[0];
    a.n_cells     = (int) k->ne[1];
    a.n_list      = (int) evidence->ne[0];
    a.n_head_kv   = (int) evidence->ne[1];
    a.n_chunks    = (int) std::max<int64_t>(n_chunks(a.n_list, paper_threads), 1);
    a.s           = selector_of(dst);
    a.s.nms_radius = std::min(a.s.nms_radius, a.n_list);
    return a;
}

size_t paper_score_scratch(const ggml_tensor * dst) {
    paper_args a = paper_args_of(dst);
    return take_scratch(a, nullptr);
}

template <ggml_type T>
static void launch_logs(const gpu & g, const paper_args & a, dim3 grid) {
    SFI_LAUNCH((paper_logs_kernel<T>), grid, dim3(paper_threads), g.stream, a);
}

const float * paper_score(const gpu & g, const ggml_tensor * dst, char * scratch) {
    paper_args a = paper_args_of(dst);
    take_scratch(a, scratch);
    const dim3 grid(a.n_chunks, a.n_head_kv), block(paper_threads);
    with_kv_type(dst->src[3]->type, [&](auto type) { launch_logs<decltype(type)::value>(g, a, grid); });
    SFI_LAUNCH(paper_shares_kernel, grid, block, g.stream, a);
    SFI_LAUNCH(paper_fuse_kernel,   grid, block, g.stream, a);
    SFI_LAUNCH(paper_nms_kernel,    grid, block, g.stream, a);
    if (a.n_head_kv > 2) {
        SFI_LAUNCH(paper_compete_kernel, dim3(a.n_chunks), block, g.stream, a);
    }
    return a.r;
}

} // namespace sfi_cuda
