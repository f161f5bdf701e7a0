// SKETCH_SCAN on the CPU.
//
//   pass 1  project the queries of a group onto the basis; per chunk: logits from the first planes, their sum, and the cells
//           that may be worth a second look
//   pass 2  per chunk: those that are, by the sums of all chunks; their logits from all planes, the sum of these and the sums over V
//   pass 3  per KV head: the selected cells, which are taken out of the sums again; decode once
//
// Everything is summed up in chunks, in their order, so nothing depends on how these are shared out. Logits are kept as base-2
// logarithms. Only pass 1 touches every cell.

#include "sfi-ops.h"

#include "ggml-cpu-impl.h"
#include "sketch-task.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

namespace sfi {
namespace scan {

namespace {

constexpr powers  none = { -INFINITY, 0.0f };
constexpr float   least_unseen = 1.0f/(1 << 19);
constexpr int64_t span_logits = 1 << 18; // of a thread, before it looks for candidates in them: they fit the second-level cache

// The more of a head's cells are known, the fewer seem worth a second look.
int64_t span_chunks(const task & a) {
    return std::min(std::max<int64_t>(span_logits/(a.group*chunk_cells), 8), a.ld/chunk_cells);
}

// rows of logits of a span, not a power of two apart
int64_t span_ld(const task & a) {
    return span_chunks(a)*chunk_cells + 80;
}

// log2 of a sum of powers, put together from those of the parts
struct log2_sum {
    float top = -INFINITY, sum = 0.0f;

    void add(const powers & x) {
        if (x.sum == 0.0f) {
            return;
        }
        if (x.top <= top) {
            sum += x.sum*std::exp2(x.top - top);
        } else {
            sum = sum*std::exp2(top - x.top) + x.sum;
            top = x.top;
        }
    }
    float value() const { return sum > 0.0f ? top + std::log2(sum) : -INFINITY; }
};

// of all threads
struct shared_rows {
    powers  * first, * again; // [n_head, ld/chunk_cells]: of the logits of each look
    float   * kept;           // [n_head, ld/chunk_cells]: share by the first look of the cells that are looked at again
    float   * v;              // [n_head, ld/chunk_cells, n_v]: sums of their codes times 2^(logit - top of `again`)
    int32_t * n, * begin;     // [n_head_kv, ld/chunk_cells]: how many these are; where they lie in the rows of cell and t
    int32_t * cell;           // [n_head_kv, ld]: the cells, close together, as they are few and pages many
    float   * t;              // [n_head, ld]: their logits

    shared_rows(const task & a, arena & from) {
        const int64_t n_chunks = a.ld/chunk_cells;
        from.take(first, a.n_head*n_chunks);
        from.take(again, a.n_head*n_chunks);
        from.take(kept,  a.n_head*n_chunks);
        from.take(v,     a.n_head*n_chunks*a.l.n_v);
        from.take(n,     a.n_head_kv*n_chunks);
        from.take(begin, a.n_head_kv*n_chunks);
        from.take(cell,  a.n_head_kv*a.ld + max_vector);
        from.take(t,     a.n_head*a.ld + max_vector);
    }
};

// of one thread
struct own_rows {
    float     * q;            // [group, n_embd_k]
    float     * products;     // [group, n_k + 1, padded]
    projected * p;            // [n_head]: of the KV heads that this thread has chunks of
    log2_sum  * seen;         // [group]: of all chunks of this KV head so far
    float     * bound;        // [group]
    log2_sum  * first;        // [group]: of all cells, by the first look
    log2_sum  * again;        // [group]: of all cells that were looked at again
    float     * others;       // [group]: sum of all other cells by the first look, relative to 2^(top of `first`)
    float     * lse;          // [group]: of all cells
    float     * t;            // [group, span_ld]: of a span
    uint16_t  * skipped;      // a bit per cell
    int32_t   * order;        // [chunk_cells]: 0, 1, 2 ...
    float     * w;            // [group, ld_w]: weights of cells of a chunk, then of the selected cells
    float     * v;            // [group, n_v]
    float     * weight;       // [group]
    float     * sums;         // [max_heads, 16]

