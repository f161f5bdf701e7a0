#include "sketch-task.h"

#include "top-k.h"

#include <cmath>

namespace sfi {
namespace scan {

using exp_constants::log2e;

// [n, n_embd] of a basis
struct dec_rows {
    const char * start[sketch_max_components];
    row_set      rows;

    dec_rows(const ggml_fp16_t * dec, int n, int64_t n_embd) : rows { start, 0, n, nullptr, 0, 0, 0 } {
        for (int j = 0; j < n; ++j) {
            start[j] = (const char *) (dec + j*n_embd);
        }
    }
};

void project(const task & a, int64_t h_kv, const basis_ops & ops, float * q, float * products, projected * p) {
    const int n_embd = (int) a.q->ne[0], ld = GGML_PAD(a.l.n_k + 1, max_vector);
    for (int64_t g = 0; g < a.group; ++g) {
        memcpy(q + g*n_embd, (const char *) a.q->data + (h_kv*a.group + g)*a.q->nb[1], n_embd*sizeof(float));
    }
    const auto basis = sketch_basis::of_k(a.basis, h_kv, a.l.n_k, n_embd);
    const char * const mean = (const char *) basis.mean;
    ops.dec (q, (int) a.group, n_embd, dec_rows(basis.dec, a.l.n_k, n_embd).rows, products, ld);
    ops.mean(q, (int) a.group, n_embd, { &mean, 0, 1, nullptr, 0, 0, 0 }, products + a.l.n_k, ld);

    const float unit = a.softcap > 0.0f ? 1.0f : log2e; // a softcap is of the logit itself
    for (int64_t g = 0; g < a.group; ++g) {
        const float * w = products + g*ld;
        float largest = 0.0f;
        bool  finite  = std::isfinite(w[a.l.n_k]);
        for (int j = 0; j < a.l.n_k; ++j) {
            largest = std::max(largest, std::fabs(w[j]));
            finite  = finite && std::isfinite(w[j]);
        }
        if (!finite) { // all cells are left out
            p[g] = { {}, 0.0f, -INFINITY, 0.0f, 0.0f };
            continue;
        }
        const float inverse = largest > 0.0f ? 127.0f/largest : 0.0f;
        int centre[2] = {}; // twice the sum over w_j centre_j, of the first planes and of the others
        int most = 0;       // of the sum over w_j code_j of the first planes
        projected & to = p[g];
        for (int j = 0; j < a.l.n_k; ++j) {
            to.w[j] = (int8_t) lrintf(w[j]*inverse);
            const bool later = a.l.k[j/4].plane >= a.l.first_planes;
            centre[later] += to.w[j]*a.l.k_mask(j);
            most += later ? 0 : std::max<int>(to.w[j], 0)*a.l.k_mask(j);
        }
        to.factor = unit*a.scale*(largest/127.0f);
        to.base   = unit*a.scale*w[a.l.n_k] - 0.5f*to.factor*(float) centre[0];
        to.again  = -0.5f*to.factor*(float) centre[1];
        to.most   = to.base + to.factor*(float) most;
    }
}

void write_tail(const task & a, int64_t h, const basis_ops & ops, const float * z, float log2_sum) {
    float * out = (float *) ((char *) a.dst->data + h*a.dst->nb[1]);
    const auto basis = sketch_basis::of_v(a.basis, h/a.group, a.l.n_v, a.n_embd_v);
    std::copy(basis.mean, basis.mean + a.n_embd_v, out);
    ops.decode(z, a.l.n_v, 1, (int) a.n_embd_v, dec_rows(basis.dec, a.l.n_v, a.n_embd_v).rows, out, a.n_embd_v);
    out[a.n_embd_v] = ln2*log2_sum;
}

void write_no_tail(const task & a, int64_t h) {
    float * out = (float *) ((char *) a.dst->data + h*a.dst->nb[1]);
    std::fill(out, out + a.n_embd_v, 0.0f);
    out[a.n_embd_v] = -INFINITY;
}

void mark_skipped(const task & a, int64_t n_used, uint16_t * skipped) {
    std::fill(skipped, skipped + a.ld/16, (uint16_t) 0);
    const int32_t * skip = (const int32_t *) a.skip->data;
    for (int64_t i = 0; i < a.skip->ne[0]; ++i) {
        if (skip[i] >= 0 && skip[i] < n_used) {
            skipped[skip[i]/16] |= (uint16_t) (1u << skip[i] % 16);
        }
    }
    if (n_used % 16 != 0) { // a block is scanned as a whole
        skipped[n_used/16] |= (uint16_t) (0xffffu << n_used % 16);
    }
}

void hide_skipped(const uint16_t * skipped, int64_t c, int n, int64_t group, float * t, int64_t ld) {
    for (int b = 0; b < n/16; ++b) {
        for (uint32_t bits = skipped[c/16 + b], i = 16*b; bits != 0; bits >>= 1, ++i) {
            for (int64_t g = 0; g < group && bits & 1; ++g) {
                t[g*ld + i] = -INFINITY;
            }
        }
    }
}

static float kth_value(const float * x, int64_t n, int64_t k, uint32_t * key) {
    for (int64_t i = 0; i < n; ++i) {
        key[i] = sortable(x[i]);
    }
    const threshold t = kth_largest_key(key, n, k);
    return from_sortable(t.n_equal > 0 ? t.key : t.key + 1);
}

// The k best of n. log2 of a cell's score lies between z - log2(group) and z, so with T the k-th largest
// z, those of z < T - log2(group) need not be scored.
int64_t choice::keep_best(int64_t n, int64_t k) const {
    if (n <= k) {
        return n;
    }
    const float least = kth_value(z, n, k, key), slack = std::log2((float) group) + 1e-4f;
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (z[i] >= least - slack) {
            move(i, m);
            z[m++] = z[i];
        }
    }
    for (int64_t i = 0; i < m && group > 1; ++i) {
        float score = 0.0f; // over 2^least, lest it underflow
        for (int64_t g = 0; g < group; ++g) {
            score += std::exp2(std::min(t[g*ld + i] - lse[g] - least, 120.0f));
        }
        z[i] = score;
    }
    for (int64_t i = 0; i < m; ++i) {
        key[i] = sortable(z[i]);
    }
    threshold last = kth_largest_key(key, m, k);
    int64_t n_out = 0;
    for (int64_t i = 0; n_out < k; ++i) {
        if (key[i] > last.key || (key[i] == last.key && last.n_equal-- > 0)) {
            move(i, n_out++);
        }
    }
    return k;
}

void choice::move(int64_t from, int64_t to) const {
    cell[to] = cell[from];
    for (int64_t g = 0; g < group; ++g) {
        t[g*ld + to] = t[g*ld + from];
    }
}

} // namespace scan
} // namespace sfi
