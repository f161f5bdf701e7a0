// SKETCH_SCAN on Metal: the kernels are in sketch-scan.metal.

#include "host.h"

namespace sfi_metal {

static int chunk_of(const ggml_tensor * dst) {
    return scan_list(dst) <= 32*1024 ? scan_threads : max_chunk;
}

bool sketch_scan_supported(const ggml_tensor * dst) {
    return scan_supported(dst, chunk_of(dst));
}

namespace {

struct scan_places {
    scratch_parts parts;
    place weights, factor, logits, stats, listed, cells, n_again, again, kept, values, sums;

    explicit scan_places(const scan_args & a) {
        const int64_t n_head = a.n_head, n_head_kv = a.n_head/a.group;
        weights = parts.take(n_head*a.n_k_fields, 4*sizeof(float));
        factor  = parts.take(n_head, 3*sizeof(float));
        logits  = parts.take(n_head*a.n_list, sizeof(float));
        stats   = parts.take(n_head*a.n_chunks, 2*sizeof(float));
        listed  = parts.take(n_head_kv*a.n_list, 2*sizeof(uint32_t));
        values  = parts.take(n_head*a.n_chunks*a.n_v, sizeof(float)); // may be nothing, so other parts lie behind it
        cells   = parts.take(n_head_kv*a.n_list, sizeof(int32_t));
        n_again = parts.take(n_head_kv*a.n_chunks, sizeof(int32_t));
        again   = parts.take(n_head*a.n_chunks, 2*sizeof(float));
        kept    = parts.take(n_head*a.n_chunks, sizeof(float));
        sums    = parts.take(n_head, sizeof(head_sums));
    }
};

} // namespace

size_t sketch_scan_scratch(const ggml_tensor * dst, int) {
    return scan_places(scan_args_of(dst, chunk_of(dst))).parts.size();
}

void sketch_scan(encoder & e, const ggml_tensor * dst) {
    const place q = whole(dst->src[0]), codes = whole(dst->src[1]), basis = whole(dst->src[2]), skip = whole(dst->src[3]), plan = whole(dst->src[4]);
    const place least = whole_or(dst->src[5], dst->src[0]), selected = whole(dst->src[6]), counts = whole(dst->src[7]);
    const scan_args a = scan_args_of(dst, chunk_of(dst));
    const scan_places s(a);
    const int n_head_kv = a.n_head/a.group;
    // the sizes that kernels are made for
    const int group = a.group <= 1 ? 1 : a.group <= 2 ? 2 : a.group <= 4 ? 4 : max_group, values = a.n_v <= 32 ? 2 : max_v_groups;

    e.run("sfi_scan_query", a, { q, basis, s.weights, s.factor }, { a.n_head }, scan_threads);
    e.barrier();
    e.run(name_of("sfi_scan_logits_%d", group), a, { codes, skip, plan, s.weights, s.factor, s.logits, s.stats },
        { a.n_chunks, n_head_kv }, scan_threads);
    e.barrier();
    e.run(name_of("sfi_scan_again_%d_%d", group, values), a,
        { codes, plan, s.weights, s.factor, s.stats, s.logits, s.cells, s.n_again, s.again, s.kept, s.values },
        { a.n_chunks, n_head_kv }, scan_threads);
    e.barrier();
    e.run("sfi_scan_choose", a, { least, s.logits, s.stats, s.n_again, s.again, s.kept, s.cells, s.sums, s.listed, selected, counts },
        { n_head_kv }, best_threads);
    e.barrier();
    e.run("sfi_scan_take_out", a, { codes, basis, s.logits, s.cells, s.listed, counts, s.sums, s.again, s.values, whole(dst) },
        { a.n_head }, scan_threads);
}

} // namespace sfi_metal