    static int64_t ld_w(const task & a) { return std::max(chunk_cells, (int64_t) GGML_PAD(a.n_selected, max_vector)) + 16; }

    own_rows(const task & a, arena & from) {
        from.take(q,         a.group*a.q->ne[0]);
        from.take(products,  a.group*GGML_PAD(a.l.n_k + 1, max_vector));
        from.take(p,         a.n_head);
        from.take(seen,      a.group);
        from.take(bound,     a.group);
        from.take(first,     a.group);
        from.take(again,     a.group);
        from.take(others,    a.group);
        from.take(lse,       a.group);
        from.take(t,         a.group*span_ld(a));
        from.take(skipped,   a.ld/16);
        from.take(order,     chunk_cells);
        from.take(w,         a.group*ld_w(a));
        from.take(v,         a.group*a.l.n_v);
        from.take(weight,    a.group);
        from.take(sums,      max_heads*sketch_cells);
    }
};

// of a thread in pass 3, in which there are as many at work as KV heads at most
struct finish_rows {
    int32_t   * best;         // [ld]: the cells that may be selected
    float     * chosen;       // [group, ld]: their logits
    float     * z;            // [ld]
    uint32_t  * key;          // [ld]

    finish_rows(const task & a, arena & from) {
        from.take(best,   a.ld + max_vector);
        from.take(chosen, a.group*a.ld + max_vector);
        from.take(z,      a.ld + max_vector);
        from.take(key,    a.ld);
    }
};

struct worker {
    const task        & a;
    const kernels       f;
    const shared_rows & all;
    const own_rows      own;
    const finish_rows   last;
    const basis_ops     ops;
    const int64_t       n_used, n_chunks, ld_t, ld_w;
    const float         least_first; // log2 of the share that is worth a second look

    worker(const task & a, const kernels & f, const shared_rows & all, const own_rows & own, const finish_rows & last, bool use_ref) :
            a(a), f(f), all(all), own(own), last(last), ops(use_ref),
            n_used(a.n_used()), n_chunks((n_used + chunk_cells - 1)/chunk_cells), ld_t(span_ld(a)), ld_w(own_rows::ld_w(a)),
            least_first(a.second_look > 0.0f ? std::log2(a.second_look/(float) std::clamp<int64_t>(n_used, 1, sketch_mean_cells)) : -FLT_MAX) {
        std::iota(own.order, own.order + chunk_cells, 0);
    }

    int64_t chunk_of(int64_t h, int64_t chunk) const { return h*(a.ld/chunk_cells) + chunk; }
    int64_t begin_of(int64_t h_kv, int64_t chunk) const { return all.begin[chunk_of(h_kv, chunk)]; }
    int32_t * cells_of (int64_t h_kv, int64_t chunk) const { return all.cell + h_kv*a.ld + begin_of(h_kv, chunk); }
    float   * logits_of(int64_t h,    int64_t chunk) const { return all.t + h*a.ld + begin_of(h/a.group, chunk); }
    projected * of_group(int64_t h_kv) const { return own.p + h_kv*a.group; }
    float   * sums_of(int64_t h, int64_t chunk) const { return all.v + chunk_of(h, chunk)*a.l.n_v; }
    log2_sum sum_of(const powers * x, int64_t h) const;

    void    look_at_chunk(int64_t h_kv, int64_t c, int n, float * t) const;
    int64_t look_at_span(int64_t h_kv, int64_t first, int64_t last, int64_t to) const;
    void    find_candidates(int64_t h_kv, int64_t chunk, float * t, int64_t to) const;
    void    look(int64_t first, int64_t last) const;

    void    keep(int64_t h_kv, int64_t chunk) const;
    void    add_values(int64_t h_kv, const int32_t * cell, int64_t n, int64_t g, int n_heads, float sign, float * to, int64_t ld) const;
    void    look_again_at(int64_t h_kv, int64_t chunk) const;
    void    look_again(int64_t first, int64_t last) const;

