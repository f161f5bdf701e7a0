/*
 * sfi.h: slow-fast decoding on a llama.cpp context.
 *
 * Rare *slow steps* attend to every cell of the KV cache and choose, per layer and KV head, which cells matter;
 * the *fast steps* between them attend to that support alone. The full KV cache is kept: bandwidth and compute
 * are saved, memory is not.
 *
 *     struct llama_context * lctx = llama_init_from_model(model, cparams);   // flash attention on
 *     struct sfi_params params = sfi_default_params();
 *     struct sfi * sfi;
 *     int err = sfi_attach(lctx, &params, &sfi);
 *     if (err) { fprintf(stderr, "%s\n", sfi_last_error()); return 1; }
 *
 *     sfi_prefill(sfi, 0, prompt, n_prompt);                  // logits of the last token are ready
 *     while (...) {
 *         llama_token token = llama_sampler_sample(smpl, lctx, -1);
 *         struct sfi_step_info info;
 *         err = sfi_step(sfi, 0, token, SFI_STEP_AUTO, &info);   // logits of the next token are ready
 *     }
 *     sfi_free(sfi);
 *
 * Every function that can fail returns 0 (SFI_OK) or a negative enum sfi_status; nothing here aborts or prints.
 * One thread at a time may be inside a context: a second one gets SFI_ERR_BUSY and nothing happens.
 * sfi and llama_context may be freed in either order. The context stays an ordinary llama_context: whatever is
 * done to its memory (llama_memory_*, llama_decode, llama_state_*) is noticed, and the next step is slow.
 */
#ifndef SFI_H
#define SFI_H

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    if defined(SFI_BUILD)
#        define SFI_API __declspec(dllexport)
#    else
#        define SFI_API __declspec(dllimport)
#    endif
#else
#    define SFI_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- life cycle ------------------------------------------------------------------------------------------- */

struct sfi;

/* Which fast steps there are. */
enum sfi_policy {
    SFI_POLICY_FROZEN = 0, /* `selected` is chosen on slow steps and kept until the next */
    SFI_POLICY_WINDOW = 1, /* sink + recent only: the baseline every selector must beat */
    SFI_POLICY_SKETCH = 2, /* `selected` is chosen at every step by a low-rank, few-bit copy of K and V, which also stands
                              for all cells that are not attended to */
    SFI_POLICY_ORACLE = 3, /* `selected` is chosen at every step by exact attention: no faster than dense, for measuring */
};

enum sfi_selector {
    SFI_SELECTOR_TOPK  = 0, /* top-K of the pooled evidence of the last queries */
    SFI_SELECTOR_PAPER = 1, /* the selector of arXiv 2603.12038, evidence of the slow step's query alone */
};

struct sfi_params {
    size_t  struct_size; /* sizeof(struct sfi_params); filled by sfi_default_params() */

    /* the support, in cells per KV head: budget = n_sink + n_recent + n_selected */
    enum sfi_policy   policy;
    enum sfi_selector selector;
    int32_t n_sink;      /* >= 0 */
    int32_t n_recent;    /* >= n_queries; the window's end follows the text ... */
    bool    pinned;      /* ... and its start stays where the last refresh put it; false: it slides (policy frozen, window) */
    int32_t n_selected;  /* >= 1 */

    /* the schedule, in steps */
    int32_t max_span;    /* fast steps after which a step is slow at the latest; 0: never (not for frozen and window) */
    int32_t min_span;    /* fast steps before a boundary may make a step slow, >= 0 */
    bool    boundary;    /* slow step at the first content token after the end of a sentence */
    bool    repair;      /* frozen, window: a slow step computes K and V of the span before it again, with dense attention */
    int32_t auto_depth;  /* SFI_STEP_AUTO is dense below this many cells, on a GPU by llama.cpp's own attention, which is faster
                            there but rounds otherwise; 0: slow-fast at every depth */

    /* the selector */
    int32_t n_queries;   /* evidence of the last n queries, 1 .. 64 ... */
    int32_t n_slow_queries; /* ... of which a slow step takes the last n: its own costs nothing, more do, 1 .. 64 */
    int32_t pool_after;  /* an important cell also brings the cells after it ... */
    int32_t pool_before; /* ... and before it */

