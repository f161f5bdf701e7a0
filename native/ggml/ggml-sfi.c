// Constructors of the sfi operations: the contract of ggml-sfi.h as asserts.

#include "ggml-sfi.h"

#include "ggml-impl.h"
#include "sfi-params.h"

enum ggml_sfi_op ggml_get_sfi_op(const struct ggml_tensor * node) {
    GGML_ASSERT(node->op == GGML_OP_SFI);
    return (enum ggml_sfi_op) ggml_get_op_params_i32(node, 0);
}

const char * ggml_sfi_op_desc(const struct ggml_tensor * node) {
    static const char * names[] = {
        "SPARSE_ATTN", "SUPPORT_EVIDENCE", "SUPPORT_SELECT", "SUPPORT_STABILITY", "SKETCH_ENCODE", "SKETCH_SCAN",
        "BLOCK_MUL_MAT", "FEW_MUL_MAT",
    };
    return node->op == GGML_OP_SFI ? names[ggml_get_sfi_op(node)] : ggml_op_desc(node);
}

static bool is_sparse_attn(const struct ggml_tensor * node) {
    return node->op == GGML_OP_SFI && ggml_get_sfi_op(node) == GGML_SFI_OP_SPARSE_ATTN;
}

static bool has_rows(const struct ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type);
}

static void assert_cells(const struct ggml_tensor * t) {
    GGML_ASSERT(t->type == GGML_TYPE_I32);
    GGML_ASSERT(has_rows(t));
}

struct ggml_tensor * ggml_sparse_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * always,
        struct ggml_tensor  * selected,
        struct ggml_tensor  * tail,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 logit_softcap) {
    const int64_t n_tokens  = q->ne[1];
    const int64_t n_head    = q->ne[2];
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_stream  = q->ne[3];

    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(has_rows(q) && has_rows(k) && has_rows(v));
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1]);
    GGML_ASSERT(k->ne[2] == v->ne[2]);
    GGML_ASSERT(k->ne[3] == n_stream && v->ne[3] == n_stream);
    GGML_ASSERT(n_head % n_head_kv == 0);
    GGML_ASSERT(logit_softcap >= 0.0f);

    if (always) {
        assert_cells(always);
        GGML_ASSERT(always->ne[1] == n_tokens || always->ne[1] == 1);
        GGML_ASSERT(always->ne[2] == 1);
        GGML_ASSERT(always->ne[3] == n_stream);
    }
    if (selected) {
        assert_cells(selected);
        GGML_ASSERT(selected->ne[1] == n_head_kv);
        GGML_ASSERT(selected->ne[2] == n_tokens || selected->ne[2] == 1);
        GGML_ASSERT(selected->ne[3] == n_stream);
    }
    if (tail) {
        GGML_ASSERT(tail->type == GGML_TYPE_F32 && has_rows(tail));
        GGML_ASSERT(tail->ne[0] == v->ne[0] + 1);
        GGML_ASSERT(tail->ne[1] == n_head);
        GGML_ASSERT(tail->ne[2] == n_tokens);
        GGML_ASSERT(tail->ne[3] == n_stream);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && has_rows(sinks));
        GGML_ASSERT(sinks->ne[0] == n_head);
    }

    // permuted, like flash attention: heads before tokens
    const int64_t ne[4] = { v->ne[0], n_head, n_tokens, n_stream };
    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne);

    const struct sfi_attn_params params = { GGML_SFI_OP_SPARSE_ATTN, scale, logit_softcap, 0, 0.0f };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = always;
    result->src[4] = selected;
    result->src[5] = tail;
    result->src[6] = sinks;

    return result;
}

void ggml_sparse_attn_set_visible(
        struct ggml_tensor * attn,
        struct ggml_tensor * visible) {
    const struct ggml_tensor * q = attn->src[0], * always = attn->src[3];

    GGML_ASSERT(is_sparse_attn(attn));
    GGML_ASSERT(always && always->ne[1] == 1 && !attn->src[4]);
    assert_cells(visible);
    GGML_ASSERT(visible->ne[0] == q->ne[1]);
    GGML_ASSERT(visible->ne[1] == q->ne[3] && ggml_nrows(visible) == q->ne[3]);

    attn->src[7] = visible; // the place of mass, which is for one token
}

