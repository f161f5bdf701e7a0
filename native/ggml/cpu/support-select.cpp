// GGML_OP_SUPPORT_SELECT and GGML_OP_SUPPORT_STABILITY on the CPU. Threads share out the KV heads.

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "top-k.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

namespace {

constexpr float eps = 1e-8f;

struct candidates {
    int64_t n_list, j0, j1;
    const int32_t * cells;

    candidates(const ggml_tensor * cells_t, const ggml_tensor * plan_t) : n_list(cells_t->ne[0]) {
        const int32_t * plan = (const int32_t *) plan_t->data;
        cells = (const int32_t *) cells_t->data;
        j0 = std::clamp<int64_t>(plan[0], 0, n_list);
        j1 = std::clamp<int64_t>(plan[1], j0, n_list);
    }
    int64_t n() const { return j1 - j0; }
    bool    is_cell(int64_t i) const { return cells[j0 + i] >= 0; }
};

// out[i] = max of x[i - behind .. i + ahead], within [0, n)
void window_max(const float * x, int64_t n, int64_t behind, int64_t ahead, float * out) {
    std::copy(x, x + n, out);
    for (int64_t d = 1; d <= behind; ++d) {
        for (int64_t i = d; i < n; ++i) {
            out[i] = std::max(out[i], x[i - d]);
        }
    }
    for (int64_t d = 1; d <= ahead; ++d) {
        for (int64_t i = 0; i + d < n; ++i) {
            out[i] = std::max(out[i], x[i + d]);
        }
    }
}

// The cells of the top n_selected scores in position order, padded with -1; pads among the cells are never chosen.
void take_top(const candidates & c, float * score, int32_t * out, int64_t n_selected) {
    int64_t n_valid = 0;
    for (int64_t i = 0; i < c.n(); ++i) {
        if (c.is_cell(i)) {
            ++n_valid;
        } else {
            score[i] = -INFINITY;
        }
    }
    const int64_t k = std::min(n_selected, n_valid);
    int64_t n = 0;
    if (k > 0) {
        sfi::threshold t = sfi::kth_largest(score, c.n(), k);
        for (int64_t i = 0; i < c.n() && n < k; ++i) {
            const uint32_t key = sfi::sortable(score[i]);
            if (key > t.key || (key == t.key && t.n_equal-- > 0)) {
                out[n++] = c.cells[c.j0 + i];
            }
        }
    }
    std::fill(out + n, out + n_selected, -1);
}

// ---- paper: arXiv 2603.12038, steps 1 to 4; double because sums over 10^5 cells are compared ----------------------

void normalise(std::vector<double> & x) {
    double sum = 0.0;
    for (const double v : x) {
        sum += v;
    }
    for (double & v : x) {
        v = sum > 0.0 ? v/sum : 0.0;
    }
}

double norm_of_key(const ggml_tensor * k, int64_t h, int32_t cell, std::vector<float> & row) {
    const char * p = (const char *) k->data + h*k->nb[2] + cell*k->nb[1];
    const auto to_float = ggml_get_type_traits(k->type)->to_float;
    if (to_float) {
        to_float(p, row.data(), row.size());
    } else {
        memcpy(row.data(), p, row.size()*sizeof(float));
    }
    double sum = 0.0;
    for (const float x : row) {
        sum += (double) x*x;
    }
    return std::sqrt(sum);
}

std::vector<double> prior_of(const candidates & c, const ggml_support_selector & sel, const ggml_tensor * k, int64_t h) {
    std::vector<double> r(c.n());
    std::vector<float>  row(k->ne[0]);
    for (int64_t i = 0; i < c.n(); ++i) {
        const double u    = c.n() > 1 ? (double) i/(c.n() - 1) : 0.0;
        const double norm = norm_of_key(k, h, std::max(c.cells[c.j0 + i], 0), row);
        r[i] = std::pow(norm + eps, -sel.gamma)*std::exp(-sel.beta*std::pow(u, sel.p))*std::pow(1.0 - u + eps, sel.eta);
        r[i] = c.is_cell(i) ? r[i] : 0.0;
    }
    normalise(r);
    return r;
}

// the weight of the prior that minimises (1-l) KL(f||s) + l KL(r||s)
double fusion_weight(const std::vector<double> & f, const std::vector<double> & r, double clip) {
    double ff = 0.0, fr = 0.0, rr = 0.0;
    for (size_t i = 0; i < f.size(); ++i) {
        ff += f[i]*f[i];
        fr += f[i]*r[i];
        rr += r[i]*r[i];
    }
    const double denominator = ff - 2.0*fr + rr;
    return denominator > 0.0 ? std::clamp((ff - fr)/denominator, 0.0, clip) : 0.0;
}

// steps 1 to 4: the log score after soft non-maximum suppression
void paper_score(const candidates & c, const ggml_support_selector & sel, const ggml_tensor * k, int64_t h,
                 const float * evidence, float * z) {
    const int64_t n = c.n();
    std::vector<double> f(n);
    for (int64_t i = 0; i < n; ++i) {
        f[i] = c.is_cell(i) ? std::pow((double) evidence[i], 1.0/sel.alpha) : 0.0;
    }
    normalise(f);
    const std::vector<double> r = prior_of(c, sel, k, h);
    const double lambda = fusion_weight(f, r, sel.lambda_clip);

    std::vector<float> log_score(n), local_max(n);
    for (int64_t i = 0; i < n; ++i) {
        log_score[i] = (float) std::log((1.0 - lambda)*f[i] + lambda*r[i] + eps);
    }
    window_max(log_score.data(), n, sel.nms_radius, sel.nms_radius, local_max.data());
    for (int64_t i = 0; i < n; ++i) {
        z[i] = log_score[i] - sel.a_soft*std::max(0.0f, local_max[i] - log_score[i]);
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

} // namespace

void sfi::support_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * k = dst->src[3];
    const candidates c(dst->src[1], dst->src[2]);
    ggml_support_selector sel;
    memcpy(&sel, dst->op_params, sizeof(sel));

    const int     ith = params->ith, nth = params->nth;
    const int64_t n_head_kv = dst->ne[1], ld = c.n_list;
    const bool    paper = sel.kind == GGML_SUPPORT_SELECTOR_PAPER;
    float * score = (float *) params->wdata; // [n_head_kv, n_list]

    for (int64_t h = ith; h < n_head_kv; h += nth) {
        const float * e = (const float *) ((const char *) evidence->data + h*evidence->nb[1]) + c.j0;
        if (paper) {
            paper_score(c, sel, k, h, e, score + h*ld);
        } else {
            window_max(e, c.n(), sel.pool_after, sel.pool_before, score + h*ld);
        }
    }
    if (paper && n_head_kv > 2) {
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < c.n(); i += nth) {
            cross_head(sel, score + i, ld, n_head_kv);
        }
        ggml_barrier(params->threadpool);
    }
    for (int64_t h = ith; h < n_head_kv; h += nth) {
        take_top(c, score + h*ld, (int32_t *) ((char *) dst->data + h*dst->nb[1]), dst->ne[0]);
    }
}

