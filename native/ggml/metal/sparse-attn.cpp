// GGML_OP_SPARSE_ATTN on Metal: the kernels are in sparse-attn.metal.

#include "host.h"

#include <algorithm>
#include <cstdio>

namespace sfi_metal {

// No API tells how many cores a GPU has: 8 to 80. This many threadgroups give even the large ones a few for each.
static constexpr int wanted_groups = 192;

// query heads that share the loads of a threadgroup
static int group_part(int64_t group) {
    return group <= 1 ? 1 : group <= 2 ? 2 : 4;
}

static bool is_head_size(int64_t n) {
    return n == 64 || n == 80 || n == 96 || n == 128 || n == 256;
}

static int64_t length(const ggml_tensor * list) {
    return list ? list->ne[0] : 0;
}

static const ggml_tensor * visible_of(const ggml_tensor * dst) {
    return dst->src[7] && dst->src[7]->type == GGML_TYPE_I32 ? dst->src[7] : nullptr;
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
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    return k->type == v->type && kv_type_name(k->type) && k->ne[0] == v->ne[0] && is_head_size(k->ne[0])
        && k->ne[0] % ggml_blck_size(k->type) == 0 && has_aligned_rows(k) && has_aligned_rows(v)
        && q->nb[1] % 16 == 0 && q->nb[2] % 16 == 0 && q->nb[3] % 16 == 0 && q->view_offs % 16 == 0 && q->ne[1]*q->ne[3] <= 65535;
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

size_t sparse_attn_scratch(const ggml_tensor * dst) {
    return attn_scratch(dst).parts.size();
}

static const ggml_tensor * mass_of(const ggml_tensor * dst) {
    return dst->src[7] && dst->src[7]->type == GGML_TYPE_F32 ? dst->src[7] : nullptr;
}

static void set_lists(attn_args & a, const ggml_tensor * dst) {
    if (const ggml_tensor * always = dst->src[3]) {
        a.always_t = always->ne[1] == 1 ? 0 : always->nb[1]/sizeof(int32_t);
        a.always_s = always->nb[3]/sizeof(int32_t);
        a.n_always = (int) always->ne[0];
    }
    if (const ggml_tensor * selected = dst->src[4]) {
        a.selected_h = selected->nb[1]/sizeof(int32_t);
        a.selected_t = selected->ne[2] == 1 ? 0 : selected->nb[2]/sizeof(int32_t);
        a.selected_s = selected->nb[3]/sizeof(int32_t);
        a.n_selected = (int) selected->ne[0];
    }
    if (const ggml_tensor * tail = dst->src[5]) {
        a.tail_h = tail->nb[1]/sizeof(float);
        a.tail_t = tail->nb[2]/sizeof(float);
        a.tail_s = tail->nb[3]/sizeof(float);
    }
    if (const ggml_tensor * visible = visible_of(dst)) {
        a.visible_s = visible->nb[1]/sizeof(int32_t);
    }
    a.has_tail     = dst->src[5] != nullptr;
    a.has_sinks    = dst->src[6] != nullptr;
    a.has_visible  = visible_of(dst) != nullptr;
    a.has_mass     = mass_of(dst) != nullptr;
    a.has_evidence = ggml_sparse_attn_has_evidence(dst);
}

static attn_args args_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    attn_args a = {};
    a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2]; a.q_nb3 = q->nb[3];
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2]; a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2]; a.v_nb3 = v->nb[3];
    a.n_cells       = (int) k->ne[1];
    a.n_tokens      = (int) q->ne[1];
    a.n_head        = (int) q->ne[2];
    a.head_size     = (int) k->ne[0];
    a.group         = (int) (q->ne[2]/k->ne[2]);
    a.n_group_parts = (int) n_chunks(a.group, group_part(a.group));
    a.n_split       = n_splits(dst);
    a.scale         = float_param(dst, 0);
    a.softcap       = float_param(dst, 1);
    set_lists(a, dst);
    return a;
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
    const attn_args a = args_of(dst);
    const int n_stream = (int) q->ne[3];

    char kernel[64];
    snprintf(kernel, sizeof(kernel), "sfi_sparse_attn_%s_%d_%d", kv_type_name(k->type), a.head_size, group_part(a.group));
    e.run(kernel, a,
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