void ggml_sparse_attn_set_blocks(struct ggml_tensor * attn) {
    GGML_ASSERT(is_sparse_attn(attn));
    GGML_ASSERT(attn->src[7] && attn->src[7]->type == GGML_TYPE_I32 && !attn->src[5]);

    ggml_set_op_params_i32(attn, offsetof(struct sfi_attn_params, in_blocks)/sizeof(int32_t), 1);
}

bool ggml_sparse_attn_in_blocks(const struct ggml_tensor * node) {
    return is_sparse_attn(node) && ggml_get_op_params_i32(node, offsetof(struct sfi_attn_params, in_blocks)/sizeof(int32_t)) != 0;
}

void ggml_sparse_attn_skip_tiles(struct ggml_tensor * attn, float least) {
    GGML_ASSERT(ggml_sparse_attn_in_blocks(attn));
    GGML_ASSERT(least >= 0.0f);

    ggml_set_op_params_f32(attn, offsetof(struct sfi_attn_params, least)/sizeof(int32_t), least);
}

void ggml_sparse_attn_set_mass(struct ggml_tensor * result, struct ggml_tensor * mass) {
    GGML_ASSERT(is_sparse_attn(result));
    GGML_ASSERT(mass->type == GGML_TYPE_F32 && has_rows(mass));
    GGML_ASSERT(mass->ne[0] == 2 && mass->ne[1] == result->ne[1]);
    GGML_ASSERT(result->ne[2] == 1 && result->ne[3] == 1);

    result->src[7] = mass;
}

struct ggml_tensor * ggml_support_evidence(
        struct ggml_context     * ctx,
        struct ggml_tensor      * q,
        struct ggml_tensor      * k,
        struct ggml_tensor      * cells,
        struct ggml_tensor      * plan,
        float                     scale,
        float                     logit_softcap,
        float                     alpha,
        enum ggml_support_softmax over) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(has_rows(q) && has_rows(k));
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[1] % k->ne[2] == 0);
    GGML_ASSERT(q->ne[2] >= 1 && q->ne[2] <= 64);
    GGML_ASSERT(q->ne[3] == 1 && k->ne[3] == 1);
    assert_cells(cells);
    assert_cells(plan);
    GGML_ASSERT(plan->ne[0] == 2 + q->ne[2]);
    GGML_ASSERT(logit_softcap >= 0.0f && alpha > 0.0f);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cells->ne[0], k->ne[2]);

    const struct sfi_evidence_params params = { GGML_SFI_OP_SUPPORT_EVIDENCE, scale, logit_softcap, alpha, over };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = cells;
    result->src[3] = plan;

    return result;
}

struct ggml_tensor * ggml_sparse_attn_evidence(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * plan,
        float                 scale,
        float                 logit_softcap) {
    GGML_ASSERT(q->ne[1] == 1 && q->ne[3] == 1);
    assert_cells(plan);
    GGML_ASSERT(plan->ne[0] >= 2);

    struct ggml_tensor * result = ggml_sparse_attn(ctx, q, k, v, cells, NULL, NULL, sinks, scale, logit_softcap);

    const int64_t ne[4] = { ggml_nelements(result) + cells->ne[0]*k->ne[2], 1, 1, 1 };
    struct ggml_tensor * both = ggml_new_tensor(ctx, GGML_TYPE_F32, 1, ne);
    memcpy(both->op_params, result->op_params, sizeof(both->op_params));
    memcpy(both->src, result->src, sizeof(both->src));
    both->op     = result->op;
    both->src[8] = plan;

    return both;
}

bool ggml_sparse_attn_has_evidence(const struct ggml_tensor * node) {
    return is_sparse_attn(node) && node->src[8] != NULL;
}

