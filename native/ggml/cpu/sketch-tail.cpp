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
#include "sketch.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int     run_cells   = 256;
constexpr int     run_blocks  = run_cells/sfi::sketch_cells;
constexpr int     chunk_runs  = 8;
constexpr int64_t chunk_cells = chunk_runs*run_cells;
constexpr float   one         = 32512.0f; // a weight of 1 as an integer: 127*256

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
        const float top = std::max(max(), x.max());
        if (x.max() == -INFINITY) {
            return;
        }
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
    int64_t n_list, n_head_kv, group, n_chunks, n_selected;
    float    * partials;  // [n_head, n_chunks, n_v + 3]
    uint16_t * taken;     // of this thread: a bit per cell of a chunk
    float    * scratch;   // of this thread: [n_selected]

    task(const ggml_compute_params * params, ggml_tensor * dst) :
            dst(dst), logits(dst->src[0]), codes(dst->src[1]), basis(dst->src[2]), selected(dst->src[3]), l(dst),
            ops(sfi::tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, params->use_ref)) {
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

// passes 2 and 3: n cells, from the block that `codes` is at
void sum_run(const sfi::sketch_layout & l, const uint8_t * codes, const float * x, const uint16_t * taken, int n, const partial & out) {
    const auto counts = [&](int i) { return !(taken[i/16] >> i % 16 & 1); };
    out.clear();
    for (int i = 0; i < n; ++i) {
        if (counts(i)) {
            out.max() = std::max(out.max(), x[i]);
        }
    }
    if (out.max() == -INFINITY) {
        return;
    }
    int32_t w[run_cells], total = 0;
    for (int i = 0; i < n; ++i) {
        const float e = counts(i) ? std::exp(x[i] - out.max()) : 0.0f;
        w[i] = (int32_t) lrintf(one*e);
        total += w[i];
        out.sum() += e;
    }
    out.weight() = (float) total/one;

    for (int g = 0; g < l.n_v_groups; ++g) {
        int32_t sum[16] = {};
        for (int i = 0; i < n; i += 4) {
            const sfi::sketch_field & f = l.v[g][i/4 % 4];
            const uint8_t * plane = codes + i/16*l.block_bytes() + f.plane*sfi::sketch_plane;
            for (int j = 0; j < sfi::sketch_plane; ++j) {
                sum[j/4] += w[i + j % 4]*(plane[j] >> f.shift & f.mask);
            }
        }
        const float centre = 0.5f*(float) l.v[g][0].mask;
        for (int d = 0; d < 16; ++d) {
            out.p[16*g + d] = (float) sum[d]/one - centre*out.weight();
        }
    }
}

void sum_chunk(const task & a, int64_t h_kv, int64_t chunk) {
    const int64_t begin = chunk*chunk_cells, end = std::min(begin + chunk_cells, a.n_list);
    mark_selected(a, h_kv, begin, end);
    float buffer[sfi::sketch_max_components + 3];
    const partial run = { buffer, a.l.n_v };
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        a.partial_of(h, chunk).clear();
    }
    for (int64_t c = begin; c < end; c += run_cells) {
        const uint8_t * codes = (const uint8_t *) a.codes->data + h_kv*a.codes->nb[2] + c/16*a.l.block_bytes();
        for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
            sum_run(a.l, codes, a.logits_of(h) + c, a.taken + (c - begin)/16, (int) std::min<int64_t>(run_cells, end - c), run);
            a.partial_of(h, chunk).add(run);
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