    float   unseen(int64_t h) const;
    void    add_up(int64_t h_kv) const;
    int64_t select(int64_t h_kv) const;
    void    take_out(int64_t h_kv, int64_t n) const;
    void    write(int64_t h) const;
    void    finish(int64_t h_kv) const;
};

log2_sum worker::sum_of(const powers * x, int64_t h) const {
    log2_sum sum;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        sum.add(x[chunk_of(h, chunk)]);
    }
    return sum;
}

// ---- pass 1 ------------------------------------------------------------------------------------------------------------

static void cap(float * t, int n, float softcap) {
    for (int i = 0; i < n; ++i) {
        t[i] = exp_constants::log2e*softcap*tanhf(t[i]/softcap);
    }
}

// The logits of a chunk, and their powers: summed while the logits are at hand, relative to what none can exceed, but where that is far
// off, or logits are capped, or cells are left out.
void worker::look_at_chunk(int64_t h_kv, int64_t c, int n, float * t) const {
    const uint8_t * block = a.codes_of(h_kv) + c/sketch_cells*a.l.block_bytes();
    const bool whole = a.softcap == 0.0f && std::all_of(own.skipped + c/16, own.skipped + (c + n)/16, [](uint16_t bits) { return bits == 0; });
    for (int64_t g = 0; g < a.group; g += max_heads) {
        const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
        const projected * p = of_group(h_kv) + g;
        float * rows = t + g*ld_t;
        powers sum[max_heads];
        if (whole) {
            f.summed[n_heads - 1](a.l, block, n, p, rows, ld_t, sum);
        } else {
            f.logits[n_heads - 1](a.l, block, n, p, rows, ld_t);
            for (int i = 0; i < n_heads && a.softcap > 0.0f; ++i) {
                cap(rows + i*ld_t, n, a.softcap);
            }
            hide_skipped(own.skipped, c, n, n_heads, rows, ld_t);
        }
        for (int i = 0; i < n_heads; ++i) {
            const bool is_near = whole && p[i].most - sum[i].top < 90.0f;
            powers & first = all.first[chunk_of(h_kv*a.group + g + i, c/chunk_cells)];
            first = is_near ? powers { sum[i].top, sum[i].sum*std::exp2(p[i].most - sum[i].top) } : f.powers(rows + i*ld_t, n);
            own.seen[g + i].add(first);
        }
    }
}

// Some chunks: first all sums, so that few of their cells seem worth a second look; these go to the rows from `to` on. Returns where
// they end.
int64_t worker::look_at_span(int64_t h_kv, int64_t first, int64_t last, int64_t to) const {
    const int64_t begin = first*chunk_cells, end = std::min(last*chunk_cells, (int64_t) GGML_PAD(n_used, sketch_cells));
    for (int64_t c = begin; c < end; c += chunk_cells) {
        look_at_chunk(h_kv, c, (int) std::min(chunk_cells, end - c), own.t + c - begin);
    }
    for (int64_t chunk = first; chunk < last; ++chunk) {
        find_candidates(h_kv, chunk, own.t + chunk*chunk_cells - begin, to);
        to += GGML_PAD(all.n[chunk_of(h_kv, chunk)], sketch_cells);
    }
    return to;
}

// Cells of a chunk whose share of what has been seen of some head is large enough: that share can only fall.
void worker::find_candidates(int64_t h_kv, int64_t chunk, float * t, int64_t to) const {
    for (int64_t g = 0; g < a.group; ++g) {
        own.bound[g] = std::max(own.seen[g].value() + least_first - 1e-3f, -FLT_MAX);
    }
    const int64_t n = std::min(chunk_cells, (int64_t) GGML_PAD(n_used, sketch_cells) - chunk*chunk_cells);
    all.begin[chunk_of(h_kv, chunk)] = (int32_t) to;
    bool any = false;
    for (int64_t g = 0; g < a.group; ++g) {
        any = any || all.first[chunk_of(h_kv*a.group + g, chunk)].top >= own.bound[g];
    }
    if (!any) {
        all.n[chunk_of(h_kv, chunk)] = 0;
        return;
    }
    all.n[chunk_of(h_kv, chunk)] = (int32_t) f.filter({ own.order, t, ld_t, nullptr }, n, (int) a.group, own.bound, 0.0f,
            (int32_t) (chunk*chunk_cells), { cells_of(h_kv, chunk), logits_of(h_kv*a.group, chunk), a.ld, nullptr });
}

// the chunks first .. last of all KV heads'
void worker::look(int64_t first, int64_t last) const {
    mark_skipped(a, n_used, own.skipped);
    for (int64_t i = first; i < last; ) {
        const int64_t h_kv = i/n_chunks, end = std::min(last, (h_kv + 1)*n_chunks);
        project(a, h_kv, ops, own.q, own.products, of_group(h_kv));
        std::fill(own.seen, own.seen + a.group, log2_sum());
        int64_t to = i % n_chunks*chunk_cells; // what comes before may be of another thread
        for (const int64_t n = span_chunks(a); i < end; i = std::min(i + n, end)) {
            to = look_at_span(h_kv, i % n_chunks, std::min(i + n, end) - h_kv*n_chunks, to);
        }
    }
}

// ---- pass 2 ------------------------------------------------------------------------------------------------------------

// The candidates whose share, now known, is large enough, move to the front; the last of them fills up the last block. The records of
// the first are fetched: they are read when the next chunk has been here.
void worker::keep(int64_t h_kv, int64_t chunk) const {
    int32_t * cell = cells_of(h_kv, chunk), & n = all.n[chunk_of(h_kv, chunk)];
    float   * t    = logits_of(h_kv*a.group, chunk);
    if (a.second_look > 0.0f) { // else they are all cells
        n = (int32_t) f.filter({ cell, t, a.ld, nullptr }, n, (int) a.group, own.bound, 0.0f, 0, { cell, t, a.ld, nullptr });
    }
    for (int64_t i = n; i < GGML_PAD(n, sketch_cells); ++i) {
        cell[i] = cell[n - 1];
        for (int64_t g = 0; g < a.group; ++g) {
            t[g*a.ld + i] = -INFINITY;
        }
    }
    for (int64_t i = 0; i < std::min<int64_t>(n, ahead_cells); ++i) {
        prefetch_record(a.records_of(h_kv) + (int64_t) cell[i]*a.l.record_bytes, a.l.record_bytes);
    }
}

// Adds the codes of V of single cells, times their weights in the heads from g on and a sign, to rows of ld.
void worker::add_values(int64_t h_kv, const int32_t * cell, int64_t n, int64_t g, int n_heads, float sign, float * to, int64_t ld) const {
    for (int j = 0; j < a.l.n_v_groups; ++j) {
        f.cells[n_heads - 1](a.l, j, a.records_of(h_kv), cell, n, own.w + g*ld_w, ld_w, own.sums);
        for (int i = 0; i < n_heads; ++i) {
            for (int d = 0; d < sketch_cells; ++d) {
                to[i*ld + sketch_cells*j + d] += sign*own.sums[sketch_cells*i + d];
            }
        }
    }
}

void worker::look_again_at(int64_t h_kv, int64_t chunk) const {
    const int64_t n = GGML_PAD(all.n[chunk_of(h_kv, chunk)], sketch_cells);
    const int32_t * cell = cells_of(h_kv, chunk);
    float * t = logits_of(h_kv*a.group, chunk);
    for (int64_t g = 0; g < a.group; ++g) {
        const powers sum = n == 0 ? none : a.second_look > 0.0f ? f.powers(t + g*a.ld, n) : all.first[chunk_of(h_kv*a.group + g, chunk)];
        all.kept[chunk_of(h_kv*a.group + g, chunk)] = sum.sum > 0.0f ? sum.sum/own.first[g].sum*std::exp2(sum.top - own.first[g].top) : 0.0f;
        all.again[chunk_of(h_kv*a.group + g, chunk)] = none;
        std::fill_n(sums_of(h_kv*a.group + g, chunk), a.l.n_v, 0.0f);
    }
    for (int64_t g = 0; g < a.group && n > 0; g += max_heads) {
        const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
        if (a.l.first_planes < a.l.k_planes) {
            f.again[n_heads - 1](a.l, a.records_of(h_kv), cell, n, of_group(h_kv) + g, t + g*a.ld, a.ld);
        }
        for (int64_t h = h_kv*a.group + g, i = 0; i < n_heads; ++i) {
            all.again[chunk_of(h + i, chunk)] = f.weights(t + (g + i)*a.ld, n, own.w + (g + i)*ld_w);
        }
        add_values(h_kv, cell, all.n[chunk_of(h_kv, chunk)], g, n_heads, 1.0f, sums_of(h_kv*a.group + g, chunk), sums_of(1, 0) - sums_of(0, 0));
    }
}

void worker::look_again(int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ) {
        const int64_t h_kv = i/n_chunks, end = std::min(last, (h_kv + 1)*n_chunks);
        for (int64_t g = 0; g < a.group; ++g) {
            own.first[g] = sum_of(all.first, h_kv*a.group + g);
            own.bound[g] = std::max(own.first[g].value() + least_first, -FLT_MAX);
        }
        keep(h_kv, i % n_chunks);
        for (; i < end; ++i) {
            if (i + 1 < end) {
                keep(h_kv, (i + 1) % n_chunks);
            }
            look_again_at(h_kv, i % n_chunks);
        }
    }
}

// ---- pass 3 ------------------------------------------------------------------------------------------------------------

// The share by the first look of the cells that were not looked at again; 0 if it may be nothing but rounding errors, lest these outweigh
// cells that mattered less than the first look said.
float worker::unseen(int64_t h) const {
    float rest = 1.0f;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        rest -= all.kept[chunk_of(h, chunk)];
    }
    return rest > least_unseen ? rest : 0.0f;
}

