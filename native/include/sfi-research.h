/*
 * sfi-research.h: what an experiment with slow-fast decoding needs beside sfi.h: policies to compare with, the constants of the
 * selectors, the format of the sketch, and a look inside. It may change with any version.
 *
 *     struct sfi_research research = { .struct_size = sizeof(research) };
 *     struct sfi_params params = { .struct_size = sizeof(params) };
 *     sfi_default_params(&params, SFI_POLICY_FROZEN);
 *     sfi_default_research(&research);
 *     research.selector = SFI_SELECTOR_PAPER;
 *     params.research = &research;
 */
#ifndef SFI_RESEARCH_H
#define SFI_RESEARCH_H

#include "sfi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Two more values for struct sfi_params::policy. */
enum sfi_research_policy {
    SFI_POLICY_WINDOW = 1, /* n_sink + the latest n_recent cells only: the baseline that every selector must beat */
    SFI_POLICY_ORACLE = 3, /* chosen at every step by exact attention: no faster than dense, for measuring */
};

enum sfi_selector {
    SFI_SELECTOR_TOPK  = 0, /* top-K of the pooled evidence of the last queries */
    SFI_SELECTOR_PAPER = 1, /* the selector of arXiv 2603.12038, evidence of the slow step's query alone: on the CPU */
};

struct sfi_research {
    size_t struct_size;

    /* policy frozen, window */
    enum sfi_selector selector;
    int32_t min_span;    /* fast steps before a boundary may make a step slow */
    int32_t n_queries;   /* evidence of the last n queries, 1 .. 64; of a slow step, its own */
    int32_t pool_after;  /* an important cell also brings the cells after it ... */
    int32_t pool_before; /* ... and before it */

    /* Policy sketch: components of K with 4, 2 and 1 bits, of V with 4 and 2 bits, see struct ggml_sketch_format. No components of
     * K: by the head size. No components of V where those of K are given: the cells that are not selected are dropped.
     * sketch_first: each step reads so many 4 bytes of K of every cell, and the rest of those cells alone that have at least
     * second_look times the mean share of the attention by that; 0: everything of every cell. */
    int32_t sketch_k4, sketch_k2, sketch_k1, sketch_v4, sketch_v2, sketch_first;
    float   second_look;

    /* SFI_SELECTOR_PAPER, see method in arXiv 2603.12038 */
    float   alpha, gamma, beta, p, eta, lambda_clip, a_soft, a_cross, temperature;
    int32_t nms_radius;

    /* SFI_PREFILL_SPARSE: cells are passed over where each query of a block gives them less than this share of its attention */
    float   prefill_least;
};

/* struct_size must be set. */
SFI_API int sfi_default_research(struct sfi_research * research);

/* ---- devices ------------------------------------------------------------------------------------------------------- */

/* Whose operations make the support of a layer. */
enum sfi_path {
    SFI_PATH_NONE     = 0, /* its device lacks them: refused */
    SFI_PATH_NATIVE   = 1, /* ours */
    SFI_PATH_PORTABLE = 2, /* ggml's own, which any GPU has: policies frozen and window, selector topk, no sfi_verify() */
};

SFI_API const char * sfi_path_name(enum sfi_path path);

/* The path of layers (F16, head size 128) on a device of ggml_backend_dev_get(). NONE: *lacks, which may be NULL, names the
 * operations it lacks, until the next call of this thread. With SFI_PORTABLE_PATH set to 1 in the environment: never native. */
SFI_API enum sfi_path sfi_device_path(size_t device, const struct sfi_params * params, const char ** lacks);

/* The operations of ours that a device computes, each on a small instance: their names with a space between them, until the next call
 * of this thread. "" if it has none, or does not exist. */
SFI_API const char * sfi_device_operations(size_t device);

/* ---- layers -------------------------------------------------------------------------------------------------------- */

struct sfi_layer {
    size_t  struct_size;
    bool    sparse;        /* fast steps are sparse in this layer */
    int32_t n_head, n_head_kv, n_embd_head_k, n_embd_head_v;
    size_t  kv_cell_bytes; /* bytes of K and V of one cell, all KV heads */
    const char * why;      /* why the layer stays dense; "" if sparse. Lives until sfi_set_params() or sfi_free() */
    enum sfi_path path;    /* NONE if not sparse */
};

SFI_API int32_t sfi_n_layer(const struct sfi * sfi);
SFI_API int     sfi_get_layer(const struct sfi * sfi, int32_t il, struct sfi_layer * layer);

/* The selected cells of one layer and KV head, up to n_max of them, and the positions they hold; either array may be NULL.
 * Returns their number, or a negative status. */
SFI_API int sfi_get_selected(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head_kv,
                             int32_t * cells, int32_t * positions, int32_t n_max);

struct sfi_stability {
    size_t  struct_size;
    int32_t n_selected;
    float   evidence;  /* evidence on all candidates; topk: attention mass that always does not hold */
    float   mass;      /* share of it that `selected` captured, in [0, 1] */
    float   mass_prev; /* share that the previous set would have captured; NAN at the first refresh */
    float   jaccard;   /* overlap of `selected` with the previous set; NAN at the first refresh */
};

/* Policy frozen: of the last refresh (a slow step, or the end of prefill). SFI_ERR_NO_SUPPORT if there was none, and with other
 * policies. */
SFI_API int sfi_get_stability(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head_kv,
                              struct sfi_stability * stability);

/* Policy sketch: what the last fast step left to the sketch in one layer, for one query head (not KV head). */
struct sfi_tail {
    size_t struct_size;
    float  mass;        /* share of its attention on cells outside of the support, in [0, 1] */
    float  logit_error; /* how far a sketched logit is from the exact one, root of the mean square, by the fit */
};

/* SFI_ERR_NO_SUPPORT where the policy has no sketch, or nothing has been scanned yet. */
SFI_API int sfi_get_tail(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head, struct sfi_tail * tail);

#ifdef __cplusplus
}
#endif

#endif /* SFI_RESEARCH_H */
