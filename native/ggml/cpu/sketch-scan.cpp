// GGML_OP_SKETCH_SCAN on the CPU, with one look (sketch-looks.cpp: with two): every code is read once, and what is computed
// from it stays in the first-level cache.
//
// Cells are taken in runs of 256, and a few runs make a chunk, which is what a thread takes. Logits are kept as base-2
// logarithms. The weights of a run are integers, relative to a power of two that is not below the largest of them, so sums
// over the codes are exact, and sums of different runs are put together without rounding a factor. Nothing depends on
// how chunks are shared out.
//
//   pass 1  project the queries of a group onto the basis, as 8-bit weights
//   pass 2  per run: logits, weights, sums over the value codes, and the cells that may turn out to be selected
//   pass 3  per KV head: the log-sum-exps, by them the selected cells, which are taken out of the sums again; decode once
//
// A cell is a candidate while its share of what this thread has seen of its head is large enough: that can only fall.

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "sketch-looks.h"
#include "sketch-task.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

namespace sfi {
namespace scan {

namespace {

using exp_constants::log2e;

constexpr int64_t span_chunks = 8; // that a thread scans before it looks for candidates in them: they fit the second-level cache
constexpr int64_t ld_t        = span_chunks*chunk_cells + 80; // rows of logits, not a power of two apart

// 2^x for an integer x < 128 or -INFINITY
float power_of_two(float x) {
    const uint32_t bits = x < -126.0f ? 0 : (uint32_t) ((int32_t) x + 127) << 23;
    float y;
    memcpy(&y, &bits, sizeof(y));
    return y;
}

// 2^top times: a sum of weights, which is exact, and of 1/64 of them times (code_j - centre_j)
struct partial {
    double  weight = 0.0;
    float   top = -INFINITY;
    int32_t n_v = 0;
    float * v   = nullptr;

    void add(float x_top, double x_weight, const float * x_v) {
        if (x_weight == 0.0) {
            return;
        }
        const float most = std::max(top, x_top);
        const float mine = power_of_two(top - most), theirs = power_of_two(x_top - most);
        top    = most;
        weight = mine*weight + theirs*x_weight;
        for (int j = 0; j < n_v; ++j) {
            v[j] = mine*v[j] + theirs*x_v[j];
        }
    }
    float log2_sum() const { return weight > 0.0 ? top + std::log2((float) weight) - log2_one : -INFINITY; }
};

// of all threads
struct shared_rows {
    partial * partials;     // [n_head, ld/chunk_cells]
    float   * sums;         // [n_head, ld/chunk_cells, n_v]: theirs
    float   * run_top;      // [n_head, ld/run_cells]
    int32_t * n_candidates; // [n_head_kv, ld/chunk_cells]
    int32_t * candidate;    // [n_head_kv, ld]: the cells; those of a chunk begin where it does
    float   * candidate_t;  // [n_head, ld]

    shared_rows(const task & a, arena & from) {
        from.take(partials,     a.n_head*a.ld/chunk_cells);
        from.take(sums,         a.n_head*a.ld/chunk_cells*a.l.n_v);
        from.take(run_top,      a.n_head*a.ld/run_cells);
        from.take(n_candidates, a.n_head_kv*a.ld/chunk_cells);
        from.take(candidate,    a.n_head_kv*a.ld);
        from.take(candidate_t,  a.n_head*a.ld);
    }
};

// of one thread
struct own_rows {
    float     * q;             // [group, n_embd_k]
    float     * products;      // [group, n_k + 1, padded]
    projected * p;             // [group]
    partial   * sum;           // [group]: of all chunks, pass 3
    partial   * seen;          // [group]: of all chunks of this KV head so far, without values
    float     * bound, * lse;  // [group]
    float     * t;             // [group, ld_t]: of a span
    uint8_t   * weights;       // [max_heads, 4*run_cells]
    float     * sums;          // [max_heads, n_v]
    float     * v;             // [group, n_v]
    uint16_t  * skipped;       // a bit per cell
    int32_t   * in_run;        // [run_cells]: 0, 1, 2 ...
    // pass 3
    int32_t   * cell;          // [ld]: the candidates that are left
    float     * kept;          // [group, ld]: their logits
    float     * z, * y;        // [ld]
    float     * w;             // [max_heads, ld]
    float     * shift, * scale; // [ld/run_cells]
    uint32_t  * key;           // [ld]

