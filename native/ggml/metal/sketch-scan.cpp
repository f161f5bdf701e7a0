// GGML_OP_SKETCH_SCAN on Metal: the kernels are in sketch-scan.metal and sketch-looks.metal.

#include "host.h"
#include "sketch.h"

#include <cstdio>

namespace sfi_metal {

static int chunk_size(int64_t n_list) {
    return n_list <= 32*1024 ? scan_threads : max_chunk;
}

static scan_field field(const sfi::sketch_field & f) {
    return { (uint8_t) f.plane, (uint8_t) f.shift, (uint8_t) f.bits() };
}

static void set_fields(scan_args & a, const sfi::sketch_layout & layout) {
    for (int i = 0; i < a.n_k_fields && i < max_k_fields; ++i) {
        a.k[i] = field(layout.k[i]);
    }
    for (int i = 0; i < a.n_v_groups && i < max_v_groups; ++i) {
        for (int s = 0; s < 4; ++s) {
            a.v[i][s] = field(layout.v[i][s]);
        }
    }
}

static scan_args args_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1], * basis = dst->src[2], * skip = dst->src[3], * selected = dst->src[6];
    const sfi::sketch_layout layout(dst);
    scan_args a = {};
    a.q_nb1       = q->nb[1];
    a.head_bytes  = codes->nb[2];
    a.basis_size  = (int) basis->ne[0];
    a.n_skip      = (int) skip->ne[0];
    a.has_least   = dst->src[5] != nullptr;
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.n_selected  = (int) selected->ne[0];
    a.d_k         = (int) q->ne[0];
    a.d_v         = (int) dst->ne[0] - 1;
    a.n_k         = layout.n_k;
    a.n_v         = layout.n_v;
    a.n_list      = (int) sfi::sketch_n_list(dst);
    a.group       = (int) (q->ne[1]/codes->ne[2]);
    a.chunk       = chunk_size(a.n_list);
    a.n_chunks    = (int) n_chunks(a.n_list, a.chunk);
    a.block_bytes = (int) layout.block_bytes();
    a.record_bytes = layout.record_bytes;
    a.records_at   = codes->ne[1]*layout.block_bytes();
    a.k_planes    = layout.k_planes;
    a.first_planes = layout.first_planes;
    a.n_k_fields  = layout.n_k_fields;
    a.n_first_fields = layout.k_first[layout.first_planes];
    a.n_v_groups  = layout.n_v_groups;
    a.mean_cells  = sfi::sketch_mean_cells;
    a.scale       = float_param(dst, 0);
    a.softcap     = float_param(dst, 1);
    a.second_look = sfi::sketch_second_look(dst);
    set_fields(a, layout);
    return a;
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    if (!sfi::sketch_layout::supported(dst)) {
        return false;
    }
    const scan_args a = args_of(dst);
    return a.group <= max_group && a.n_k_fields <= max_k_fields && a.n_v_groups <= max_v_groups && a.n_chunks <= max_chunks
        && dst->src[1]->ne[2] <= 65535;
}

namespace {

struct scan_scratch {
    scratch_parts parts;
    place weights, factor, logits, stats, listed, n_listed;
    place total, keys, best, first, tails;     // one look
    place cells, n_again, again, values, sums; // two looks

