// GGML_OP_SUPPORT_EVIDENCE, GGML_OP_SUPPORT_SELECT and GGML_OP_SUPPORT_STABILITY on Metal: the kernels are in support.metal.

#include "host.h"

#include <cstdio>

namespace sfi_metal {

// ---- evidence ----------------------------------------------------------------------------------------------------------

bool support_evidence_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    return kv_type_name(k->type) && k->ne[0] % 16 == 0 && k->ne[0] % ggml_blck_size(k->type) == 0 && k->ne[0] <= 256
        && has_aligned_rows(k) && q->nb[1] % 16 == 0 && q->nb[2] % 16 == 0 && q->view_offs % 16 == 0 && evidence_rows(dst) <= max_rows
        && k->ne[2] <= 65535;
}

namespace {

struct evidence_scratch {
    scratch_parts parts;
    place partials, lse;

    explicit evidence_scratch(const ggml_tensor * dst) {
        const int64_t n = dst->ne[1]*evidence_rows(dst);
        partials = parts.take(2*n*n_chunks(dst->ne[0], chunk_cells), sizeof(float));
        lse      = parts.take(n, sizeof(float));
    }
};

} // namespace

size_t support_evidence_scratch(const ggml_tensor * dst) {
    return evidence_scratch(dst).parts.size();
}

static evidence_args args_of_evidence(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    evidence_args a = {};
    a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2];
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.d         = (int) k->ne[0];
    a.n_cells   = (int) k->ne[1];
    a.group     = (int) (q->ne[1]/k->ne[2]);
    a.n_queries = (int) q->ne[2];
    a.n_rows    = (int) evidence_rows(dst);
    a.n_list    = (int) dst->ne[0];
    a.n_chunks  = (int) n_chunks(a.n_list, chunk_cells);
    a.scale     = float_param(dst, 0);
    a.softcap   = float_param(dst, 1);
    a.alpha     = float_param(dst, 2);
    a.candidates_only = dst->op_params[3] == GGML_SUPPORT_SOFTMAX_CANDIDATES;
    return a;
}

void support_evidence(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * cells = dst->src[2], * plan = dst->src[3];
    const evidence_scratch s(dst);
    const evidence_args a = args_of_evidence(dst);
    const int n_head_kv = (int) dst->ne[1];
    const auto pass = [&](const char * what) {
        char kernel[64];
        snprintf(kernel, sizeof(kernel), "sfi_evidence_%s_%d_%s", kv_type_name(k->type), a.d <= 128 ? 128 : 256, what);
        e.run(kernel, a, { whole(q), whole(k), whole(cells), whole(plan), s.partials, s.lse, whole(dst) },
            { a.n_chunks, n_head_kv }, evidence_threads);
    };
    pass("stats");
    e.barrier();
    e.run("sfi_evidence_lse", a, { s.partials, s.lse }, { (int) n_chunks(a.n_rows, lse_threads), n_head_kv }, lse_threads);
    e.barrier();
    pass("shares");
}

// ---- selection ---------------------------------------------------------------------------------------------------------

bool support_select_supported(const ggml_tensor * dst) {
    return selector_of(dst).kind == GGML_SUPPORT_SELECTOR_TOPK && dst->ne[1] <= 65535;
}

namespace {

struct select_scratch {
    scratch_parts parts;
    place keys;

    explicit select_scratch(const ggml_tensor * dst) {
        keys = parts.take(dst->src[0]->ne[0]*dst->ne[1], sizeof(uint32_t));
    }
};

} // namespace

size_t support_select_scratch(const ggml_tensor * dst) {
    return select_scratch(dst).parts.size();
}

static select_args args_of_select(const ggml_tensor * dst) {
    const ggml_support_selector selector = selector_of(dst);
    select_args a = {};
    a.evidence_ld = dst->src[0]->nb[1]/sizeof(float);
    a.out_ld      = dst->nb[1]/sizeof(int32_t);
    a.n_list      = (int) dst->src[0]->ne[0];
    a.n_selected  = (int) dst->ne[0];
    a.behind      = selector.pool_after;
    a.ahead       = selector.pool_before;
    return a;
}

void support_select(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * cells = dst->src[1], * plan = dst->src[2];
    const select_scratch s(dst);
    const int n_head_kv = (int) dst->ne[1];
    const select_args a = args_of_select(dst);
    e.run("sfi_select_keys", a, { whole(evidence), whole(cells), whole(plan), s.keys },
        { (int) n_chunks(a.n_list, list_threads), n_head_kv }, list_threads);
    e.barrier();
    e.run("sfi_select", a, { s.keys, whole(cells), whole(dst) }, { n_head_kv }, select_threads);
}

// ---- stability ---------------------------------------------------------------------------------------------------------

bool support_stability_supported(const ggml_tensor *) {
    return true;
}

size_t support_stability_scratch(const ggml_tensor *) {
    return 0;
}

void support_stability(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    stability_args a = {};
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.previous_ld = previous->nb[1]/sizeof(int32_t);
    a.n_list      = (int) evidence->ne[0];
    a.n_selected  = (int) selected->ne[0];
    a.n_previous  = (int) previous->ne[0];
    e.run("sfi_stability", a,
        { whole(evidence), whole(dst->src[1]), whole(dst->src[2]), whole(selected), whole(previous), whole(dst) },
        { (int) dst->ne[1] }, select_threads);
}

} // namespace sfi_metal