    own_rows(const task & a, arena & from) {
        from.take(q,        a.group*a.q->ne[0]);
        from.take(products, a.group*GGML_PAD(a.l.n_k + 1, max_vector));
        from.take(p,       a.group);
        from.take(sum,     a.group);
        from.take(seen,    a.group);
        from.take(bound,   a.group);
        from.take(lse,     a.group);
        from.take(t,       a.group*ld_t);
        from.take(weights, max_heads*4*run_cells);
        from.take(sums,    max_heads*a.l.n_v);
        from.take(v,       a.group*a.l.n_v);
        from.take(skipped, a.ld/16);
        from.take(in_run,  run_cells);
        from.take(cell,    a.ld);
        from.take(kept,    a.group*a.ld + max_vector);
        from.take(w,       max_heads*a.ld);
        from.take(shift,   a.ld/run_cells);
        from.take(scale,   a.ld/run_cells);
        from.take(z,       a.ld);
        from.take(y,       a.ld);
        from.take(key,     a.ld);
    }
};

struct worker {
    const task        & a;
    const kernels       f;
    const shared_rows & all;
    const own_rows      own;
    const basis_ops     ops;
    const int64_t       n_used, n_chunks;

    worker(const task & a, const kernels & f, const shared_rows & all, const own_rows & own, bool use_ref) :
            a(a), f(f), all(all), own(own), ops(use_ref),
            n_used(a.n_used()),
            n_chunks((n_used + chunk_cells - 1)/chunk_cells) {}

    partial & partial_of(int64_t h, int64_t chunk) const { return all.partials[h*a.ld/chunk_cells + chunk]; }
    partial   cleared(float * v) const;
    float & run_top(int64_t h, int64_t c) const { return all.run_top[(h*a.ld + c)/run_cells]; }

    void scan_run(int64_t h_kv, int64_t c, int n, float * t) const;
    int64_t find_candidates(int64_t h_kv, int64_t c, int n, float * t, int64_t to) const;
    void scan_span(int64_t h_kv, int64_t first, int64_t last) const;
    void scan(int64_t first, int64_t last) const;