// The sums of all chunks. Weights are relative to the top of `again`.
void worker::add_up(int64_t h_kv) const {
    std::fill(own.v, own.v + a.group*a.l.n_v, 0.0f);
    for (int64_t g = 0; g < a.group; ++g) {
        const int64_t h = h_kv*a.group + g;
        own.first[g]  = sum_of(all.first, h);
        own.again[g]  = sum_of(all.again, h);
        own.weight[g] = own.again[g].sum;
        own.others[g] = unseen(h)*own.first[g].sum;
        log2_sum sum = own.again[g];
        sum.add({ own.first[g].top, own.others[g] });
        own.lse[g] = std::max(sum.value(), -FLT_MAX); // lest a head without cells hide those of others
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
            const powers & x = all.again[chunk_of(h, chunk)];
            const float scale = x.sum > 0.0f ? std::exp2(x.top - own.again[g].top) : 0.0f;
            for (int j = 0; j < a.l.n_v && scale > 0.0f; ++j) {
                own.v[g*a.l.n_v + j] += scale*sums_of(h, chunk)[j];
            }
        }
    }
}

// The selected cells go to last.best, ascending, and their logits to last.chosen; returns how many.
int64_t worker::select(int64_t h_kv) const {
    const float least = a.least ? std::log2(a.least[h_kv]) : -FLT_MAX;
    int64_t n = 0;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        n += f.filter({ cells_of(h_kv, chunk), logits_of(h_kv*a.group, chunk), a.ld, nullptr }, all.n[chunk_of(h_kv, chunk)], (int) a.group, own.lse,
                      least, 0, { last.best + n, last.chosen + n, a.ld, last.z + n });
    }
    const choice candidates = { last.best, last.chosen, a.ld, a.group, last.z, last.key, own.lse };
    return candidates.keep_best(n, a.n_selected);
}

