// GGML_OP_SKETCH_TAIL on the CPU.
//
// Cells are taken in runs of 256. In a run, weights are exp(logit - maximum) as 15-bit integers, so that sums over the
// codes are integer and exact; a few runs make a chunk, which is what a thread takes. Chunks do not depend on the number
// of threads and are merged in order, so neither does the result.
//
//   pass 1  which cells of the chunk are selected
//   pass 2  weights of a run
//   pass 3  sums over the value codes, which are then merged into the chunk's partial
//   pass 4  merge the partials of a head, decode once, add the selected cells to the second log-sum-exp

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sketch-simd.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int     run_cells   = 256;
constexpr int     run_blocks  = run_cells/sfi::sketch_cells;
constexpr int     chunk_runs  = 8;
constexpr int64_t chunk_cells = chunk_runs*run_cells;
constexpr float   one         = 32512.0f; // a weight of 1 as an integer: 127*256
constexpr float   log2_one    = 14.9886847f;
constexpr float   log2e       = 1.44269504f;

// pass 2: weights of n cells, a multiple of 16, in two bytes: 32512*exp(x - max) rounded is 256*hi + lo, lo signed
struct run_weights {
    int8_t lo[run_cells], hi[run_cells];
    float  max, weight, sum; // of the logits; of the rounded weights, over 32512; of the exact ones
};

// pass 3: over n_blocks blocks, sums of codes times weights for N heads and 16 components, [N, 16]
using weigh_fn = void (*)(const float * x, int n, run_weights & out);
using codes_fn = void (*)(const sfi::sketch_layout & l, int group, const uint8_t * block, int n_blocks, const run_weights * w, int32_t * out);

constexpr int max_heads = 4; // of a kernel

struct kernels {
    weigh_fn weigh;
    codes_fn codes[max_heads];
};

template <class B>
void weigh(const float * x, int n, run_weights & out) {
    using F = typename B::F;
    typename F::V most[2] = { F::load(x), F::load(x) };
    for (int c = 0; c + 2*F::W <= n; c += 2*F::W) {
        most[0] = F::max(most[0], F::load(x + c));
        most[1] = F::max(most[1], F::load(x + c + F::W));
    }
    float lanes[F::W];
    F::store(lanes, F::max(F::max(most[0], most[1]), F::load(x + n - F::W)));
    out.max = *std::max_element(lanes, lanes + F::W);
    if (out.max == -INFINITY) {
        return;
    }
    const typename F::V shift = F::set1(-out.max), scale = F::set1(log2e), top = F::set1(log2_one);
    typename F::V sum    = F::zero();
    typename B::I weight = B::zero_i();
    for (int c = 0; c < n; c += F::W) {
        const typename F::V e = F::exp2(F::fma(F::add(F::load(x + c), shift), scale, top));
        const typename B::I w = B::round(e);
        sum    = F::add(sum, e);
        weight = B::add(weight, w);
        B::split(w, out.lo + c, out.hi + c);
    }
    float total[4];
    F::sum4(sum, F::zero(), F::zero(), F::zero(), total);
    out.sum    = total[0]/one;
    out.weight = (float) B::sum(weight)/one;
}

template <class B, int N, int shift, int mask>
SFI_INLINE void add_field(typename B::Q (* q)[2], const typename B::P & plane, const run_weights * w, int cell) {
    const typename B::P codes = B::template field<shift, mask>(plane);
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        int32_t lo, hi;
        memcpy(&lo, w[h].lo + cell, sizeof(lo));
        memcpy(&hi, w[h].hi + cell, sizeof(hi));
        q[h][0] = B::dot(q[h][0], codes, lo);
        q[h][1] = B::dot(q[h][1], codes, hi);
    }
}

