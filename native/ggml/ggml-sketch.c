// Constructors of the sketch operations: the contract of ggml-sfi.h as asserts.

#include "ggml-sfi.h"

#include "ggml-impl.h"
#include "sfi-params.h"

static void assert_rows_of(const struct ggml_tensor * t, enum ggml_type type) {
    GGML_ASSERT(t->type == type);
    GGML_ASSERT(t->nb[0] == ggml_type_size(type));
}

int64_t ggml_sketch_cell_bytes(const struct ggml_sketch_format * f) {
    return 4*f->n_first + sketch_record_bytes(*f);
}

int64_t ggml_sketch_basis_size(const struct ggml_sketch_format * f, int64_t n_embd_k, int64_t n_embd_v) {
    return sketch_half_size(sketch_n_k(*f), n_embd_k) + sketch_half_size(sketch_n_v(*f), n_embd_v);
}

static void assert_format(const struct ggml_sketch_format * f) {
    GGML_ASSERT(f->n_k4 >= 0 && f->n_k4 % 4 == 0);
    GGML_ASSERT(f->n_k2 >= 0 && f->n_k2 % 4 == 0);
    GGML_ASSERT(f->n_k1 >= 0 && f->n_k1 % 4 == 0);
    GGML_ASSERT(f->n_v4 >= 0 && f->n_v4 % 16 == 0);
    GGML_ASSERT(f->n_v2 >= 0 && f->n_v2 % 16 == 0);
    GGML_ASSERT((4*f->n_k4 + 2*f->n_k2 + f->n_k1) % 32 == 0);
    GGML_ASSERT(f->n_first >= 1 && f->n_first <= sketch_k_planes(*f));
}

static void assert_sketch(const struct ggml_tensor * codes, const struct ggml_tensor * basis, const struct ggml_sketch_format * f) {
    assert_format(f);
    assert_rows_of(codes, GGML_TYPE_I8);
    assert_rows_of(basis, GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous(codes) && ggml_is_contiguous(basis));
    GGML_ASSERT(codes->ne[0] == sketch_cells*ggml_sketch_cell_bytes(f));
    GGML_ASSERT(codes->ne[2] == basis->ne[1] && codes->ne[3] == 1);
}

struct ggml_tensor * ggml_sketch_encode(
        struct ggml_context             * ctx,
        struct ggml_tensor              * codes,
        struct ggml_tensor              * basis,
        struct ggml_tensor              * k,
        struct ggml_tensor              * v,
        struct ggml_tensor              * cells,
        const struct ggml_sketch_format * format) {
    assert_sketch(codes, basis, format);
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type));
    GGML_ASSERT(k->ne[1] == v->ne[1] && k->ne[1] <= sketch_cells*codes->ne[1]);
    GGML_ASSERT(k->ne[2] == codes->ne[2] && v->ne[2] == codes->ne[2]);
    GGML_ASSERT(k->ne[3] == 1 && v->ne[3] == 1);
    GGML_ASSERT(basis->ne[0] == ggml_sketch_basis_size(format, k->ne[0], v->ne[0]));
    assert_rows_of(cells, GGML_TYPE_I32);

    struct ggml_tensor * result = ggml_view_tensor(ctx, codes);
    const struct sfi_encode_params params = { GGML_SFI_OP_SKETCH_ENCODE, *format };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = codes;
    result->src[1] = basis;
    result->src[2] = k;
    result->src[3] = v;
    result->src[4] = cells;

    return result;
}

struct ggml_tensor * ggml_sketch_scan(
        struct ggml_context             * ctx,
        struct ggml_tensor              * q,
        struct ggml_tensor              * codes,
        struct ggml_tensor              * basis,
        struct ggml_tensor              * skip,
        struct ggml_tensor              * plan,
        struct ggml_tensor              * least,
        struct ggml_tensor              * selected,
        struct ggml_tensor              * counts,
        int64_t                           n_list,
        int64_t                           n_embd_v,
        float                             scale,
        float                             logit_softcap,
        float                             second_look,
        const struct ggml_sketch_format * format) {
    assert_sketch(codes, basis, format);
    assert_rows_of(q, GGML_TYPE_F32);
    GGML_ASSERT(q->ne[1] % codes->ne[2] == 0 && q->ne[2] == 1 && q->ne[3] == 1);
    GGML_ASSERT(basis->ne[0] == ggml_sketch_basis_size(format, q->ne[0], n_embd_v));
    GGML_ASSERT(n_list > 0 && n_list <= sketch_cells*codes->ne[1]);
    GGML_ASSERT(logit_softcap >= 0.0f);
    assert_rows_of(skip, GGML_TYPE_I32);
    assert_rows_of(plan, GGML_TYPE_I32);
    assert_rows_of(selected, GGML_TYPE_I32);
    GGML_ASSERT(selected->ne[1] == codes->ne[2] && selected->ne[2] == 1 && selected->ne[3] == 1);
    if (least) {
        assert_rows_of(least, GGML_TYPE_F32);
        GGML_ASSERT(least->ne[0] == codes->ne[2]);
    }
    assert_rows_of(counts, GGML_TYPE_I32);
    GGML_ASSERT(counts->ne[0] == 2 && counts->ne[1] == codes->ne[2] && ggml_is_contiguous(counts));
    GGML_ASSERT(format->n_first == sketch_k_planes(*format) || logit_softcap == 0.0f);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd_v + 1, q->ne[1]);
    const struct sfi_scan_params params = { GGML_SFI_OP_SKETCH_SCAN, *format, (int32_t) n_list, scale, logit_softcap, second_look };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_SFI;
    result->src[0] = q;
    result->src[1] = codes;
    result->src[2] = basis;
    result->src[3] = skip;
    result->src[4] = plan;
    result->src[5] = least;
    result->src[6] = selected;
    result->src[7] = counts;

    return result;
}