    int64_t keep_large(int64_t h_kv) const;
    void    take_out(int64_t h, int n_heads, int64_t n, partial * sum) const;
    void    write(int64_t h, const partial & rest, float log2_all) const;
    void    finish(int64_t h_kv) const;
};

// ---- pass 2 ------------------------------------------------------------------------------------------------------------

static void cap(float * t, int n, float softcap) {
    for (int i = 0; i < n; ++i) {
        t[i] = log2e*softcap*tanhf(t[i]/softcap);
    }
}

void worker::scan_run(int64_t h_kv, int64_t c, int n, float * t) const {
    const uint8_t * block = a.codes_of(h_kv) + c/sketch_cells*a.l.block_bytes();
    for (int64_t g = 0; g < a.group; g += max_heads) {
        f.logits[std::min<int64_t>(a.group - g, max_heads) - 1](a.l, block, n, own.p + g, t + g*ld_t, ld_t);
    }
    for (int64_t g = 0; g < a.group && a.softcap > 0.0f; ++g) {
        cap(t + g*ld_t, n, a.softcap);
    }
    hide_skipped(own.skipped, c, n, a.group, t, ld_t);

    for (int64_t g = 0; g < a.group; g += max_heads) {
        const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
        run_sum sum[max_heads];
        for (int i = 0; i < n_heads; ++i) {
            f.weigh(t + (g + i)*ld_t, n, own.weights + i*4*run_cells, sum[i]);
            run_top(h_kv*a.group + g + i, c) = sum[i].top;
        }
        for (int j = 0; j < a.l.n_v_groups; ++j) {
            f.codes[n_heads - 1](a.l, j, block, n, own.weights, sum, own.sums);
        }
        for (int i = 0; i < n_heads; ++i) {
            partial_of(h_kv*a.group + g + i, c/chunk_cells).add(sum[i].top, sum[i].weight, own.sums + i*a.l.n_v);
            own.seen[g + i].add(sum[i].top, sum[i].weight, nullptr);
        }
    }
}

// Cells of a run whose share of what has been seen of some head is large enough go to candidates `to` and on.
int64_t worker::find_candidates(int64_t h_kv, int64_t c, int n, float * t, int64_t to) const {
    const float log2_least = a.least ? std::log2(a.least[h_kv]) : 0.0f;
    bool any = false;
    for (int64_t g = 0; g < a.group; ++g) {
        const partial & seen = own.seen[g];
        own.bound[g] = -FLT_MAX;
        if (a.least && seen.weight > 0.0) {
            own.bound[g] = std::max(seen.top + floor_log2((float) seen.weight) - log2_one + log2_least - 1e-3f, -FLT_MAX);
        }
        any = any || run_top(h_kv*a.group + g, c) >= own.bound[g];
    }
    if (!any) {
        return 0;
    }
    return f.filter({ own.in_run, t, ld_t, nullptr }, n, (int) a.group, own.bound, 0.0f, (int32_t) c,
                    { all.candidate + h_kv*a.ld + to, all.candidate_t + h_kv*a.group*a.ld + to, a.ld, nullptr });
}

partial worker::cleared(float * v) const {
    partial p;
    p.v   = v;
    p.n_v = a.l.n_v;
    std::fill(v, v + a.l.n_v, 0.0f);
    return p;
}

// Some chunks: first all sums, so that few of their cells seem large enough.
void worker::scan_span(int64_t h_kv, int64_t first, int64_t last) const {
    const int64_t begin = first*chunk_cells, end = std::min(last*chunk_cells, (int64_t) GGML_PAD(n_used, sketch_cells));
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            partial_of(h, chunk) = cleared(all.sums + (h*a.ld/chunk_cells + chunk)*a.l.n_v);
        }
    }
    for (int64_t c = begin; c < end; c += run_cells) {
        scan_run(h_kv, c, (int) std::min<int64_t>(run_cells, end - c), own.t + c - begin);
    }
    std::fill_n(all.n_candidates + h_kv*a.ld/chunk_cells + first, last - first, 0);
    for (int64_t c = begin; c < end; c += run_cells) {
        const int64_t chunk = c/chunk_cells;
        int32_t & n = all.n_candidates[h_kv*a.ld/chunk_cells + chunk];
        n += (int32_t) find_candidates(h_kv, c, (int) std::min<int64_t>(run_cells, end - c), own.t + c - begin, chunk*chunk_cells + n);
    }
}

// the chunks first .. last of all KV heads'
void worker::scan(int64_t first, int64_t last) const {
    mark_skipped(a, n_used, own.skipped);
    std::iota(own.in_run, own.in_run + run_cells, 0);
    for (int64_t i = first; i < last; ) {
        const int64_t h_kv = i/n_chunks, end = std::min(last, (h_kv + 1)*n_chunks);
        project(a, h_kv, ops, own.q, own.products, own.p);
        std::fill(own.seen, own.seen + a.group, partial());
        for (; i < end; i = std::min(i + span_chunks, end)) {
            scan_span(h_kv, i % n_chunks, std::min(i + span_chunks, end) - h_kv*n_chunks);
        }
    }
}

// ---- pass 3 ------------------------------------------------------------------------------------------------------------

// The candidates that reach `least`, with the largest log2 of softmax in the group as z; returns how many.
int64_t worker::keep_large(int64_t h_kv) const {
    const float least = a.least ? std::log2(a.least[h_kv]) : -FLT_MAX;
    int64_t n = 0;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const int64_t begin = chunk*chunk_cells;
        n += f.filter({ all.candidate + h_kv*a.ld + begin, all.candidate_t + h_kv*a.group*a.ld + begin, a.ld, nullptr },
                      all.n_candidates[h_kv*a.ld/chunk_cells + chunk], (int) a.group, own.lse, least, 0,
                      { own.cell + n, own.kept + n, a.ld, own.z + n });
    }
    return n;
}

