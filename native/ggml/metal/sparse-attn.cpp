// SPARSE_ATTN on Metal: the kernels are in sparse-attn.metal.

#include "host.h"

namespace sfi_metal {

// No API tells how many cores a GPU has: 8 to 80. This many threadgroups give even the large ones a few for each.
static constexpr int wanted_groups = 192;

// query heads that share the loads of a threadgroup
static int group_part(int64_t group) {
    return group <= 1 ? 1 : group <= 2 ? 2 : 4;
}

// So many that the GPU is full, but none with less than a stride of rows for each of its simdgroups. Tokens that see different
// lengths of one list are split as each alone, so that they give the same bits.
static int n_splits(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    const int64_t group  = q->ne[2]/k->ne[2];
    const int64_t blocks = k->ne[2]*n_chunks(group, group_part(group))*(visible_of(dst) ? 1 : q->ne[1])*q->ne[3];
    const int64_t stride = attn_simds*attn_flight*(k->ne[0] <= 64 ? 4 : k->ne[0] <= 128 ? 2 : 1);
    const int64_t useful = n_chunks(length(dst->src[3]) + length(dst->src[4]), stride);
    return (int) std::clamp<int64_t>(std::min(n_chunks(wanted_groups, blocks), useful), 1, max_splits);
}

bool sparse_attn_supported(const ggml_tensor * dst) {
    return attn_supported(dst);
}

namespace {

struct attn_scratch {
    scratch_parts parts;
    place partials, logits, cells_lse;

    explicit attn_scratch(const ggml_tensor * dst) {
        const ggml_tensor * q = dst->src[0];
        const int64_t n_evidence = ggml_sparse_attn_has_evidence(dst) ? q->ne[2] : 0;
        partials  = parts.take(q->ne[1]*q->ne[2]*q->ne[3]*n_splits(dst)*(dst->src[2]->ne[0] + 2), sizeof(float));
        logits    = parts.take(n_evidence*length(dst->src[3]), sizeof(float));
        cells_lse = parts.take(n_evidence, sizeof(float));
    }
};

} // namespace

size_t sparse_attn_scratch(const ggml_tensor * dst, int) {
    return attn_scratch(dst).parts.size();
}

static void encode_own_evidence(encoder & e, const ggml_tensor * dst, const attn_args & a, const attn_scratch & s) {
    const ggml_tensor * cells = dst->src[3], * plan = dst->src[8];
    const own_evidence_args own = { a.n_always, a.group };
    e.run("sfi_own_evidence", own,
        { s.logits, s.cells_lse, whole(cells), whole(plan), { dst, (size_t) a.head_size*a.n_head*sizeof(float) } },
        { (int) n_chunks(a.n_always, list_threads), a.n_head/a.group }, list_threads);
}

void sparse_attn(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    const attn_scratch s(dst);
    const int n_stream = (int) q->ne[3];
    attn_args a = attn_args_of(dst);
    a.n_group_parts = (int) n_chunks(a.group, group_part(a.group));
    a.n_split       = n_splits(dst);

    e.run(name_of("sfi_sparse_attn_%s_%d_%d", kv_type_name(k->type), a.head_size, group_part(a.group)), a,
        { whole(q), whole(k), whole(v), whole_or(dst->src[3], q), whole_or(dst->src[4], q), whole_or(visible_of(dst), q), s.partials,
          a.has_evidence ? s.logits : s.partials },
        { a.n_split, (int) k->ne[2]*a.n_group_parts, a.n_tokens*n_stream }, attn_threads);
    e.barrier();
    e.run("sfi_sparse_attn_merge", a,
        { s.partials, whole_or(dst->src[5], q), whole_or(dst->src[6], q), whole(dst), whole_or(mass_of(dst), dst),
          a.has_evidence ? s.cells_lse : s.partials },
        { a.n_head, a.n_tokens, n_stream }, attn_threads);
    if (a.has_evidence) {
        e.barrier();
        encode_own_evidence(e, dst, a, s);
    }
}

} // namespace sfi_metal
