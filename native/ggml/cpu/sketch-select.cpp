// GGML_OP_SKETCH_SELECT on the CPU.
//
// z = the largest over the heads of a group of the logarithm of softmax is known as soon as the log-sum-exps are, and
// log score lies between z - log(group) and z. So with T no larger than the n_selected-th largest z, cells of
// z < T - log(group) cannot be selected, and few others remain to be scored.
//
//   pass 1  each head's logits, run by run of cells: the sum of exp, and the largest of each 16th of the run
//   pass 2  per KV head: log-sum-exps, T from the largest z of the 16ths
//   pass 3  the candidates, from the runs that reach the threshold
//   pass 4  their scores, and the best of them
//
// Threads share out the runs, then the KV heads.

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "simd.h"
#include "top-k.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace {

constexpr int64_t run_cells = 256;
constexpr int     parts     = 16;         // of a run; part i has the cells i, 16 + i, 32 + i ...
constexpr float   log2e     = 1.44269504f;
constexpr float   margin    = 1e-4f;      // of T, against rounding errors

struct task;
using sum_fn  = void  (*)(const float * x, int n, float * largest, float & max, float & sum);
using lse_fn  = float (*)(const float * max, const float * sum, int n);
using scan_fn = int64_t (*)(const task & a, int64_t h_kv, const float * lse, const float * reach, float threshold, int32_t * cell, float * z);
using rate_fn = void  (*)(const task & a, int64_t h_kv, const float * lse, float top, const int32_t * cell, int64_t n, float * score);

struct kernels {
    sum_fn  sum_run;
    lse_fn  log_sum_exp;
    scan_fn scan;
    rate_fn rate;
};

struct task {
    const ggml_tensor * logits;
    const float * least;         // [n_head_kv] or null
    int64_t n_list, n_head_kv, group, n_runs, ld_runs, ith;
    float * run_max, * run_sum;  // [n_head, ld_runs], padded with -INFINITY and 0
    float * largest;             // [n_head, n_runs, parts]
    // of this thread
    float    * part_z;           // [n_runs, parts]
    float    * reach;            // [ld_runs]: the largest z of a run
    float    * z, * lse;         // [n_list]; [group]
    int32_t  * cell;             // [n_list]
    uint32_t * key;              // [n_list]

    task(const ggml_compute_params * params, const ggml_tensor * dst) : logits(dst->src[0]), ith(params->ith) {
        least     = dst->src[1] ? (const float *) dst->src[1]->data : nullptr;
        n_list    = logits->ne[0];
        n_head_kv = dst->ne[1];
        group     = logits->ne[1]/n_head_kv;
        n_runs    = (n_list + run_cells - 1)/run_cells;
        ld_runs   = GGML_PAD(n_runs, 16);
        run_max   = (float *) params->wdata;
        run_sum   = run_max + logits->ne[1]*ld_runs;
        largest   = run_sum + logits->ne[1]*ld_runs;
        part_z    = largest + logits->ne[1]*n_runs*parts + params->ith*thread_size(dst);
        reach     = part_z + n_runs*parts;
        z         = reach + ld_runs;
        cell      = (int32_t  *) (z + n_list);
        key       = (uint32_t *) (cell + n_list);
        lse       = (float *) (key + n_list);
    }

    static int64_t shared_size(const ggml_tensor * dst) {
        const int64_t n_runs = (dst->src[0]->ne[0] + run_cells - 1)/run_cells;
        return dst->src[0]->ne[1]*(2*GGML_PAD(n_runs, 16) + n_runs*parts);
    }
    static int64_t thread_size(const ggml_tensor * dst) {
        const int64_t n_list = dst->src[0]->ne[0], n_runs = (n_list + run_cells - 1)/run_cells;
        return n_runs*parts + GGML_PAD(n_runs, 16) + 3*n_list + GGML_PAD(dst->src[0]->ne[1]/dst->ne[1], 16) + 16;
    }
    const float * logits_of(int64_t h) const { return (const float *) ((const char *) logits->data + h*logits->nb[1]); }
    int64_t run_size(int64_t run) const { return std::min(run_cells, n_list - run*run_cells); }
};