    /* SFI_POLICY_SKETCH: cells are attended to exactly if their share of the scanned attention times the expected error of
     * their logit is larger, n_selected of them at most; 0: n_selected cells. This is the mean over all heads: those whose
     * outputs the sketch changes more have a smaller one, by the fit */
    float   tolerance;

    /* SFI_POLICY_SKETCH: after a fast step whose tail_mass was larger, the next step is slow and the sketch is fitted anew
     * to the latest queries; 0: never */
    float   max_tail_mass;

    /* SFI_POLICY_SKETCH: components of K with 4, 2 and 1 bits, of V with 4 and 2 bits, see struct ggml_sketch_format.
     * No components of K: 8, 48, 0, 0, 16 for heads of up to 127 values with sketch_first 2, and for each 64 values of larger
     * ones 4, 40, 0, 0, 16 with sketch_first half of K, rounded up: 5/64 and 1/16 of F16; with tolerance 0 and for
     * soft-capped logits 4, 12, 24, 0, 16. No components of V: the tail is dropped.
     * sketch_first: each step reads so many 4 bytes of K of every cell, and the rest of those cells alone that have
     * at least second_look times the mean share of the attention by that (of 8192 cells, if there are more); 0: everything of
     * every cell, as with tolerance 0 or soft-capped logits */
    int32_t sketch_k4, sketch_k2, sketch_k1, sketch_v4, sketch_v2, sketch_first;
    float   second_look;

    /* SFI_SELECTOR_PAPER, see method in arXiv 2603.12038 */
    float   alpha, gamma, beta, p, eta, lambda_clip, a_soft, a_cross, temperature;
    int32_t nms_radius;
};

/* The defaults: policy sketch, without slow steps but those that it needs itself. */
SFI_API struct sfi_params sfi_default_params(void);

/* The defaults of another policy: frozen and window refresh at boundaries, as in arXiv 2603.12038. */
SFI_API struct sfi_params sfi_policy_params(enum sfi_policy policy);

/* Attach to a context. On failure *out is NULL and sfi_last_error() says what to change.
 * SFI_ERR_MODEL: no layer of this model can be sparse. SFI_ERR_CONTEXT: flash attention off, embeddings,
 * several sequences in a unified KV cache. SFI_ERR_KV_TYPE: K or V type without a kernel. SFI_ERR_BACKEND:
 * a layer with sparse attention lives on a device that lacks the operations of this policy. */
SFI_API int  sfi_attach(struct llama_context * lctx, const struct sfi_params * params, struct sfi ** out);

/* Detach and free; NULL is accepted. The llama_context stays usable (or may already be gone). While another thread
 * is inside, that thread frees when it leaves. */
SFI_API void sfi_free(struct sfi * sfi);

/* New parameters for an attached context. Supports are dropped, so the next step is slow. */
SFI_API int  sfi_set_params(struct sfi * sfi, const struct sfi_params * params);
SFI_API int  sfi_get_params(const struct sfi * sfi, struct sfi_params * params);

/* ---- steps ------------------------------------------------------------------------------------------------ */

enum sfi_step_kind {
    SFI_STEP_AUTO  = 0, /* let the schedule decide */
    SFI_STEP_SLOW  = 1, /* dense attention, ends with a refreshed support */
    SFI_STEP_FAST  = 2, /* attention over the support only */
    SFI_STEP_DENSE = 3, /* dense attention, no refresh */
};

enum sfi_reason {
    SFI_REASON_NONE        = 0, /* a fast step */
    SFI_REASON_FIRST       = 1, /* slow: the sequence has no support yet */
    SFI_REASON_BOUNDARY    = 2, /* slow: a sentence or clause ended */
    SFI_REASON_MAX_SPAN    = 3, /* slow: max_span fast steps since the last slow one */
    SFI_REASON_UNSTABLE    = 4, /* slow: the support drifted (policies that can tell) */
    SFI_REASON_INVALIDATED = 5, /* slow: the cache was edited behind the support */
    SFI_REASON_FORCED      = 6, /* the caller asked for this kind */
    SFI_REASON_SHORT       = 7, /* dense: fewer cells than auto_depth, see there */
    SFI_REASON_VERIFY      = 8, /* slow or dense: sfi_verify() */
    SFI_REASON_COUNT       = 9,
};