size_t sfi::support_select_work_size(const ggml_tensor * dst, int) {
    return ggml_nelements(dst->src[0])*sizeof(float);
}

bool sfi::support_select_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[3];
    return !k || k->type == GGML_TYPE_F32 || ggml_get_type_traits(k->type)->to_float;
}

// ---- stability -----------------------------------------------------------------------------------------------------

namespace {

// evidence by cell: which candidate a cell is, or -1
struct ranks {
    std::vector<int32_t> of_cell;

    explicit ranks(const candidates & c) {
        int32_t max_cell = -1;
        for (int64_t j = c.j0; j < c.j1; ++j) {
            max_cell = std::max(max_cell, c.cells[j]);
        }
        of_cell.assign(max_cell + 1, -1);
        for (int64_t j = c.j0; j < c.j1; ++j) {
            if (c.cells[j] >= 0) {
                of_cell[c.cells[j]] = (int32_t) j;
            }
        }
    }
    int32_t operator()(int32_t cell) const {
        return cell >= 0 && cell < (int32_t) of_cell.size() ? of_cell[cell] : -1;
    }
};

double evidence_on(const int32_t * set, int64_t n, const ranks & rank, const float * evidence) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t j = rank(set[i]);
        sum += j >= 0 ? evidence[j] : 0.0f;
    }
    return sum;
}

std::vector<int32_t> sorted_cells(const int32_t * set, int64_t n) {
    std::vector<int32_t> cells;
    cells.reserve(n);
    std::copy_if(set, set + n, std::back_inserter(cells), [](int32_t cell) { return cell >= 0; });
    if (!std::is_sorted(cells.begin(), cells.end())) {
        std::sort(cells.begin(), cells.end());
    }
    return cells;
}

float jaccard(const int32_t * a, int64_t n_a, const int32_t * b, int64_t n_b) {
    const auto x = sorted_cells(a, n_a), y = sorted_cells(b, n_b);
    size_t common = 0;
    for (auto i = x.begin(), j = y.begin(); i != x.end() && j != y.end(); ) {
        common += *i == *j;
        const bool step_i = *i <= *j, step_j = *j <= *i;
        i += step_i;
        j += step_j;
    }
    const size_t all = x.size() + y.size() - common;
    return all ? (float) common/all : 1.0f;
}

} // namespace

void sfi::support_stability(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    if (params->ith >= dst->ne[1]) {
        return;
    }
    const candidates c(dst->src[1], dst->src[2]);
    const ranks rank(c);

    for (int64_t h = params->ith; h < dst->ne[1]; h += params->nth) {
        const float   * e = (const float   *) ((const char *) evidence->data + h*evidence->nb[1]);
        const int32_t * s = (const int32_t *) ((const char *) selected->data + h*selected->nb[1]);
        const int32_t * p = (const int32_t *) ((const char *) previous->data + h*previous->nb[1]);
        float * out = (float *) ((char *) dst->data + h*dst->nb[1]);

        double all = 0.0;
        for (int64_t j = c.j0; j < c.j1; ++j) {
            all += e[j];
        }
        out[0] = (float) all;
        out[1] = (float) evidence_on(s, selected->ne[0], rank, e);
        out[2] = (float) evidence_on(p, previous->ne[0], rank, e);
        out[3] = jaccard(s, selected->ne[0], p, previous->ne[0]);
    }
}