// What the n selected cells gave.
void worker::take_out(int64_t h_kv, int64_t n) const {
    const int64_t n_pad = GGML_PAD(n, max_vector);
    for (int64_t g = 0; g < a.group && n > 0; g += max_heads) {
        const int n_heads = (int) std::min<int64_t>(a.group - g, max_heads);
        for (int64_t i = g; i < g + n_heads; ++i) {
            float * t = last.chosen + i*a.ld;
            std::fill(t + n, t + n_pad, -INFINITY);
            own.weight[i] -= f.share(t, n_pad, std::max(own.again[i].top, -FLT_MAX), own.w + i*ld_w);
        }
        add_values(h_kv, last.best, n, g, n_heads, -1.0f, own.v + g*a.l.n_v, a.l.n_v);
    }
}

void worker::write(int64_t h) const {
    const int64_t g = h % a.group;
    const float top = std::max(own.again[g].top, own.first[g].top); // weights are relative to 2^top
    const float kept = std::max(own.weight[g], 0.0f);
    const float weight = kept > 0.0f ? kept*std::exp2(own.again[g].top - top) : 0.0f, others = own.others[g]*std::exp2(own.first[g].top - top);
    const float tail = weight + others > 0.0f ? top + std::log2(weight + others) : -INFINITY;
    if (!(tail - own.lse[g] > log2_no_tail)) {
        write_no_tail(a, h);
        return;
    }
    const float of_others = others/(weight + others), known = kept > 0.0f ? (1.0f - of_others*of_others)/kept : 0.0f;
    float * z = own.v + g*a.l.n_v;
    for (int j = 0; j < a.l.n_v; ++j) {
        z[j] = known*(z[j] - 0.5f*(float) a.l.v_mask(j)*kept);
    }
    write_tail(a, h, ops, z, tail);
}