// pass 1, n cells, a multiple of 16
template <class F>
void sum_run(const float * x, int n, float * largest, float & max, float & sum) {
    typename F::V most[parts/F::W];
    SFI_UNROLL
    for (int i = 0; i < parts/F::W; ++i) {
        most[i] = F::load(x + i*F::W);
    }
    for (int c = parts; c < n; c += parts) {
        SFI_UNROLL
        for (int i = 0; i < parts/F::W; ++i) {
            most[i] = F::max(most[i], F::load(x + c + i*F::W));
        }
    }
    for (int i = 0; i < parts/F::W; ++i) {
        F::store(largest + i*F::W, most[i]);
    }
    max = *std::max_element(largest, largest + parts);
    sum = 0.0f;
    if (max == -INFINITY) {
        return;
    }
    const typename F::V shift = F::set1(-max), scale = F::set1(log2e);
    typename F::V total[2] = { F::zero(), F::zero() };
    for (int c = 0; c + 2*F::W <= n; c += 2*F::W) {
        SFI_UNROLL
        for (int i = 0; i < 2; ++i) {
            total[i] = F::add(total[i], F::exp2(F::mul(F::add(F::load(x + c + i*F::W), shift), scale)));
        }
    }
    if (n % (2*F::W) != 0) {
        total[0] = F::add(total[0], F::exp2(F::mul(F::add(F::load(x + n - F::W), shift), scale)));
    }
    float out[4];
    F::sum4(total[0], total[1], F::zero(), F::zero(), out);
    sum = out[0] + out[1];
}

// pass 2: of n runs, padded
template <class F>
float log_sum_exp(const float * max, const float * sum, int n) {
    const float top = *std::max_element(max, max + n);
    if (top == -INFINITY) {
        return top;
    }
    const typename F::V shift = F::set1(-top), scale = F::set1(log2e);
    typename F::V total = F::zero();
    for (int i = 0; i < n; i += F::W) {
        total = F::fma(F::load(sum + i), F::exp2(F::mul(F::add(F::load(max + i), shift), scale)), total);
    }
    float out[4];
    F::sum4(total, F::zero(), F::zero(), F::zero(), out);
    return top + std::log(out[0]);
}

// pass 3: the cells with z >= threshold and their z, in order; returns how many
template <class F>
int64_t scan(const task & a, int64_t h_kv, const float * lse, const float * reach, float threshold, int32_t * cell, float * z) {
    int64_t n = 0;
    const typename F::V bound = F::set1(threshold);
    for (int64_t run = 0; run < a.n_runs; ++run) {
        if (reach[run] < threshold) {
            continue;
        }
        for (int64_t c = run*run_cells; c < run*run_cells + a.run_size(run); c += F::W) {
            typename F::V most = F::add(F::load(a.logits_of(h_kv*a.group) + c), F::set1(-lse[0]));
            for (int64_t g = 1; g < a.group; ++g) {
                most = F::max(most, F::add(F::load(a.logits_of(h_kv*a.group + g) + c), F::set1(-lse[g])));
            }
            uint32_t hits = F::ge(most, bound);
            if (hits != 0) {
                float lanes[F::W];
                F::store(lanes, most);
                for (int i = 0; hits != 0; ++i, hits >>= 1) {
                    cell[n] = (int32_t) c + i;
                    z[n]    = lanes[i];
                    n += hits & 1;
                }
            }
        }
    }
    return n;
}

// pass 4: scores of some cells, over the largest exp(z) that they need to be compared by, n padded to a vector
template <class F>
void rate(const task & a, int64_t h_kv, const float * lse, float top, const int32_t * cell, int64_t n, float * score) {
    const typename F::V scale = F::set1(log2e), most = F::set1(80.0f*log2e);
    for (int64_t i = 0; i < n; i += F::W) {
        typename F::V sum = F::zero();
        for (int64_t g = 0; g < a.group; ++g) {
            const float * x = a.logits_of(h_kv*a.group + g);
            float some[F::W];
            for (int j = 0; j < F::W; ++j) {
                some[j] = x[cell[std::min(i + j, n - 1)]];
            }
            const typename F::V t = F::mul(F::add(F::load(some), F::set1(-lse[g] - top)), scale);
            sum = F::add(sum, F::exp2(F::min(t, most)));
        }
        F::store(score + i, sum);
    }
}

template <class F> kernels kernels_of() { return { sum_run<F>, log_sum_exp<F>, scan<F>, rate<F> }; }

kernels kernels_for(sfi::simd path) {
    switch (path) {
#if defined(SFI_AVX512)
        case sfi::simd::avx512: return kernels_of<sfi::avx512>();
#endif
#if defined(SFI_AVX2)
        case sfi::simd::avx2:   return kernels_of<sfi::avx2>();
#endif
#if defined(SFI_NEON)
        case sfi::simd::neon:   return kernels_of<sfi::neon>();
#endif
        default:                return kernels_of<sfi::scalar>();
    }
}