template <class B, int N>
void weigh_codes(const sfi::sketch_layout & l, int group, const uint8_t * block, int n_blocks, const run_weights * w, int32_t * out) {
    typename B::A sum[N][2];
    typename B::Q q[N][2];
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        sum[h][0] = sum[h][1] = B::zero();
        q[h][0] = q[h][1] = B::zero_q();
    }
    const sfi::sketch_field & first = l.v[group][0];
    block += first.plane*sfi::sketch_plane;
    for (int b = 0; b < n_blocks; ++b, block += l.block_bytes()) {
        const int cell = b*sfi::sketch_cells;
        const typename B::P plane = B::load(block);
        if (first.mask == 15) {
            const typename B::P second = B::load(block + sfi::sketch_plane);
            add_field<B, N, 0, 15>(q, plane,  w, cell);
            add_field<B, N, 4, 15>(q, plane,  w, cell + 4);
            add_field<B, N, 0, 15>(q, second, w, cell + 8);
            add_field<B, N, 4, 15>(q, second, w, cell + 12);
        } else {
            add_field<B, N, 0, 3>(q, plane, w, cell);
            add_field<B, N, 2, 3>(q, plane, w, cell + 4);
            add_field<B, N, 4, 3>(q, plane, w, cell + 8);
            add_field<B, N, 6, 3>(q, plane, w, cell + 12);
        }
        if (b % 2 == 1 || b + 1 == n_blocks) {
            SFI_UNROLL
            for (int h = 0; h < N; ++h) {
                B::flush(sum[h][0], q[h][0]);
                B::flush(sum[h][1], q[h][1]);
            }
        }
    }
    SFI_UNROLL
    for (int h = 0; h < N; ++h) {
        int32_t lo[16], hi[16];
        B::store(sum[h][0], lo);
        B::store(sum[h][1], hi);
        for (int d = 0; d < 16; ++d) {
            out[16*h + d] = lo[d] + 256*hi[d];
        }
    }
}

template <class B> kernels kernels_of() {
    return { weigh<B>, { weigh_codes<B, 1>, weigh_codes<B, 2>, weigh_codes<B, 3>, weigh_codes<B, 4> } };
}

kernels kernels_for(sfi::simd path) {
    switch (path) {
#if defined(SFI_AVX512)
        case sfi::simd::avx512: return kernels_of<sfi::bytes_avx512>();
#endif
#if defined(SFI_AVX2)
        case sfi::simd::avx2:   return kernels_of<sfi::bytes_avx2>();
#endif
#if defined(SFI_NEON)
        case sfi::simd::neon:   return kernels_of<sfi::bytes_neon>();
#endif
        default:                return kernels_of<sfi::bytes_scalar>();
    }
}

// sum over the cells of weight*(code_j - centre_j), [n_v]; then the cells' largest logit and, relative to it, the sum of
// the weights and of the exact exp(logit - maximum)
struct partial {
    float * p;
    int     n;
    float & max()    const { return p[n]; }
    float & weight() const { return p[n + 1]; }
    float & sum()    const { return p[n + 2]; }

    void clear() const {
        std::fill(p, p + n + 3, 0.0f);
        max() = -INFINITY;
    }
    void add(const partial & x) const {
        if (x.max() == -INFINITY) {
            return;
        }
        const float top = std::max(max(), x.max());
        const float mine = std::exp(max() - top), theirs = std::exp(x.max() - top);
        for (int j = 0; j < n + 3; ++j) {
            p[j] = mine*p[j] + theirs*x.p[j];
        }
        max() = top;
    }
};

struct task {
    const ggml_tensor * dst, * logits, * codes, * basis, * selected;
    sfi::sketch_layout l;
    sfi::tile_ops      ops;
    kernels            f;
    int64_t n_list, n_head_kv, group, n_chunks, n_selected;
    float    * partials;  // [n_head, n_chunks, n_v + 3]
    uint16_t * taken;     // of this thread: a bit per cell of a chunk
    float    * scratch;   // of this thread: [n_selected]