void worker::finish(int64_t h_kv) const {
    add_up(h_kv);
    const int64_t n = select(h_kv);
    int32_t * selected = a.selected_of(h_kv), n_looked = 0;
    std::copy(last.best, last.best + n, selected);
    std::fill(selected + n, selected + a.n_selected, -1);
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        n_looked += all.n[chunk_of(h_kv, chunk)];
    }
    a.write_counts(h_kv, n, n_looked);
    take_out(h_kv, n);
    for (int64_t g = 0; g < a.group; ++g) {
        if (n == n_looked && own.others[g] == 0.0f) {
            own.weight[g] = 0.0f; // nothing is left, but for rounding errors
        }
    }
    for (int64_t h = h_kv*a.group; h < (h_kv + 1)*a.group; ++h) {
        write(h);
    }
}

} // namespace

static int64_t n_finishing(const task & a, int64_t n_threads) {
    return std::min(n_threads, a.n_head_kv);
}

} // namespace scan

void sketch_scan(const ggml_compute_params * params, ggml_tensor * dst) {
    using namespace scan;
    const task a(dst);
    const int64_t ith = params->ith, nth = params->nth;
    arena work(params->wdata);
    const shared_rows all(a, work);
    arena mine     = work.behind(ith*size_of<own_rows>(a));
    arena finishing = work.behind(nth*size_of<own_rows>(a) + std::min(ith, n_finishing(a, nth) - 1)*size_of<finish_rows>(a));
    const worker w(a, kernels_for(simd_for(params->use_ref)), all, own_rows(a, mine), finish_rows(a, finishing), params->use_ref);
    const int64_t n_items = a.n_head_kv*w.n_chunks, first = n_items*ith/nth, last = n_items*(ith + 1)/nth;

    w.look(first, last);
    ggml_barrier(params->threadpool);

    w.look_again(first, last);
    ggml_barrier(params->threadpool);

    for (int64_t h_kv = ith; h_kv < a.n_head_kv; h_kv += nth) {
        w.finish(h_kv);
    }
}

size_t sketch_scan_work_size(const ggml_tensor * dst, int n_threads) {
    using namespace scan;
    const task a(dst);
    return size_of<shared_rows>(a) + n_threads*size_of<own_rows>(a) + n_finishing(a, n_threads)*size_of<finish_rows>(a) + arena::line;
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    const int64_t record_bytes = sketch_record_bytes(format_of(dst)), n_cells = sketch_cells*dst->src[1]->ne[1];
    return sketch_layout::supported(dst) && dst->src[0]->ne[0] % max_vector == 0 && (dst->ne[0] - 1) % max_vector == 0
        && n_cells*record_bytes <= INT32_MAX; // kernels gather with 32 bits
}

} // namespace sfi