// the k-th largest of n values, n >= k; key: room for n
float kth_value(const float * x, int64_t n, int64_t k, uint32_t * key) {
    for (int64_t i = 0; i < n; ++i) {
        key[i] = sfi::sortable(x[i]);
    }
    const sfi::threshold t = sfi::kth_largest_key(key, n, k);
    return sfi::from_sortable(t.n_equal > 0 ? t.key : t.key + 1);
}

// pass 2: a lower bound of the k-th largest z. The largest z of n parts are z of n cells.
float lower_bound(const task & a, int64_t k) {
    const int64_t n = a.n_runs*parts;
    if (k > n) {
        return -INFINITY;
    }
    if (k > a.n_runs) {
        return kth_value(a.part_z, n, k, a.key);
    }
    // the k-th largest of the runs is a bound too, below which no part needs to be looked at
    const float bound = kth_value(a.reach, a.n_runs, k, a.key);
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        a.z[m] = a.part_z[i];
        m += a.part_z[i] >= bound;
    }
    return kth_value(a.z, m, k, a.key);
}

void select_of_head(const task & a, const kernels & f, int64_t h_kv, int32_t * out, int64_t n_selected) {
    // pass 2
    float * lse = a.lse;
    for (int64_t g = 0; g < a.group; ++g) {
        const int64_t h = h_kv*a.group + g;
        lse[g] = f.log_sum_exp(a.run_max + h*a.ld_runs, a.run_sum + h*a.ld_runs, (int) a.ld_runs);
        lse[g] = lse[g] == -INFINITY ? 0.0f : lse[g];
        const float * largest = a.largest + h*a.n_runs*parts;
        for (int64_t i = 0; i < a.n_runs*parts; ++i) {
            a.part_z[i] = g == 0 ? largest[i] - lse[g] : std::max(a.part_z[i], largest[i] - lse[g]);
        }
    }
    for (int64_t run = 0; run < a.n_runs; ++run) {
        a.reach[run] = *std::max_element(a.part_z + run*parts, a.part_z + (run + 1)*parts);
    }
    const int64_t k_max = std::min(n_selected, a.n_list);
    const float   slack = std::log((float) a.group) + margin;

    // pass 3; a cell of -INFINITY is no candidate
    float t = std::max({ lower_bound(a, k_max) - slack, a.least ? std::log(a.least[h_kv]) : -FLT_MAX, -FLT_MAX });
    int64_t n = f.scan(a, h_kv, lse, a.reach, t, a.cell, a.z);
    const int64_t k = std::min(k_max, n);
    int64_t n_out = 0;
    if (k == n) {
        n_out = n;
        std::copy(a.cell, a.cell + n, out);
    } else if (k > 0) {
        // pass 4: the k-th largest z itself leaves fewer
        const float top = kth_value(a.z, n, k, a.key);
        int64_t m = 0;
        for (int64_t i = 0; i < n; ++i) {
            a.cell[m] = a.cell[i];
            a.z[m]    = a.z[i];
            m += a.z[i] >= top - slack;
        }
        if (a.group > 1) {
            f.rate(a, h_kv, lse, top, a.cell, m, a.z);
        }
        for (int64_t i = 0; i < m; ++i) {
            a.key[i] = sfi::sortable(a.z[i]);
        }
        sfi::threshold best = sfi::kth_largest_key(a.key, m, k);
        for (int64_t i = 0; n_out < k; ++i) {
            if (a.key[i] > best.key || (a.key[i] == best.key && best.n_equal-- > 0)) {
                out[n_out++] = a.cell[i];
            }
        }
    }
    std::fill(out + n_out, out + n_selected, -1);
}

} // namespace

void sfi::sketch_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const kernels f = kernels_for(simd_for(params->use_ref));
    const int64_t ith = params->ith, nth = params->nth;

    const int64_t n_items = a.logits->ne[1]*a.ld_runs;
    for (int64_t i = n_items*ith/nth; i < n_items*(ith + 1)/nth; ++i) {
        const int64_t h = i/a.ld_runs, run = i % a.ld_runs;
        if (run < a.n_runs) {
            f.sum_run(a.logits_of(h) + run*run_cells, (int) a.run_size(run), a.largest + (h*a.n_runs + run)*parts, a.run_max[i], a.run_sum[i]);
        } else {
            a.run_max[i] = -INFINITY;
            a.run_sum[i] = 0.0f;
        }
    }
    ggml_barrier(params->threadpool);

    for (int64_t h = ith; h < a.n_head_kv; h += nth) {
        select_of_head(a, f, h, (int32_t *) ((char *) dst->data + h*dst->nb[1]), dst->ne[0]);
    }
}

size_t sfi::sketch_select_work_size(const ggml_tensor * dst, int n_threads) {
    return (task::shared_size(dst) + n_threads*task::thread_size(dst))*sizeof(float);
}