struct sfi_step_info {
    enum sfi_step_kind kind;   /* what was done: SLOW, FAST or DENSE */
    enum sfi_reason    reason;
    int32_t pos;               /* position of the token */
    int32_t depth;             /* cells the sequence has after the step */
    int32_t n_cells;           /* cells each KV head of a sparse layer attended to, in the mean */
    float   tail_mass;         /* policy sketch, fast: attention mass that the sketch stood in for, mean over all heads; else 0 */
    int64_t t_us;              /* time of the step in microseconds, logits included */
};

/* Called between prefill batches with the tokens done so far; return false to stop (SFI_ERR_ABORTED). */
typedef bool (*sfi_progress_fn)(void * user, int32_t n_done, int32_t n_total);

/* Dense prefill of n tokens after what the sequence holds; the last queries choose the first support.
 * On SFI_ERR_ABORTED the tokens done so far stay in the cache. */
SFI_API int sfi_prefill(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n,
                        sfi_progress_fn progress, void * user);

/* One token of one sequence. FAST without a valid support is refused with SFI_ERR_NO_SUPPORT; at the end of
 * the pinned window AUTO and FAST become slow (SFI_REASON_MAX_SPAN). info may be NULL. */
SFI_API int sfi_step(struct sfi * sfi, llama_seq_id seq, llama_token token, enum sfi_step_kind kind,
                     struct sfi_step_info * info);

/* What the schedule would do with this token now; nothing is computed. */
SFI_API int sfi_peek(const struct sfi * sfi, llama_seq_id seq, llama_token token,
                     enum sfi_step_kind * kind, enum sfi_reason * reason);

/* Take back the last n tokens of a sequence. A support that does not list them stays valid: any n up to the cells
 * that followed the last refresh, and n_recent of those before it. Taken back beyond that, the next step is slow. */
SFI_API int sfi_rollback(struct sfi * sfi, llama_seq_id seq, int32_t n);

/* Dense attention for n tokens in one batch, 1 to llama_n_batch(), each K row read once for all of them. They take the
 * place of the last n_replaced tokens of the sequence (n_replaced <= n), whose K and V came from fast steps. The logits
 * after token i are then llama_get_logits_ith(lctx, i). With refresh the pass ends with a new support.
 *
 * To decode exactly as dense steps would: draft a few tokens by fast steps, verify the token that was sampled last and
 * all drafted ones, keep the drafts that the logits confirm, sfi_rollback() the others, sample the next token. */
SFI_API int sfi_verify(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced,
                       bool refresh, struct sfi_step_info * info);

/* Drop the support of a sequence, if it has one: its next step is slow. */
SFI_API int sfi_invalidate(struct sfi * sfi, llama_seq_id seq);

/* ---- inspection: the support-stability hook ---------------------------------------------------------------- */

/* Whose operations make the support of a layer. */
enum sfi_path {
    SFI_PATH_NONE     = 0, /* its device lacks them: refused */
    SFI_PATH_NATIVE   = 1, /* ours */
    SFI_PATH_PORTABLE = 2, /* ggml's own, which any GPU has: policies frozen and window, selector topk, no sfi_verify() */
};

struct sfi_layer {
    bool    sparse;        /* fast steps are sparse in this layer */
    int32_t n_head, n_head_kv, n_embd_head_k, n_embd_head_v;
    size_t  kv_cell_bytes; /* bytes of K and V of one cell, all KV heads */
    const char * why;      /* why the layer stays dense; "" if sparse */
    enum sfi_path path;    /* NONE if not sparse */
};

/* The path of layers (F16, head size 128) on a device of ggml_backend_dev_get(). NONE: *lacks, which may be NULL, names the
 * operations it lacks, until the next call of this thread. With SFI_PORTABLE_PATH set to 1 in the environment: never native. */
SFI_API enum sfi_path sfi_device_path(size_t device, const struct sfi_params * params, const char ** lacks);

SFI_API int32_t sfi_n_layer(const struct sfi * sfi);
SFI_API int     sfi_get_layer(const struct sfi * sfi, int32_t il, struct sfi_layer * layer);

