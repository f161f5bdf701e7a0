// GGML_OP_SKETCH_LOGITS on the CPU. Threads share out runs of blocks of the KV heads.
//
//   pass 1  project the queries of a group onto the basis, as 8-bit weights
//   pass 2  integer dot products of weights and codes, every code read once for the whole group
//   pass 3  softcap; -INFINITY where no cell is, or a skipped one

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "sketch-simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int tile_blocks = 16;   // codes that all heads visit before anyone goes on
constexpr int max_heads   = 4;    // of a kernel

// A query against the codes: logit = base + factor * sum_j w_j code_j.
struct projected {
    int8_t w[sfi::sketch_max_components];
    float  factor, base;
};

// pass 2: n blocks and N queries, whose logits go to rows of out [N, ld]
using tile_fn = void (*)(const sfi::sketch_layout & l, const uint8_t * block, int64_t n, const projected * p, float * out, int64_t ld);

template <class B, int N, int shift, int mask>
SFI_INLINE void add_field(typename B::Q * q, const typename B::P & plane, const projected * p, int field) {
    const typename B::P codes = B::template field<shift, mask>(plane);
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        int32_t w;
        memcpy(&w, p[h].w + 4*field, sizeof(w));
        q[h] = B::dot(q[h], codes, w);
    }
}

// all fields of one plane
template <class B, int N>
SFI_INLINE void add_plane(typename B::Q * q, const typename B::P & plane, const sfi::sketch_layout & l, int i, const projected * p) {
    const int first = l.k_first[i];
    if (!l.k_is_uniform(i)) {
        for (int f = first; f < l.k_first[i + 1]; ++f) {
            const typename B::P codes = B::field(plane, l.k[f]);
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                int32_t w;
                memcpy(&w, p[h].w + 4*f, sizeof(w));
                q[h] = B::dot(q[h], codes, w);
            }
        }
    } else if (l.k[first].mask == 15) {
        add_field<B, N, 0, 15>(q, plane, p, first);
        add_field<B, N, 4, 15>(q, plane, p, first + 1);
    } else if (l.k[first].mask == 3) {
        add_field<B, N, 0, 3>(q, plane, p, first);
        add_field<B, N, 2, 3>(q, plane, p, first + 1);
        add_field<B, N, 4, 3>(q, plane, p, first + 2);
        add_field<B, N, 6, 3>(q, plane, p, first + 3);
    } else {
        add_field<B, N, 0, 1>(q, plane, p, first);
        add_field<B, N, 1, 1>(q, plane, p, first + 1);
        add_field<B, N, 2, 1>(q, plane, p, first + 2);
        add_field<B, N, 3, 1>(q, plane, p, first + 3);
        add_field<B, N, 4, 1>(q, plane, p, first + 4);
        add_field<B, N, 5, 1>(q, plane, p, first + 5);
        add_field<B, N, 6, 1>(q, plane, p, first + 6);
        add_field<B, N, 7, 1>(q, plane, p, first + 7);
    }
}

template <class B, int N>
void tile_logits(const sfi::sketch_layout & l, const uint8_t * block, int64_t n, const projected * p, float * out, int64_t ld) {
    using F = typename B::F;
    for (int64_t b = 0; b < n; ++b, block += l.block_bytes(), out += sfi::sketch_cells) {
        typename B::A sum[N];
        typename B::Q q[N];
        SFI_UNROLL
        for (int h = 0; h < N; ++h) {
            sum[h] = B::zero();
            q[h]   = B::zero_q();
        }
        for (int i = 0; i < l.k_planes; ++i) {
            add_plane<B, N>(q, B::load(block + i*sfi::sketch_plane), l, i, p);
            if (i % 4 == 3 || i + 1 == l.k_planes) {
                SFI_UNROLL
                for (int h = 0; h < N; ++h) {
                    B::flush(sum[h], q[h]);
                }
            }
        }
        SFI_UNROLL
        for (int h = 0; h < N; ++h) {
            SFI_UNROLL
            for (int i = 0; i < sfi::sketch_cells/F::W; ++i) {
                F::store(out + h*ld + i*F::W, F::fma(F::set1(p[h].factor), B::to_float(sum[h], i), F::set1(p[h].base)));
            }
        }
    }
}

template <class B>
tile_fn tile_of(int n_heads) {
    const tile_fn of[max_heads] = { tile_logits<B, 1>, tile_logits<B, 2>, tile_logits<B, 3>, tile_logits<B, 4> };
    return of[n_heads - 1];
}

tile_fn tile_for(sfi::simd path, int n_heads) {
    switch (path) {
#if defined(SFI_AVX512)
        case sfi::simd::avx512: return tile_of<sfi::bytes_avx512>(n_heads);
#endif
#if defined(SFI_AVX2)
        case sfi::simd::avx2:   return tile_of<sfi::bytes_avx2>(n_heads);
#endif
#if defined(SFI_NEON)
        case sfi::simd::neon:   return tile_of<sfi::bytes_neon>(n_heads);
#endif
        default:                return tile_of<sfi::bytes_scalar>(n_heads);
    }
}

struct task {
    const ggml_tensor * dst, * q, * codes, * basis, * skip;
    sfi::sketch_layout l;
    int64_t n_list, n_used, n_head_kv, group;
    float   scale, softcap;
    tile_fn tile[max_heads];

    task(const ggml_compute_params * params, ggml_tensor * dst) :
            dst(dst), q(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), skip(dst->src[3]), l(dst) {
        n_list    = dst->ne[0];
        n_used    = std::clamp<int64_t>(*(const int32_t *) dst->src[4]->data, 0, n_list);
        n_head_kv = codes->ne[2];
        group     = q->ne[1]/n_head_kv;
        scale     = ggml_get_op_params_f32(dst, 0);
        softcap   = ggml_get_op_params_f32(dst, 1);
        for (int n = 1; n <= max_heads; ++n) {
            tile[n - 1] = tile_for(sfi::simd_for(params->use_ref), n);
        }
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

// pass 2 for the blocks [begin, end) of a KV head
void blocks_logits(const task & a, int64_t h_kv, int64_t begin, int64_t end, const projected * p) {
    const uint8_t * codes = (const uint8_t *) a.codes->data + h_kv*a.codes->nb[2];
    for (int64_t b = begin; b < end; b += tile_blocks) {
        for (int64_t g = 0; g < a.group; g += max_heads) {
            const tile_fn tile = a.tile[std::min<int64_t>(a.group - g, max_heads) - 1];
            tile(a.l, codes + b*a.l.block_bytes(), std::min<int64_t>(tile_blocks, end - b), p + g,
                 a.out(h_kv*a.group + g) + b*sfi::sketch_cells, a.n_list);
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
    const task a(params, dst);
    const int64_t n_blocks = a.n_list/sketch_cells, n_items = a.n_head_kv*n_blocks;
    const int64_t last = n_items*(params->ith + 1)/params->nth;
    std::vector<projected> p(a.group);

    for (int64_t i = n_items*params->ith/params->nth; i < last; ) {
        const int64_t h = i/n_blocks, b0 = i % n_blocks, b1 = std::min(n_blocks, b0 + last - i);
        for (int64_t g = 0; g < a.group; ++g) {
            project(a, h*a.group + g, p[g]);
        }
        blocks_logits(a, h, b0, std::min(b1, (a.n_used + sketch_cells - 1)/sketch_cells), p.data());
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