    task(const ggml_compute_params * params, ggml_tensor * dst) :
            dst(dst), logits(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), selected(dst->src[3]), l(dst),
            ops(sfi::tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, params->use_ref)), f(kernels_for(sfi::simd_for(params->use_ref))) {
        n_list     = logits->ne[0];
        n_head_kv  = codes->ne[2];
        group      = logits->ne[1]/n_head_kv;
        n_chunks   = chunks_of(dst);
        n_selected = selected ? selected->ne[0] : 0;
        partials   = (float *) params->wdata;
        float * own = partials + shared_size(dst) + params->ith*thread_size(dst);
        taken   = (uint16_t *) own;
        scratch = own + chunk_cells/32;
    }

    static int64_t chunks_of(const ggml_tensor * dst) { return (dst->src[0]->ne[0] + chunk_cells - 1)/chunk_cells; }
    static int64_t shared_size(const ggml_tensor * dst) {
        return dst->ne[1]*chunks_of(dst)*(sfi::sketch_layout(dst).n_v + 3);
    }
    static int64_t thread_size(const ggml_tensor * dst) {
        return chunk_cells/32 + GGML_PAD(dst->src[3] ? dst->src[3]->ne[0] : 0, 16) + 16;
    }

    partial partial_of(int64_t h, int64_t chunk) const { return { partials + (h*n_chunks + chunk)*(l.n_v + 3), l.n_v }; }
    const float * logits_of(int64_t h) const { return (const float *) ((const char *) logits->data + h*logits->nb[1]); }
    const int32_t * selected_of(int64_t h_kv) const {
        return (const int32_t *) ((const char *) selected->data + h_kv*selected->nb[1]);
    }
};

// pass 1
void mark_selected(const task & a, int64_t h_kv, int64_t begin, int64_t end) {
    std::fill(a.taken, a.taken + chunk_cells/16, (uint16_t) 0);
    for (int64_t i = 0; i < a.n_selected; ++i) {
        const int64_t cell = a.selected_of(h_kv)[i];
        if (cell >= begin && cell < end) {
            a.taken[(cell - begin)/16] |= (uint16_t) (1u << (cell - begin) % 16);
        }
    }
}

// the logits of a run without those of the selected cells
const float * without_selected(const float * x, const uint16_t * taken, int n, float * copy) {
    bool any = false;
    for (int b = 0; b < n/16; ++b) {
        any = any || taken[b];
    }
    if (!any) {
        return x;
    }
    std::copy(x, x + n, copy);
    for (int b = 0; b < n/16; ++b) {
        float * of_block = copy + 16*b;
        for (uint32_t bits = taken[b]; bits != 0; bits >>= 1, ++of_block) {
            *of_block = bits & 1 ? -INFINITY : *of_block;
        }
    }
    return copy;
}

// passes 2 and 3 for n_heads heads from h on and the n cells from c on
void sum_run(const task & a, int64_t h, int n_heads, int64_t chunk, int64_t c, int n) {
    const uint8_t * codes = (const uint8_t *) a.codes->data + h/a.group*a.codes->nb[2] + c/16*a.l.block_bytes();
    run_weights w[max_heads];
    float buffer[max_heads][sfi::sketch_max_components + 3];
    bool  empty = true;
    for (int i = 0; i < n_heads; ++i) {
        float copy[run_cells];
        a.f.weigh(without_selected(a.logits_of(h + i) + c, a.taken + (c - chunk*chunk_cells)/16, n, copy), n, w[i]);
        if (w[i].max == -INFINITY) {
            memset(w[i].lo, 0, n);
            memset(w[i].hi, 0, n);
        } else {
            empty = false;
        }
    }
    if (empty) {
        return;
    }
    for (int g = 0; g < a.l.n_v_groups; ++g) {
        int32_t sum[max_heads*16];
        a.f.codes[n_heads - 1](a.l, g, codes, n/16, w, sum);
        const float centre = 0.5f*(float) a.l.v[g][0].mask;
        for (int i = 0; i < n_heads; ++i) {
            for (int d = 0; d < 16; ++d) {
                buffer[i][16*g + d] = (float) sum[16*i + d]/one - centre*w[i].weight;
            }
        }
    }
    for (int i = 0; i < n_heads; ++i) {
        const partial run = { buffer[i], a.l.n_v };
        run.max()    = w[i].max;
        run.weight() = w[i].weight;
        run.sum()    = w[i].sum;
        a.partial_of(h + i, chunk).add(run);
    }
}