/* Memory that sfi adds to the context, in bytes. */
SFI_API size_t  sfi_memory(const struct sfi * sfi);

/* The selected cells of one layer and KV head, up to n_max of them, and the positions they hold; either array
 * may be NULL. Returns their number, or a negative status. */
SFI_API int sfi_get_selected(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head_kv,
                             int32_t * cells, int32_t * positions, int32_t n_max);

struct sfi_stability {
    int32_t n_selected;
    float   evidence;  /* evidence on all candidates; topk: attention mass that always does not hold */
    float   mass;      /* share of it that `selected` captured, in [0, 1] */
    float   mass_prev; /* share that the previous set would have captured; NAN at the first refresh */
    float   jaccard;   /* overlap of `selected` with the previous set; NAN at the first refresh */
};

/* Of the last refresh (a slow step, or the end of prefill). SFI_ERR_NO_SUPPORT if there was none. */
SFI_API int sfi_get_stability(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head_kv,
                              struct sfi_stability * stability);

/* Policy sketch: what the last fast step left to the sketch in one layer, for one query head (not KV head). */
struct sfi_tail {
    float mass;        /* share of its attention on cells outside of the support, in [0, 1] */
    float logit_error; /* how far a sketched logit is from the exact one, root of the mean square, by the fit */
};

/* SFI_ERR_NO_SUPPORT where the policy has no sketch, or nothing has been scanned yet. */
SFI_API int sfi_get_tail(const struct sfi * sfi, llama_seq_id seq, int32_t il, int32_t head, struct sfi_tail * tail);

struct sfi_stats {
    int64_t n_slow, n_fast, n_dense, n_prefill;  /* steps; tokens of prefill */
    int64_t n_reason[SFI_REASON_COUNT];          /* slow and dense steps by reason */
    int64_t us_slow, us_fast, us_dense, us_prefill;
    int64_t kv_read, kv_dense;                   /* bytes of K and V that the steps read / dense steps would have read
                                                    for the tokens that were not taken back */
    int64_t n_verify, n_verified, us_verify;     /* calls of sfi_verify(), tokens in them, their time */
    int64_t n_repaired;                          /* tokens whose K and V slow steps computed again */
};

SFI_API int sfi_get_stats  (const struct sfi * sfi, struct sfi_stats * stats);
SFI_API int sfi_reset_stats(struct sfi * sfi);

/* ---- errors and identity ----------------------------------------------------------------------------------- */

enum sfi_status {
    SFI_OK             =   0,
    SFI_ERR_ARGUMENT   =  -1, /* a parameter out of range */
    SFI_ERR_MODEL      =  -2, /* no layer of the model can be sparse */
    SFI_ERR_CONTEXT    =  -3, /* the context's settings rule it out */
    SFI_ERR_KV_TYPE    =  -4, /* no kernel for this type of K or V */
    SFI_ERR_BACKEND    =  -5, /* a device lacks the operations */
    SFI_ERR_FULL       =  -6, /* no free cell: the context is full */
    SFI_ERR_MEMORY     =  -7, /* allocation failed */
    SFI_ERR_DECODE     =  -8, /* llama_decode failed */
    SFI_ERR_ABORTED    =  -9, /* stopped by a callback */
    SFI_ERR_NO_SUPPORT = -10, /* nothing was selected yet */
    SFI_ERR_BUSY       = -11, /* another thread is inside this context */
    SFI_ERR_DETACHED   = -12, /* the llama_context is gone */
};

/* The name of a status, e.g. "SFI_ERR_FULL". */
SFI_API const char * sfi_status_name(int status);

/* One sentence with the remedy about the last failure on this thread; "" if there was none. */
SFI_API const char * sfi_last_error(void);

SFI_API const char * sfi_kind_name  (enum sfi_step_kind kind);
SFI_API const char * sfi_reason_name(enum sfi_reason reason);
SFI_API const char * sfi_path_name  (enum sfi_path path);

/* The sources this library was built from: "<llama.cpp commit>+<hash of our patches and native code>".
 * Compare it with the one you were built against. */
SFI_API const char * sfi_source_id(void);

#ifdef __cplusplus
}
#endif

#endif /* SFI_H */
