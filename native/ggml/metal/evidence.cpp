// SUPPORT_EVIDENCE on Metal: the kernels are in evidence.metal.

#include "host.h"

namespace sfi_metal {

bool evidence_supported(const ggml_tensor * dst) {
    return evidence_supported_by_both(dst);
}

namespace {

struct evidence_places {
    scratch_parts parts;
    place partials, lse;

    explicit evidence_places(const ggml_tensor * dst) {
        const int64_t n = dst->ne[1]*evidence_rows(dst);
        partials = parts.take(2*n*n_chunks(dst->ne[0], chunk_cells), sizeof(float));
        lse      = parts.take(n, sizeof(float));
    }
};

} // namespace

size_t evidence_scratch(const ggml_tensor * dst, int) {
    return evidence_places(dst).parts.size();
}

void evidence(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * cells = dst->src[2], * plan = dst->src[3];
    const evidence_places s(dst);
    const evidence_args a = evidence_args_of(dst, chunk_cells);
    const int n_head_kv = (int) dst->ne[1];
    const auto pass = [&](const char * what) {
        e.run(name_of("sfi_evidence_%s_%d_%s", kv_type_name(k->type), a.d <= 128 ? 128 : 256, what), a,
            { whole(q), whole(k), whole(cells), whole(plan), s.partials, s.lse, whole(dst) }, { a.n_chunks, n_head_kv }, evidence_threads);
    };
    pass("stats");
    e.barrier();
    e.run("sfi_evidence_lse", a, { s.partials, s.lse }, { (int) n_chunks(a.n_rows, lse_threads), n_head_kv }, lse_threads);
    e.barrier();
    pass("shares");
}

} // namespace sfi_metal
