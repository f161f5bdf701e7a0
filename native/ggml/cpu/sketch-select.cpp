// GGML_OP_SKETCH_SELECT on the CPU.
//
//   pass 1  each head's maximum and sum of exp, run by run of cells
//   pass 2  each head's log-sum-exp; the log of a cell's score, summed over the group
//   pass 3  the best cells of each KV head, by radix select
//
// Runs are shared out between the threads, in pass 3 the KV heads; a barrier separates the passes.

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "top-k.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t run_cells = 256;

struct task {
    const ggml_tensor * logits;
    int64_t n_list, n_head_kv, group, n_runs;
    sfi::tile_ops ops;
    float * score;               // [n_head_kv, n_list]
    float * run_max, * run_sum;  // [n_head, n_runs]

    task(const ggml_compute_params * params, const ggml_tensor * dst) :
            logits(dst->src[0]), ops(sfi::tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, params->use_ref)) {
        n_list    = logits->ne[0];
        n_head_kv = dst->ne[1];
        group     = logits->ne[1]/n_head_kv;
        n_runs    = runs_of(n_list);
        score     = (float *) params->wdata;
        run_max   = score + n_head_kv*n_list;
        run_sum   = run_max + n_head_kv*group*n_runs;
    }

    static int64_t runs_of(int64_t n_list) { return (n_list + run_cells - 1)/run_cells; }
    const float * logits_of(int64_t h) const { return (const float *) ((const char *) logits->data + h*logits->nb[1]); }
    int64_t run_size(int64_t run) const { return std::min(run_cells, n_list - run*run_cells); }
};

// pass 1
void sum_run(const task & a, int64_t h, int64_t run) {
    const int n = (int) a.run_size(run); // a multiple of 16
    float x[run_cells];
    memcpy(x, a.logits_of(h) + run*run_cells, n*sizeof(float));
    const float max = a.ops.max(x, n);
    a.run_max[h*a.n_runs + run] = max;
    a.run_sum[h*a.n_runs + run] = max == -INFINITY ? 0.0f : a.ops.exp(x, n, max);
}

float log_sum_exp(const task & a, int64_t h) {
    const float * max = a.run_max + h*a.n_runs, * sum = a.run_sum + h*a.n_runs;
    const float top = *std::max_element(max, max + a.n_runs);
    double total = 0.0;
    for (int64_t i = 0; i < a.n_runs && top > -INFINITY; ++i) {
        total += sum[i]*std::exp(max[i] - top);
    }
    return top + (float) std::log(total);
}

// pass 2: the largest term is taken out, so that a score cannot underflow
void score_run(const task & a, int64_t h_kv, int64_t run, const float * lse) {
    float * out = a.score + h_kv*a.n_list + run*run_cells;
    for (int64_t i = 0; i < a.run_size(run); ++i) {
        const int64_t c = run*run_cells + i;
        float top = -INFINITY, sum = 0.0f;
        for (int64_t g = 0; g < a.group; ++g) {
            top = std::max(top, a.logits_of(h_kv*a.group + g)[c] - lse[g]);
        }
        for (int64_t g = 0; g < a.group && top > -INFINITY; ++g) {
            sum += std::exp(a.logits_of(h_kv*a.group + g)[c] - lse[g] - top);
        }
        out[i] = top > -INFINITY ? top + std::log(sum) : -INFINITY;
    }
}

// pass 3
void take_top(const float * score, int64_t n_list, int32_t * out, int64_t n_selected) {
    const int64_t n_valid = n_list - std::count(score, score + n_list, -INFINITY);
    const int64_t k = std::min(n_selected, n_valid);
    int64_t n = 0;
    if (k > 0) {
        sfi::threshold t = sfi::kth_largest(score, n_list, k);
        for (int64_t c = 0; n < k; ++c) {
            const uint32_t key = sfi::sortable(score[c]);
            if (key > t.key || (key == t.key && t.n_equal-- > 0)) {
                out[n++] = (int32_t) c;
            }
        }
    }
    std::fill(out + n, out + n_selected, -1);
}

} // namespace

void sfi::sketch_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const int64_t ith = params->ith, nth = params->nth;

    for (int64_t i = ith; i < a.n_head_kv*a.group*a.n_runs; i += nth) {
        sum_run(a, i/a.n_runs, i % a.n_runs);
    }
    ggml_barrier(params->threadpool);

    std::vector<float> lse(a.group);
    const int64_t n_items = a.n_head_kv*a.n_runs, first = n_items*ith/nth, last = n_items*(ith + 1)/nth;
    for (int64_t i = first; i < last; ++i) {
        const int64_t h_kv = i/a.n_runs;
        for (int64_t g = 0; g < a.group && (i == first || i % a.n_runs == 0); ++g) {
            lse[g] = log_sum_exp(a, h_kv*a.group + g);
        }
        score_run(a, h_kv, i % a.n_runs, lse.data());
    }
    ggml_barrier(params->threadpool);

    for (int64_t h = ith; h < a.n_head_kv; h += nth) {
        take_top(a.score + h*a.n_list, a.n_list, (int32_t *) ((char *) dst->data + h*dst->nb[1]), dst->ne[0]);
    }
}

size_t sfi::sketch_select_work_size(const ggml_tensor * dst, int) {
    const ggml_tensor * logits = dst->src[0];
    return (dst->ne[1]*logits->ne[0] + 2*logits->ne[1]*task::runs_of(logits->ne[0]))*sizeof(float);
}