    scan_scratch(const scan_args & a, int64_t n_head, int64_t n_head_kv) {
        weights  = parts.take(n_head*a.n_k_fields, 4*sizeof(float));
        factor   = parts.take(n_head, 3*sizeof(float));
        logits   = parts.take(n_head*a.n_list, sizeof(float));
        stats    = parts.take(n_head*a.n_chunks, 2*sizeof(float));
        listed   = parts.take(n_head_kv*a.n_list, 2*sizeof(uint32_t));
        n_listed = parts.take(n_head_kv, sizeof(uint32_t));
        if (a.record_bytes > 0) {
            values  = parts.take(n_head*a.n_chunks*a.n_v, sizeof(float)); // may be nothing, so other parts lie behind it
            cells   = parts.take(n_head_kv*a.n_list, sizeof(int32_t));
            n_again = parts.take(n_head_kv*a.n_chunks, sizeof(int32_t));
            again   = parts.take(n_head*a.n_chunks, 3*sizeof(float));
            sums    = parts.take(n_head, sizeof(head_sums));
        } else {
            total = parts.take(n_head, 2*sizeof(float));
            keys  = parts.take(n_head_kv*a.n_list, sizeof(uint32_t));
            best  = parts.take(n_head_kv, sizeof(uint64_t));
            first = parts.take(n_head_kv*a.n_chunks, sizeof(int32_t));
            tails = parts.take(n_head*a.n_chunks*(a.n_v + 1), sizeof(float));
        }
    }
};

// the size that kernels are made for
int group_kernel(const scan_args & a) { return a.group <= 1 ? 1 : a.group <= 2 ? 2 : a.group <= 4 ? 4 : max_group; }
int value_kernel(const scan_args & a) { return a.n_v_groups <= 2 ? 2 : max_v_groups; }

void first_look(encoder & e, const ggml_tensor * dst, const scan_args & a, const scan_scratch & s) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1];
    char kernel[64];
    snprintf(kernel, sizeof(kernel), "sfi_scan_logits_%d", group_kernel(a));
    e.run("sfi_scan_query", a, { whole(q), whole(dst->src[2]), s.weights, s.factor, s.n_listed }, { (int) q->ne[1] }, scan_threads);
    e.barrier();
    e.run(kernel, a, { whole(codes), whole(dst->src[3]), whole(dst->src[4]), s.weights, s.factor, s.logits, s.stats },
        { a.n_chunks, (int) codes->ne[2] }, scan_threads);
    e.barrier();
}

void choose_after_one_look(encoder & e, const ggml_tensor * dst, const scan_args & a, const scan_scratch & s) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1], * selected = dst->src[6];
    const int n_head_kv = (int) codes->ne[2];
    char kernel[64];
    snprintf(kernel, sizeof(kernel), "sfi_scan_tail_%d_%d", group_kernel(a), value_kernel(a));
    e.run("sfi_scan_keys", a, { whole_or(dst->src[5], q), s.logits, s.stats, s.total, s.keys, s.listed, s.n_listed },
        { a.n_chunks, n_head_kv }, scan_threads);
    e.barrier();
    e.run("sfi_scan_best", a, { s.listed, s.n_listed, s.best, s.first, whole(selected), whole(dst->src[7]) }, { n_head_kv }, best_threads);
    e.barrier();
    e.run(kernel, a, { whole(codes), s.logits, s.total, s.keys, s.best, s.first, whole(selected), s.tails }, { a.n_chunks, n_head_kv },
        scan_threads);
    e.barrier();
    e.run("sfi_scan_finish", a, { whole(dst->src[2]), s.tails, s.total, whole(dst) }, { (int) q->ne[1] }, scan_threads);
}

void look_again(encoder & e, const ggml_tensor * dst, const scan_args & a, const scan_scratch & s) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1], * counts = dst->src[7];
    const int n_head_kv = (int) codes->ne[2];
    char kernel[64];
    snprintf(kernel, sizeof(kernel), "sfi_scan_again_%d_%d", group_kernel(a), value_kernel(a));
    e.run(kernel, a, { whole(codes), whole(dst->src[4]), s.weights, s.factor, s.stats, s.logits, s.cells, s.n_again, s.again, s.values },
        { a.n_chunks, n_head_kv }, scan_threads);
    e.barrier();
    e.run("sfi_scan_choose", a, { whole_or(dst->src[5], q), s.logits, s.stats, s.n_again, s.again, s.cells, s.sums, s.listed,
        whole(dst->src[6]), whole(counts) }, { n_head_kv }, best_threads);
    e.barrier();
    e.run("sfi_scan_take_out", a, { whole(codes), whole(dst->src[2]), s.logits, s.cells, s.listed, whole(counts), s.sums, s.again,
        s.values, whole(dst) }, { (int) q->ne[1] }, scan_threads);
}

} // namespace

size_t sketch_scan_scratch(const ggml_tensor * dst) {
    return scan_scratch(args_of(dst), dst->src[0]->ne[1], dst->src[1]->ne[2]).parts.size();
}

void sketch_scan(encoder & e, const ggml_tensor * dst) {
    const scan_args a = args_of(dst);
    const scan_scratch s(a, dst->src[0]->ne[1], dst->src[1]->ne[2]);
    first_look(e, dst, a, s);
    (a.record_bytes > 0 ? look_again : choose_after_one_look)(e, dst, a, s);
}

} // namespace sfi_metal
