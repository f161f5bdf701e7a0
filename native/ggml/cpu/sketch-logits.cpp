// GGML_OP_SKETCH_LOGITS on the CPU. Threads share out runs of blocks of the KV heads.
//
//   pass 1  project the queries of a group onto the basis, as 8-bit weights
//   pass 2  integer dot products of weights and codes, every code read once for the whole group
//   pass 3  softcap; -INFINITY where no cell is, or a skipped one

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// A query against the codes: logit = base + factor * sum_j w_j code_j.
struct projected {
    int8_t w[sfi::sketch_max_components];
    float  factor, base;
};

struct task {
    const ggml_tensor * dst, * q, * codes, * basis, * skip;
    sfi::sketch_layout l;
    int64_t n_list, n_used, n_head_kv, group;
    float   scale, softcap;

    explicit task(ggml_tensor * dst) :
            dst(dst), q(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), skip(dst->src[3]), l(dst) {
        n_list    = dst->ne[0];
        n_used    = std::clamp<int64_t>(*(const int32_t *) dst->src[4]->data, 0, n_list);
        n_head_kv = codes->ne[2];
        group     = q->ne[1]/n_head_kv;
        scale     = ggml_get_op_params_f32(dst, 0);
        softcap   = ggml_get_op_params_f32(dst, 1);
    }

    float * out(int64_t h) const { return (float *) ((char *) dst->data + h*dst->nb[1]); }
};

float dot(const float * a, const float * b, int64_t n) {
    float sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sum[j] += a[i + j]*b[i + j];
        }
    }
    for (; i < n; ++i) {
        sum[0] += a[i]*b[i];
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// pass 1
void project(const task & a, int64_t h, projected & p) {
    const float * q = (const float *) ((const char *) a.q->data + h*a.q->nb[1]);
    const int64_t n_embd = a.q->ne[0];
    const auto basis = sfi::sketch_basis::of_k(a.basis, h/a.group, a.l.n_k, n_embd);

    float w[sfi::sketch_max_components], largest = 0.0f;
    for (int j = 0; j < a.l.n_k; ++j) {
        w[j] = dot(basis.dec + j*n_embd, q, n_embd);
        largest = std::max(largest, std::fabs(w[j]));
    }
    const float inverse = largest > 0.0f ? 127.0f/largest : 0.0f;
    int centre = 0; // twice the sum over w_j centre_j
    for (int j = 0; j < a.l.n_k; ++j) {
        p.w[j] = (int8_t) lrintf(w[j]*inverse);
        centre += p.w[j]*a.l.k_mask(j);
    }
    p.factor = a.scale*(largest/127.0f);
    p.base   = a.scale*dot(basis.mean, q, n_embd) - 0.5f*p.factor*(float) centre;
}

// pass 2
void block_logits(const sfi::sketch_layout & l, const uint8_t * block, const projected * p, int64_t n_heads, float * out, int64_t ld) {
    for (int64_t h = 0; h < n_heads; ++h) {
        int32_t sum[sfi::sketch_cells] = {};
        for (int g = 0; g < l.n_k_fields; ++g) {
            const sfi::sketch_field & f = l.k[g];
            const uint8_t * plane = block + f.plane*sfi::sketch_plane;
            for (int i = 0; i < sfi::sketch_plane; ++i) {
                sum[i/4] += p[h].w[4*g + i % 4]*(plane[i] >> f.shift & f.mask);
            }
        }
        for (int i = 0; i < sfi::sketch_cells; ++i) {
            out[h*ld + i] = p[h].base + p[h].factor*(float) sum[i];
        }
    }
}

// pass 3, for the cells [begin, end)
void finish(const task & a, int64_t h_kv, int64_t begin, int64_t end) {
    const int32_t * skip = (const int32_t *) a.skip->data;
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        float * out = a.out(h);
        for (int64_t c = begin; c < end && a.softcap > 0.0f; ++c) {
            out[c] = a.softcap*tanhf(out[c]/a.softcap);
        }
        std::fill(out + std::clamp(a.n_used, begin, end), out + end, -INFINITY);
    }
    for (int64_t i = 0; i < a.skip->ne[0]; ++i) {
        for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group && skip[i] >= begin && skip[i] < end; ++h) {
            a.out(h)[skip[i]] = -INFINITY;
        }
    }
}

} // namespace

void sfi::sketch_logits(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(dst);
    const int64_t n_blocks = a.n_list/sketch_cells, n_items = a.n_head_kv*n_blocks;
    const int64_t last = n_items*(params->ith + 1)/params->nth;
    std::vector<projected> p(a.group);

    for (int64_t i = n_items*params->ith/params->nth; i < last; ) {
        const int64_t h = i/n_blocks, b0 = i % n_blocks, b1 = std::min(n_blocks, b0 + last - i);
        for (int64_t g = 0; g < a.group; ++g) {
            project(a, h*a.group + g, p[g]);
        }
        const uint8_t * codes = (const uint8_t *) a.codes->data + h*a.codes->nb[2];
        const int64_t used = (a.n_used + sketch_cells - 1)/sketch_cells;
        for (int64_t b = b0; b < std::min(b1, used); ++b) {
            block_logits(a.l, codes + b*a.l.block_bytes(), p.data(), a.group, a.out(h*a.group) + b*sketch_cells, a.n_list);
        }
        finish(a, h, b0*sketch_cells, b1*sketch_cells);
        i += b1 - b0;
    }
}

size_t sfi::sketch_logits_work_size(const ggml_tensor *, int) {
    return 0;
}

bool sfi::sketch_logits_supported(const ggml_tensor * dst) {
    return sketch_layout::supported(dst);
}
