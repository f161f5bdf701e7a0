// SUPPORT_SELECT on the CPU. Threads share out the KV heads.

#include "sfi-ops.h"

#include "arena.h"
#include "candidates.h"
#include "ggml-cpu-impl.h"
#include "sfi-params.h"
#include "top-k.h"

#include <cmath>
#include <numeric>

namespace {

constexpr float eps = 1e-8f;

using sfi::candidates;

// floats that window_max() needs beside its output
int64_t window_floats(int64_t n, int64_t behind, int64_t ahead) {
    return 2*(n + std::min(behind, n) + std::min(ahead, n));
}

// out[i] = max of x[i - behind .. i + ahead], within [0, n). Maxima of 1, 2, 4 ... values by doubling; the window is two
// of the longest that fit into it, which may overlap.
void window_max(const float * x, int64_t n, int64_t behind, int64_t ahead, float * out, float * tmp) {
    behind = std::min(behind, n);
    ahead  = std::min(ahead,  n);
    const int64_t window = behind + ahead + 1;
    int64_t m = n + behind + ahead; // y[i] is for the values that begin at x[i - behind]
    float * y = tmp, * next = tmp + m;
    std::fill(y, y + behind, -INFINITY);
    std::copy(x, x + n, y + behind);
    std::fill(y + behind + n, y + m, -INFINITY);

    int64_t length = 1;
    for (; 2*length <= window; length *= 2) {
        m -= length;
        for (int64_t i = 0; i < m; ++i) {
            next[i] = std::max(y[i], y[i + length]);
        }
        std::swap(y, next);
    }
    for (int64_t i = 0; i < n; ++i) {
        out[i] = std::max(y[i], y[i + window - length]);
    }
}

// The cells whose keys are in the top k, in position order; among keys equal to the last the earlier ones.
void take(const uint32_t * key, const int32_t * cells, int64_t n, sfi::threshold t, int32_t * out, int64_t k) {
    constexpr int64_t run = 32; // pooled evidence comes in runs: many blocks are taken whole or not at all
    int64_t n_out = 0;
    for (int64_t begin = 0; begin < n && n_out < k; begin += run) {
        const int64_t end = std::min(begin + run, n);
        int32_t n_greater = 0, n_equal = 0;
        for (int64_t i = begin; i < end; ++i) {
            n_greater += key[i] >  t.key;
            n_equal   += key[i] == t.key;
        }
        if (n_greater == end - begin) {
            std::copy(cells + begin, cells + end, out + n_out);
            n_out += n_greater;
        } else if (n_greater + n_equal > 0) {
            for (int64_t i = begin; i < end && n_out < k; ++i) {
                const bool equal = key[i] == t.key && t.n_equal > 0;
                t.n_equal -= equal;
                out[n_out] = cells[i];
                n_out += key[i] > t.key || equal;
            }
        }
    }
}

// The cells of the top n_selected scores in position order, padded with -1; pads among the cells are never chosen.
// key: room for a key of every candidate
void take_top(const candidates & c, const float * score, uint32_t * key, int32_t * out, int64_t n_selected) {
    int32_t n_valid = 0;
    for (int64_t i = 0; i < c.n(); ++i) {
        const uint32_t of_score = sfi::sortable(score[i] + 0.0f); // both zeros are equal
        key[i] = c.is_cell(i) ? of_score : 0;
        n_valid += c.is_cell(i);
    }
    const int64_t k = std::min<int64_t>(n_selected, n_valid);
    if (k > 0) {
        take(key, c.cells + c.j0, c.n(), sfi::kth_largest_key(key, c.n(), k), out, k);
    }
    std::fill(out + k, out + n_selected, -1);
}

// ---- paper: arXiv 2603.12038, steps 1 to 4; double because sums over 10^5 cells are compared ----------------------

// of one thread
struct paper_rows {
    double * f, * r;                   // [n_list]: evidence and prior, as distributions
    float  * log_score, * local_max;   // [n_list]
    float  * key;                      // [n_embd_k]: of one cell

    paper_rows(const ggml_tensor * dst, sfi::arena & from) {
        const int64_t n_list = dst->src[0]->ne[0];
        from.take(f,         n_list);
        from.take(r,         n_list);
        from.take(log_score, n_list);
        from.take(local_max, n_list);
        from.take(key,       dst->src[3]->ne[0]);
    }
};

void normalise(double * x, int64_t n) {
    const double sum = std::accumulate(x, x + n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = sum > 0.0 ? x[i]/sum : 0.0;
    }
}

double norm_of_key(const ggml_tensor * k, int64_t h, int32_t cell, float * row) {
    const char * p = (const char *) k->data + h*k->nb[2] + cell*k->nb[1];
    const auto to_float = ggml_get_type_traits(k->type)->to_float;
    if (to_float) {
        to_float(p, row, k->ne[0]);
    } else {
        memcpy(row, p, k->ne[0]*sizeof(float));
    }
    double sum = 0.0;
    for (int64_t i = 0; i < k->ne[0]; ++i) {
        sum += (double) row[i]*row[i];
    }
    return std::sqrt(sum);
}

void prior_of(const candidates & c, const ggml_support_selector & sel, const ggml_tensor * k, int64_t h, const paper_rows & own) {
    for (int64_t i = 0; i < c.n(); ++i) {
        const double u    = c.n() > 1 ? (double) i/(c.n() - 1) : 0.0;
        const double norm = norm_of_key(k, h, std::max(c.cells[c.j0 + i], 0), own.key);
        own.r[i] = std::pow(norm + eps, -sel.gamma)*std::exp(-sel.beta*std::pow(u, sel.p))*std::pow(1.0 - u + eps, sel.eta);
        own.r[i] = c.is_cell(i) ? own.r[i] : 0.0;
    }
    normalise(own.r, c.n());
}

// the weight of the prior that minimises (1-l) KL(f||s) + l KL(r||s)
double fusion_weight(const double * f, const double * r, int64_t n, double clip) {
    double ff = 0.0, fr = 0.0, rr = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        ff += f[i]*f[i];
        fr += f[i]*r[i];
        rr += r[i]*r[i];
    }
    const double denominator = ff - 2.0*fr + rr;
    return denominator > 0.0 ? std::clamp((ff - fr)/denominator, 0.0, clip) : 0.0;
}