static void assert_evidence(
        const struct ggml_tensor * evidence,
        const struct ggml_tensor * cells,
        const struct ggml_tensor * plan) {
    GGML_ASSERT(evidence->type == GGML_TYPE_F32 && has_rows(evidence));
    assert_cells(cells);
    assert_cells(plan);
    GGML_ASSERT(evidence->ne[0] == cells->ne[0]);
    GGML_ASSERT(plan->ne[0] >= 2);
}

struct ggml_tensor * ggml_support_select(
        struct ggml_context                * ctx,
        struct ggml_tensor                 * evidence,
        struct ggml_tensor                 * cells,
        struct ggml_tensor                 * plan,
        struct ggml_tensor                 * k,
        int32_t                              n_selected,
        const struct ggml_support_selector * selector) {
    assert_evidence(evidence, cells, plan);
    GGML_ASSERT(n_selected >= 1);
    GGML_ASSERT(selector->pool_after >= 0 && selector->pool_before >= 0 && selector->nms_radius >= 0);

    const bool paper = selector->kind == GGML_SUPPORT_SELECTOR_PAPER;
    GGML_ASSERT(paper == (k != NULL));
    if (paper) {
        GGML_ASSERT(has_rows(k));
        GGML_ASSERT(k->ne[2] == evidence->ne[1]);
        GGML_ASSERT(selector->alpha > 0.0f && selector->temperature > 0.0f);
    }

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_selected, evidence->ne[1]);

    const struct sfi_select_params params = { GGML_SFI_OP_SUPPORT_SELECT, *selector };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = evidence;
    result->src[1] = cells;
    result->src[2] = plan;
    result->src[3] = k;

    return result;
}

struct ggml_tensor * ggml_support_stability(
        struct ggml_context * ctx,
        struct ggml_tensor  * evidence,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * selected,
        struct ggml_tensor  * previous) {
    assert_evidence(evidence, cells, plan);
    assert_cells(selected);
    assert_cells(previous);
    GGML_ASSERT(selected->ne[1] == evidence->ne[1]);
    GGML_ASSERT(previous->ne[0] == selected->ne[0] && previous->ne[1] == evidence->ne[1]);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 4, evidence->ne[1]);

    const struct sfi_stability_params params = { GGML_SFI_OP_SUPPORT_STABILITY };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = evidence;
    result->src[1] = cells;
    result->src[2] = plan;
    result->src[3] = selected;
    result->src[4] = previous;

    return result;
}

static bool can_mul_mat(const struct ggml_tensor * w, const struct ggml_tensor * x) {
    return x->type == GGML_TYPE_F32 && ggml_is_matrix(w) && ggml_is_matrix(x) && has_rows(w) && has_rows(x) && x->ne[0] == w->ne[0];
}

static struct ggml_tensor * new_mul_mat(struct ggml_context * ctx, enum ggml_sfi_op op, struct ggml_tensor * w, struct ggml_tensor * x) {
    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w->ne[1], x->ne[1]);

    const struct sfi_mul_mat_params params = { op };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = w;
    result->src[1] = x;

    return result;
}

bool ggml_can_block_mul_mat(const struct ggml_tensor * w, const struct ggml_tensor * x) {
    switch (w->type) {
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K: break;
        default: return false;
    }
    return can_mul_mat(w, x) && w->ne[1] % 32 == 0;
}

struct ggml_tensor * ggml_block_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * w,
        struct ggml_tensor  * x) {
    GGML_ASSERT(ggml_can_block_mul_mat(w, x));
    return new_mul_mat(ctx, GGML_SFI_OP_BLOCK_MUL_MAT, w, x);
}

bool ggml_can_few_mul_mat(const struct ggml_tensor * w, const struct ggml_tensor * x) {
    switch (w->type) {
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q4_1: case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_0: case GGML_TYPE_Q5_1: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K: case GGML_TYPE_Q8_0: break;
        default: return false;
    }
    return can_mul_mat(w, x);
}

struct ggml_tensor * ggml_few_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * w,
        struct ggml_tensor  * x) {
    GGML_ASSERT(ggml_can_few_mul_mat(w, x));
    return new_mul_mat(ctx, GGML_SFI_OP_FEW_MUL_MAT, w, x);
}