void sum_chunk(const task & a, int64_t h_kv, int64_t chunk) {
    const int64_t begin = chunk*chunk_cells, end = std::min(begin + chunk_cells, a.n_list);
    mark_selected(a, h_kv, begin, end);
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        a.partial_of(h, chunk).clear();
    }
    for (int64_t c = begin; c < end; c += run_cells) {
        for (int64_t g = 0; g < a.group; g += max_heads) {
            const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
            sum_run(a, h_kv*a.group + g, n_heads, chunk, c, (int) std::min<int64_t>(run_cells, end - c));
        }
    }
}

float log_add_exp(float a, float b) {
    const float top = std::max(a, b);
    return top == -INFINITY ? top : top + std::log(std::exp(a - top) + std::exp(b - top));
}

float log_sum_exp_selected(const task & a, int64_t h) {
    int n = 0;
    for (int64_t i = 0; i < a.n_selected; ++i) {
        const int64_t cell = a.selected_of(h/a.group)[i];
        if (cell >= 0 && cell < a.n_list) {
            a.scratch[n++] = a.logits_of(h)[cell];
        }
    }
    const int n_pad = (int) GGML_PAD(n, sfi::max_vector);
    std::fill(a.scratch + n, a.scratch + n_pad, -INFINITY);
    const float max = n > 0 ? a.ops.max(a.scratch, n_pad) : -INFINITY;
    return max == -INFINITY ? max : max + std::log(a.ops.exp(a.scratch, n_pad, max));
}

// pass 4
void merge(const task & a, int64_t h) {
    const int64_t n_embd = a.dst->ne[0] - 2;
    float * out = (float *) ((char *) a.dst->data + h*a.dst->nb[1]);

    float buffer[sfi::sketch_max_components + 3];
    const partial sum = { buffer, a.l.n_v };
    sum.clear();
    for (int64_t i = 0; i < a.n_chunks; ++i) {
        sum.add(a.partial_of(h, i));
    }
    if (sum.max() == -INFINITY) {
        std::fill(out, out + n_embd, 0.0f);
        out[n_embd] = -INFINITY;
    } else {
        const auto basis = sfi::sketch_basis::of_v(a.basis, h/a.group, a.l.n_v, n_embd);
        std::copy(basis.mean, basis.mean + n_embd, out);
        for (int j = 0; j < a.l.n_v; ++j) {
            const float z = sum.p[j]/sum.weight();
            for (int64_t i = 0; i < n_embd; ++i) {
                out[i] += z*basis.dec[j*n_embd + i];
            }
        }
        out[n_embd] = sum.max() + std::log(sum.sum());
    }
    out[n_embd + 1] = log_add_exp(out[n_embd], log_sum_exp_selected(a, h));
}

} // namespace

void sfi::sketch_tail(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const int64_t ith = params->ith, nth = params->nth, n_items = a.n_head_kv*a.n_chunks;

    for (int64_t i = n_items*ith/nth; i < n_items*(ith + 1)/nth; ++i) {
        sum_chunk(a, i/a.n_chunks, i % a.n_chunks);
    }
    ggml_barrier(params->threadpool);

    for (int64_t h = ith; h < dst->ne[1]; h += nth) {
        merge(a, h);
    }
}

size_t sfi::sketch_tail_work_size(const ggml_tensor * dst, int n_threads) {
    return (task::shared_size(dst) + n_threads*task::thread_size(dst))*sizeof(float);
}

bool sfi::sketch_tail_supported(const ggml_tensor * dst) {
    return sketch_layout::supported(dst);
}