// steps 1 to 4: the log score after soft non-maximum suppression
void paper_score(const candidates & c, const ggml_support_selector & sel, const ggml_tensor * k, int64_t h,
                 const float * evidence, float * z, float * tmp, const paper_rows & own) {
    const int64_t n = c.n();
    for (int64_t i = 0; i < n; ++i) {
        own.f[i] = c.is_cell(i) ? std::pow((double) evidence[i], 1.0/sel.alpha) : 0.0;
    }
    normalise(own.f, n);
    prior_of(c, sel, k, h, own);
    const double lambda = fusion_weight(own.f, own.r, n, sel.lambda_clip);

    for (int64_t i = 0; i < n; ++i) {
        own.log_score[i] = (float) std::log((1.0 - lambda)*own.f[i] + lambda*own.r[i] + eps);
    }
    window_max(own.log_score, n, sel.nms_radius, sel.nms_radius, own.local_max, tmp);
    for (int64_t i = 0; i < n; ++i) {
        z[i] = own.log_score[i] - sel.a_soft*std::max(0.0f, own.local_max[i] - own.log_score[i]);
    }
}

// step 5 for one candidate; z0 has one row of n scores per KV head
void cross_head(const ggml_support_selector & sel, float * z, int64_t ld, int64_t n_head_kv) {
    float max = -INFINITY;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        max = std::max(max, z[h*ld]/sel.temperature);
    }
    double sum = 0.0;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        sum += std::exp((double) z[h*ld]/sel.temperature - max);
    }
    const double lse = max + std::log(sum);
    for (int64_t h = 0; h < n_head_kv; ++h) {
        z[h*ld] += sel.a_cross*(float) (z[h*ld]/sel.temperature - lse);
    }
}

ggml_support_selector selector_of(const ggml_tensor * dst) {
    return sfi::params_of<sfi_select_params>(dst).selector;
}

bool is_paper(const ggml_tensor * dst) {
    return selector_of(dst).kind == GGML_SUPPORT_SELECTOR_PAPER;
}

// of all threads
struct shared_rows {
    float * score; // [n_head_kv, n_list]

    shared_rows(const ggml_tensor * dst, sfi::arena & from) { from.take(score, ggml_nelements(dst->src[0])); }
};

// of one thread
struct own_rows {
    float * window; // of window_max(), then a key of every candidate

    own_rows(const ggml_tensor * dst, sfi::arena & from) {
        const auto sel = selector_of(dst);
        from.take(window, is_paper(dst) ? window_floats(dst->src[0]->ne[0], sel.nms_radius, sel.nms_radius)
                                        : window_floats(dst->src[0]->ne[0], sel.pool_after, sel.pool_before));
    }
};

size_t own_size(const ggml_tensor * dst) {
    return sfi::size_of<own_rows>(dst) + (is_paper(dst) ? sfi::size_of<paper_rows>(dst) : 0);
}

} // namespace

void sfi::select(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * k = dst->src[3];
    const candidates c(dst->src[1], dst->src[2]);
    const auto    sel = selector_of(dst);
    const int     ith = params->ith, nth = params->nth;
    const int64_t n_head_kv = dst->ne[1], ld = c.n_list;
    const bool    paper = is_paper(dst);

    arena work(params->wdata);
    const shared_rows all(dst, work);
    arena mine = work.behind(ith*own_size(dst));
    const own_rows own(dst, mine);

    for (int64_t h = ith; h < n_head_kv; h += nth) {
        const float * e = (const float *) ((const char *) evidence->data + h*evidence->nb[1]) + c.j0;
        if (paper) {
            arena rows = mine.behind(0);
            paper_score(c, sel, k, h, e, all.score + h*ld, own.window, paper_rows(dst, rows));
        } else {
            window_max(e, c.n(), sel.pool_after, sel.pool_before, all.score + h*ld, own.window);
        }
    }
    if (paper && n_head_kv > 2) {
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < c.n(); i += nth) {
            cross_head(sel, all.score + i, ld, n_head_kv);
        }
        ggml_barrier(params->threadpool);
    }
    for (int64_t h = ith; h < n_head_kv; h += nth) {
        take_top(c, all.score + h*ld, (uint32_t *) own.window, (int32_t *) ((char *) dst->data + h*dst->nb[1]), dst->ne[0]);
    }
}

size_t sfi::select_work_size(const ggml_tensor * dst, int n_threads) {
    return size_of<shared_rows>(dst) + n_threads*own_size(dst) + arena::line;
}

bool sfi::select_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[3];
    return !k || k->type == GGML_TYPE_F32 || ggml_get_type_traits(k->type)->to_float;
}