// Subtract what the n selected cells gave n_heads heads from h on: the same integers again.
void worker::take_out(int64_t h, int n_heads, int64_t n, partial * sum) const {
    const int64_t n_pad = GGML_PAD(n, max_vector), n_runs = (n_used + run_cells - 1)/run_cells;
    float weight_v[max_heads];
    for (int k = 0; k < n_heads; ++k) {
        for (int64_t run = 0; run < n_runs; ++run) {
            const float top = run_top(h + k, run*run_cells);
            own.shift[run] = log2_one - top;
            own.scale[run] = power_of_two(top - sum[k].top);
        }
        float * w = own.w + k*a.ld;
        for (int64_t i = 0; i < n_pad; ++i) {
            own.y[i] = own.shift[own.cell[i]/run_cells];
        }
        f.exp2(own.kept + ((h + k) % a.group)*a.ld, own.y, n_pad, w);
        std::fill(w + n, w + n_pad, 0.0f);
        double total[16] = {}; // exact, so in any order
        float  of_v [16] = {};
        for (int64_t i = 0; i < n_pad; i += 16) {
            for (int j = 0; j < 16; ++j) {
                const float scale = own.scale[own.cell[i + j]/run_cells];
                total[j] += w[i + j]*scale;
                w[i + j]  = std::floor((w[i + j] + 32.0f)*(1.0f/64.0f))*scale; // as over_64()
                of_v[j]  += w[i + j];
            }
        }
        sum[k].weight -= std::accumulate(total, total + 16, 0.0);
        weight_v[k]    = std::accumulate(of_v, of_v + 16, 0.0f);
    }
    for (int j = 0; j < a.l.n_v_groups; ++j) {
        float out[max_heads*16];
        f.cells[n_heads - 1](a.l, j, a.codes_of(h/a.group), own.cell, n, own.w, a.ld, out);
        const float centre = 0.5f*(float) a.l.v[j][0].mask;
        for (int k = 0; k < n_heads; ++k) {
            for (int d = 0; d < 16; ++d) {
                sum[k].v[16*j + d] -= out[16*k + d] - centre*weight_v[k];
            }
        }
    }
}

void worker::write(int64_t h, const partial & rest, float log2_all) const {
    const float log2_rest = rest.log2_sum();
    if (!(log2_rest - log2_all > log2_no_tail)) {
        write_no_tail(a, h);
        return;
    }
    for (int j = 0; j < a.l.n_v; ++j) {
        rest.v[j] *= 64.0f/(float) rest.weight;
    }
    write_tail(a, h, ops, rest.v, log2_rest);
}

void worker::finish(int64_t h_kv) const {
    for (int64_t g = 0; g < a.group; ++g) {
        own.sum[g] = cleared(own.v + g*a.l.n_v);
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
            const partial & x = partial_of(h_kv*a.group + g, chunk);
            own.sum[g].add(x.top, x.weight, x.v);
        }
        own.lse[g] = own.sum[g].log2_sum();
    }
    const choice best = { own.cell, own.kept, a.ld, a.group, own.z, own.key, own.lse };
    const int64_t n = best.keep_best(keep_large(h_kv), a.n_selected);
    int32_t * selected = a.selected_of(h_kv);
    a.write_counts(h_kv, n, 0);
    std::copy(own.cell, own.cell + n, selected);
    std::fill(own.cell + n, own.cell + GGML_PAD(n, max_vector), own.cell[0]); // any
    std::fill(selected + n, selected + a.n_selected, -1);
    for (int64_t g = 0; g < a.group && n > 0; g += max_heads) {
        take_out(h_kv*a.group + g, (int) std::min<int64_t>(a.group - g, max_heads), n, own.sum + g);
    }
    for (int64_t g = 0; g < a.group; ++g) {
        write(h_kv*a.group + g, own.sum[g], own.lse[g]);
    }
}

} // namespace

static void look_once(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(dst);
    arena work(params->wdata);
    const shared_rows all(a, work);
    arena mine = work.behind(params->ith*size_of<own_rows>(a));
    const worker w(a, kernels_for(simd_for(params->use_ref)), all, own_rows(a, mine), params->use_ref);
    const int64_t ith = params->ith, nth = params->nth, n_items = a.n_head_kv*w.n_chunks;

    w.scan(n_items*ith/nth, n_items*(ith + 1)/nth);
    ggml_barrier(params->threadpool);

    for (int64_t h_kv = ith; h_kv < a.n_head_kv; h_kv += nth) {
        w.finish(h_kv);
    }
}

static size_t look_once_work_size(const ggml_tensor * dst, int n_threads) {
    const task a(dst);
    return size_of<shared_rows>(a) + n_threads*size_of<own_rows>(a) + arena::line;
}

} // namespace scan

void sketch_scan(const ggml_compute_params * params, ggml_tensor * dst) {
    (sketch_layout(dst).looks_twice() ? scan::look_twice : scan::look_once)(params, dst);
}

size_t sketch_scan_work_size(const ggml_tensor * dst, int n_threads) {
    return (sketch_layout(dst).looks_twice() ? scan::look_twice_work_size : scan::look_once_work_size)(dst, n_threads);
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    return sketch_layout::supported(dst) && dst->src[0]->ne[0] % max_vector == 0 && (dst->ne[0] - 1) % max_vector == 0;
}

} // namespace sfi
