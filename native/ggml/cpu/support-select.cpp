// GGML_OP_SUPPORT_SELECT and GGML_OP_SUPPORT_STABILITY on the CPU. Threads share out the KV heads.

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "top-k.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
                 const float * evidence, float * z, float * tmp) {
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
    window_max(log_score.data(), n, sel.nms_radius, sel.nms_radius, local_max.data(), tmp);
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

// scratch of a thread
int64_t select_floats(const ggml_tensor * dst) {
    ggml_support_selector sel;
    memcpy(&sel, dst->op_params, sizeof(sel));
    const bool paper = sel.kind == GGML_SUPPORT_SELECTOR_PAPER;
    return window_floats(dst->src[0]->ne[0], paper ? sel.nms_radius : sel.pool_after, paper ? sel.nms_radius : sel.pool_before);
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
    float * tmp   = score + n_head_kv*ld + ith*select_floats(dst);

    for (int64_t h = ith; h < n_head_kv; h += nth) {
        const float * e = (const float *) ((const char *) evidence->data + h*evidence->nb[1]) + c.j0;
        if (paper) {
            paper_score(c, sel, k, h, e, score + h*ld, tmp);
        } else {
            window_max(e, c.n(), sel.pool_after, sel.pool_before, score + h*ld, tmp);
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
        take_top(c, score + h*ld, (uint32_t *) tmp, (int32_t *) ((char *) dst->data + h*dst->nb[1]), dst->ne[0]);
    }
}

size_t sfi::support_select_work_size(const ggml_tensor * dst, int n_threads) {
    return (ggml_nelements(dst->src[0]) + n_threads*select_floats(dst))*sizeof(float);
}

bool sfi::support_select_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[3];
    return !k || k->type == GGML_TYPE_F32 || ggml_get_type_traits(k->type)->to_float;
}

// ---- stability -----------------------------------------------------------------------------------------------------

namespace {

// the number of a candidate by its cell, or -1
struct ranks {
    int64_t first = 0, j0 = 0, n = 0;   // cells in one piece need no table: they are first .. first + n - 1
    std::vector<int32_t> of_cell;

    explicit ranks(const candidates & c) : j0(c.j0), n(c.n()) {
        const int32_t * cells = c.cells + c.j0;
        first = n > 0 ? cells[0] : 0;
        int32_t max_cell = -1;
        int64_t n_elsewhere = 0;
        for (int64_t i = 0; i < n; ++i) {
            max_cell = std::max(max_cell, cells[i]);
            n_elsewhere += cells[i] != first + i || cells[i] < 0;
        }
        if (n_elsewhere > 0) {
            of_cell.assign(max_cell + 1, -1);
            for (int64_t i = 0; i < n; ++i) {
                if (cells[i] >= 0) {
                    of_cell[cells[i]] = (int32_t) (j0 + i);
                }
            }
            n = 0;
        }
    }
    int64_t operator()(int32_t cell) const {
        if (of_cell.empty()) {
            return cell >= first && cell - first < n ? j0 + cell - first : -1;
        }
        return cell >= 0 && cell < (int64_t) of_cell.size() ? of_cell[cell] : -1;
    }
};

double sum_of(const float * x, int64_t n) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += x[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += x[i];
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

double evidence_on(const int32_t * set, int64_t n, const ranks & rank, const float * evidence) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t j = rank(set[i]);
        sum += j >= 0 ? evidence[j] : 0.0f;
    }
    return sum;
}

// in: room for a mark per cell, all 0 and so again afterwards
float jaccard(const int32_t * a, int64_t n_a, const int32_t * b, int64_t n_b, std::vector<uint8_t> & in) {
    int32_t max_cell = -1;
    for (int64_t i = 0; i < n_a; ++i) { max_cell = std::max(max_cell, a[i]); }
    for (int64_t i = 0; i < n_b; ++i) { max_cell = std::max(max_cell, b[i]); }
    if (in.size() < (size_t) max_cell + 2) {
        in.resize((size_t) max_cell + 2);
    }
    uint8_t * mark = in.data() + 1; // pads mark the byte before the first cell
    int64_t n = 0, common = 0;
    for (int64_t i = 0; i < n_a; ++i) {
        mark[std::max(a[i], -1)] = 1;
        n += a[i] >= 0;
    }
    mark[-1] = 0;
    for (int64_t i = 0; i < n_b; ++i) {
        common += mark[std::max(b[i], -1)];
        n += b[i] >= 0;
    }
    for (int64_t i = 0; i < n_a; ++i) {
        mark[std::max(a[i], -1)] = 0;
    }
    return n > common ? (float) common/(n - common) : 1.0f;
}

} // namespace

void sfi::support_stability(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    if (params->ith >= dst->ne[1]) {
        return;
    }
    const candidates c(dst->src[1], dst->src[2]);
    const ranks rank(c);
    std::vector<uint8_t> in;

    for (int64_t h = params->ith; h < dst->ne[1]; h += params->nth) {
        const float   * e = (const float   *) ((const char *) evidence->data + h*evidence->nb[1]);
        const int32_t * s = (const int32_t *) ((const char *) selected->data + h*selected->nb[1]);
        const int32_t * p = (const int32_t *) ((const char *) previous->data + h*previous->nb[1]);
        float * out = (float *) ((char *) dst->data + h*dst->nb[1]);

        out[0] = (float) sum_of(e + c.j0, c.n());
        out[1] = (float) evidence_on(s, selected->ne[0], rank, e);
        out[2] = (float) evidence_on(p, previous->ne[0], rank, e);
        out[3] = jaccard(s, selected->ne[0], p, previous->ne[0], in);
    }
}
