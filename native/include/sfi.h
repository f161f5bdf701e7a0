/*
 * sfi.h: slow-fast decoding on a llama.cpp context.
 *
 * A token of an ordinary step attends to every cell of the KV cache, so decoding gets slower as the text gets longer. A *fast
 * step* looks at a sketch, a small copy of all keys and values in few bits, attends exactly to the cells that matter to this
 * token by it, and lets the sketch stand for all others. The cache itself is kept: time is saved, memory is not. A *slow step*
 * attends to everything and renews what fast steps need. Which step comes next is decided by sfi_step(), and seldom is it slow.
 *
 *     #include "sfi.h"
 *     #include <stdio.h>
 *
 *     static int generate(struct llama_context * lctx, struct llama_sampler * sampler, const llama_token * prompt, int n_prompt, int n) {
 *         struct sfi * sfi = NULL;
 *         int err = sfi_attach(lctx, NULL, &sfi);                            // NULL: the defaults
 *         if (!err) {
 *             err = sfi_prefill(sfi, 0, prompt, n_prompt, NULL, NULL);       // the logits of the last token are ready
 *         }
 *         for (int i = 0; i < n && !err; ++i) {
 *             const llama_token token = llama_sampler_sample(sampler, lctx, -1);
 *             if (llama_vocab_is_eog(llama_model_get_vocab(llama_get_model(lctx)), token)) {
 *                 break;
 *             }
 *             printf("%d\n", token);
 *             err = sfi_step(sfi, 0, token, SFI_STEP_AUTO, NULL);            // the logits of the next token are ready
 *         }
 *         if (err) {
 *             fprintf(stderr, "%s: %s\n", sfi_status_name(err), sfi_last_error());
 *         }
 *         sfi_free(sfi);
 *         return err;
 *     }
 *
 * lctx is made by llama_init_from_model() with flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED and, for several sequences,
 * kv_unified = false. Tokens, samplers, chat templates and saved states are llama.h's own.
 *
 * Every function that can fail returns 0 (SFI_OK) or a negative enum sfi_status, and sfi_last_error() says what to do about it.
 * Nothing here aborts, throws or prints. Structs may grow: each begins with its size, which the caller sets to sizeof before
 * the call. A smaller one than the library's is accepted; what it lacks has its default, and nothing is written behind its end.
 *
 * One thread at a time may be inside a context: a second one gets SFI_ERR_BUSY and nothing happens. sfi_cancel(), sfi_get_stats()
 * and sfi_memory() may be called at any time. sfi and llama_context may be freed in either order, but not by two threads at the
 * same time. After fork() only one of the two processes may go on with a context, and with a GPU only the parent. The context
 * stays an ordinary llama_context: whatever is done to its memory (llama_memory_*, llama_decode, llama_state_*) is noticed, and
 * the next step is slow.
 *
 * sfi-research.h has the other policies, the constants of the paper, the format of the sketch, and a look inside.
 */
#ifndef SFI_H
#define SFI_H

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Of this header; sfi_version() is of the library. A library serves programs that were built with headers before it. */
#define SFI_VERSION_MAJOR 0
#define SFI_VERSION_MINOR 1
#define SFI_VERSION_PATCH 0
#define SFI_VERSION (SFI_VERSION_MAJOR*10000 + SFI_VERSION_MINOR*100 + SFI_VERSION_PATCH)

/* Of the library: libsfi.so.0. It becomes another where a program that was built before would no longer work. */
#define SFI_SOVERSION 0

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

struct sfi;
struct sfi_research; /* sfi-research.h */

/* ---- start ------------------------------------------------------------------------------------------------------ */

struct sfi_init_params {
    size_t  struct_size; /* sizeof(struct sfi_init_params) */
    int32_t version;     /* SFI_VERSION */
    int32_t n_threads;   /* libsfi: what llama_context_default_params() says; 0: sfi_threads() */
    int32_t n_spin;      /* libsfi: how often a thread looks for work before it sleeps; 0: so that it is fast beside other work */
};

/* May be left out, and called again; params may be NULL. Says early what would fail later: SFI_ERR_VERSION, the library is older than
 * this header, or breaks with it; SFI_ERR_CPU, it was built for another CPU than this one. Without it, loading a model fails there. */
SFI_API int sfi_init(const struct sfi_init_params * params);

/* Threads to compute with: one for each core that is as fast as the fastest, within this process's affinity and quota. */
SFI_API int32_t sfi_threads(void);

/* ---- parameters ------------------------------------------------------------------------------------------------ */

enum sfi_policy {
    SFI_POLICY_FROZEN = 0, /* the cells are chosen on slow steps and kept until the next: as in arXiv 2603.12038, and on any GPU */
    SFI_POLICY_SKETCH = 2, /* the cells are chosen at each step, by the sketch */
};

/* How a prompt is read on a CPU. */
enum sfi_prefill {
    SFI_PREFILL_EXACT  = 0,
    SFI_PREFILL_SPARSE = 1, /* from 2048 cells on a query passes over 64 cells at a time that seem to matter to none of its neighbours,
                               but for those just before it; the last 512 tokens of a prompt are read exactly. What is kept of the text
                               differs a little, so this is for long texts, where it saves most of the time of attention */
};

struct sfi_params {
    size_t          struct_size; /* sizeof(struct sfi_params) */
    enum sfi_policy policy;
    float   tolerance;   /* sketch: how far a step may be from a dense one. A cell is attended to exactly if its share of the attention
                            times the expected error of its logit, in nats, is larger; 0: n_selected cells always are */
    int32_t n_selected;  /* cells that a step chooses at most, for each layer and KV head */
    int32_t n_recent;    /* the latest cells, which it always attends to */
    int32_t n_sink;      /* the first ones of the text, likewise */
    int32_t auto_depth;  /* SFI_STEP_AUTO is dense below this many cells; 0: at no depth; -1: below the depth from which a fast step
                            is faster by rule. On a GPU that is llama.cpp's own attention, which rounds otherwise */
    int32_t max_span;    /* frozen: fast steps after which a step is slow at the latest */
    bool    boundary;    /* frozen: a step is slow at the first content token after the end of a sentence */
    const struct sfi_research * research; /* NULL: its defaults */
    enum sfi_prefill prefill;
};

/* The defaults of a policy. params->struct_size must be set. */
SFI_API int sfi_default_params(struct sfi_params * params, enum sfi_policy policy);

/* The depth below which SFI_STEP_AUTO is dense with these parameters, or a negative status. */
SFI_API int32_t sfi_auto_depth(const struct sfi_params * params);

/* ---- life cycle ------------------------------------------------------------------------------------------------ */

/* Attach to a context; params may be NULL. On failure *out is NULL and sfi_last_error() says what to change.
 * SFI_ERR_MODEL: no layer of this model can be sparse. SFI_ERR_CONTEXT: flash attention off, embeddings, several sequences in
 * a unified KV cache. SFI_ERR_KV_TYPE: K or V type without a kernel. SFI_ERR_BACKEND: a layer lives on a device that lacks
 * the operations of this policy. */
SFI_API int  sfi_attach(struct llama_context * lctx, const struct sfi_params * params, struct sfi ** out);

/* Detach and free; NULL is accepted. The llama_context stays usable (or may already be gone). While another thread is inside,
 * that thread frees when it leaves. */
SFI_API void sfi_free(struct sfi * sfi);

/* New parameters for an attached context. What was chosen is dropped, so the next step is slow. */
SFI_API int  sfi_set_params(struct sfi * sfi, const struct sfi_params * params);

/* The parameters in use; `research` lives until the next sfi_set_params() or sfi_free(). */
SFI_API int  sfi_get_params(const struct sfi * sfi, struct sfi_params * params);

struct sfi_bytes {
    size_t struct_size;
    size_t kv;      /* K and V of all cells */
    size_t sfi;     /* what is attached */
    size_t compute; /* llama.cpp's room for its graphs, as far as it is known before */
};

/* Memory that a context will take with what is attached to it, on all devices together, before it is made. cparams as for
 * llama_init_from_model(); params may be NULL. Nothing of that size is allocated. Fails as sfi_attach() would. Not while
 * another thread makes or frees a context of this model. */
SFI_API int  sfi_context_bytes(struct llama_model * model, const struct llama_context_params * cparams,
                               const struct sfi_params * params, struct sfi_bytes * bytes);

/* ---- steps ----------------------------------------------------------------------------------------------------- */

enum sfi_step_kind {
    SFI_STEP_AUTO  = 0, /* let the schedule decide */
    SFI_STEP_SLOW  = 1, /* dense attention, ends with a new support for fast steps */
    SFI_STEP_FAST  = 2, /* attention over the support, and the sketch for the rest */
    SFI_STEP_DENSE = 3, /* dense attention alone */
};

enum sfi_reason {
    SFI_REASON_NONE        = 0, /* a fast step */
    SFI_REASON_FIRST       = 1, /* slow: the sequence has no support yet */
    SFI_REASON_BOUNDARY    = 2, /* slow: a sentence or clause ended */
    SFI_REASON_MAX_SPAN    = 3, /* slow: max_span fast steps since the last slow one */
    SFI_REASON_INVALIDATED = 4, /* slow: the cache was edited behind the support */
    SFI_REASON_FORCED      = 5, /* the caller asked for this kind */
    SFI_REASON_SHORT       = 6, /* dense: fewer cells than auto_depth */
    SFI_REASON_VERIFY      = 7, /* slow or dense: sfi_verify() */
};

struct sfi_step_info {
    size_t             struct_size;
    enum sfi_step_kind kind;      /* what was done: SLOW, FAST or DENSE */
    enum sfi_reason    reason;
    int32_t            pos;       /* position of the token */
    int32_t            depth;     /* cells the sequence has after the step */
    int32_t            n_cells;   /* cells each KV head of a sparse layer attended to exactly, in the mean */
    float              tail_mass; /* sketch, fast: share of the attention that it stood in for, mean over all heads; else 0 */
    int64_t            t_us;      /* time of the step in microseconds, logits included */
};

enum sfi_phase {
    SFI_PHASE_PREFILL = 0, /* done and total are tokens */
    SFI_PHASE_FIT     = 1, /* the sketch is fitted to the text: done and total are layers */
};

/* Called between batches and between layers; return false to stop (SFI_ERR_ABORTED). It must not call into this context. */
typedef bool (*sfi_progress_fn)(void * user, enum sfi_phase phase, int32_t done, int32_t total);

/* Dense prefill of n tokens after what the sequence holds; its end chooses the first support. progress may be NULL. On
 * SFI_ERR_ABORTED the batches that were done stay in the cache. To continue a conversation, take back what is not common
 * (sfi_rollback()) and prefill the rest. */
SFI_API int sfi_prefill(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n,
                        sfi_progress_fn progress, void * user);

/* The beginning of a text whose rest follows by another call: nothing is chosen yet, and no logits are kept. So a server reads a
 * prompt in pieces as short as it likes, and the last of them, by sfi_prefill(), chooses as if there had been one. */
SFI_API int sfi_prefill_part(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n,
                             sfi_progress_fn progress, void * user);

/* One token of one sequence. FAST without a valid support is refused with SFI_ERR_NO_SUPPORT; where the window of policy frozen
 * is full, AUTO and FAST become slow (SFI_REASON_MAX_SPAN). info may be NULL. */
SFI_API int sfi_step(struct sfi * sfi, llama_seq_id seq, llama_token token, enum sfi_step_kind kind,
                     struct sfi_step_info * info);

struct sfi_next {
    llama_seq_id seq;
    llama_token  token;
};

/* One token each of n sequences in one pass over the weights; no sequence is there twice. Each step is what sfi_step() would do, of the
 * kind that is right for its sequence. The logits after next[i] are then llama_get_logits_ith(lctx, i); info, if it is not NULL, is an array
 * of n, the first with its struct_size set, and t_us of each is its share of the pass. Fastest with sequences of consecutive numbers in
 * rising order. SFI_ERR_BACKEND: a device steps one sequence at a time. After an error no sequence has taken its step. */
SFI_API int sfi_step_many(struct sfi * sfi, const struct sfi_next * next, int32_t n, enum sfi_step_kind kind, struct sfi_step_info * info);

/* The next tokens of a sequence by fast steps in one pass over the weights, each with cells of its own choice: guesses, say, of which the
 * wrong ones are then taken back by sfi_rollback(). Takes as many of the n as come before the window moves, one at least, and returns how
 * many; each step is what sfi_step() would do with the token. The logits after token i are llama_get_logits_ith(lctx, i); info, if it is
 * not NULL, is an array as for sfi_step_many(). SFI_ERR_NO_SUPPORT: the next step must be slow or dense. */
SFI_API int sfi_step_fast(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n, struct sfi_step_info * info);

/* What the schedule would do with this token now; nothing is computed. */
SFI_API int sfi_peek(const struct sfi * sfi, llama_seq_id seq, llama_token token,
                     enum sfi_step_kind * kind, enum sfi_reason * reason);

/* Take back the last n tokens of a sequence. A support that does not list them stays valid: of policy frozen any n up to the cells that
 * followed the last refresh, and n_recent of those before it; of policy sketch any n that leaves half of the text to which the sketch
 * was fitted. Taken back beyond that, the next step is slow. */
SFI_API int sfi_rollback(struct sfi * sfi, llama_seq_id seq, int32_t n);

/* Dense attention for n tokens in one batch, 1 to llama_n_batch(), each K row read once for all of them. They take the place of
 * the last n_replaced tokens of the sequence (n_replaced <= n), whose K and V came from fast steps. The logits after token i
 * are then llama_get_logits_ith(lctx, i). With refresh the pass ends with a new support. */
SFI_API int sfi_verify(struct sfi * sfi, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced,
                       bool refresh, struct sfi_step_info * info);

/* Draws the token that follows row `row` of llama_get_logits_ith(lctx, row). With `draft` it is a guess: draw it by a copy of the
 * sampler, made when the first guess after a token that was none is asked for; negative: guess no further. */
typedef llama_token (*sfi_sample_fn)(void * user, int32_t row, bool draft);

/* Tokens exactly as dense steps give them, several at a time: guesses up to n_drafts tokens that follow `token` by fast steps and
 * verifies them in one dense pass, of which the sampler draws every token; those that were guessed right are kept. `token` is sure
 * and not in the cache yet. Returns how many tokens follow it, 1 to n_drafts + 1, in `out`; the last of them is the `token` of the
 * next call. After an error the sequence is as before. Does a dense step where no fast one is possible. */
SFI_API int sfi_exact(struct sfi * sfi, llama_seq_id seq, llama_token token, int32_t n_drafts, sfi_sample_fn sample, void * user,
                      llama_token * out);

/* Drop the support of a sequence, if it has one: its next step is slow. */
SFI_API int sfi_invalidate(struct sfi * sfi, llama_seq_id seq);

/* From any thread or signal handler: the call that is inside this context ends with SFI_ERR_ABORTED, after the operation that computes now (on a
 * GPU, after the batch), and what it began is taken back as for SFI_ERR_ABORTED above. The next call works again. If no call
 * is inside, nothing happens. llama_set_abort_callback() works beside it. */
SFI_API void sfi_cancel(struct sfi * sfi);

/* ---- a sequence outside of its context ---------------------------------------------------------------------------- */

/* What was read once is there again without reading it: K and V of a text as rows, bit for bit, and the state of what fast steps need
 * of it, so that no step is slow and nothing is fitted anew. Both fit every context of the same model with the same types of K and V,
 * parameters and build of this library, of any size; a state may be cut to the first tokens of its text. Store neither without a
 * checksum: bytes that are not what they were make wrong answers, though no crash.
 *
 *     rows of n tokens: for each layer K [n, row of K], then V [n, row of V] */

/* Bytes of the rows of n tokens. SFI_ERR_MODEL: the model keeps more than K and V, or not of every token. SFI_ERR_CONTEXT: flash
 * attention is off, or the layers with a sliding window keep its cells alone (swa_full = false). */
SFI_API int64_t sfi_rows_size(struct llama_context * lctx, int32_t n);

/* The rows of the tokens at positions [first, first + n) of a sequence; with sfi attached or without. Not while another thread is inside
 * this context; size is that of sfi_rows_size(). */
SFI_API int sfi_get_rows(struct llama_context * lctx, llama_seq_id seq, int32_t first, int32_t n, void * rows, size_t size);

/* Append the first n of n_rows tokens, whose rows these are, to a sequence; `tokens` are those n. After an error the sequence is as
 * before. What is attached counts it as an edit: sfi_set_state() comes last. */
SFI_API int sfi_add_rows(struct llama_context * lctx, llama_seq_id seq, const llama_token * tokens, int32_t n, const void * rows,
                         int32_t n_rows, size_t size);

/* Bytes of the state of a sequence; 0: there is nothing to keep, as before the first refresh, with policies window and oracle, and where
 * a layer is portable. */
SFI_API int64_t sfi_state_size(const struct sfi * sfi, llama_seq_id seq);
SFI_API int     sfi_get_state (const struct sfi * sfi, llama_seq_id seq, void * state, size_t size);

/* Give a sequence, whose rows are there, the state of a text that begins with its tokens. SFI_ERR_NO_SUPPORT: this state does not serve
 * them, and sfi_last_error() says why; nothing has changed, and the next step is slow. */
SFI_API int sfi_set_state(struct sfi * sfi, llama_seq_id seq, const void * state, size_t size);

/* A number that tells whether n bytes have changed by accident, as fast as memory is read; begin: 0, or that of the bytes before. */
SFI_API uint64_t sfi_checksum(uint64_t begin, const void * bytes, size_t n);

/* ---- meters ---------------------------------------------------------------------------------------------------- */

struct sfi_stats {
    size_t  struct_size;
    int64_t n_slow, n_fast, n_dense, n_prefill;  /* steps; tokens of prefill */
    int64_t n_verify, n_verified;                /* calls of sfi_verify(), tokens in them */
    int64_t us_slow, us_fast, us_dense, us_prefill, us_verify;
    int64_t kv_read, kv_dense;                   /* bytes of K and V that the steps read / dense steps would have read for the
                                                    tokens that were not taken back */
    int64_t n_reason[16];                        /* slow and dense steps by enum sfi_reason */
};

/* Since attach or reset, as of the last step that ended. */
SFI_API int sfi_get_stats  (const struct sfi * sfi, struct sfi_stats * stats);
SFI_API int sfi_reset_stats(struct sfi * sfi);

/* Bytes that sfi adds to the context. */
SFI_API size_t sfi_memory(const struct sfi * sfi);

/* ---- errors, log and identity ---------------------------------------------------------------------------------- */

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
    SFI_ERR_ABORTED    =  -9, /* stopped by a callback or sfi_cancel() */
    SFI_ERR_NO_SUPPORT = -10, /* nothing was selected yet */
    SFI_ERR_BUSY       = -11, /* another thread is inside this context */
    SFI_ERR_DETACHED   = -12, /* the llama_context is gone */
    SFI_ERR_VERSION    = -13, /* the library is not of the version that the program was built for */
    SFI_ERR_CPU        = -14, /* the library was built for another CPU */
};

/* One sentence with the remedy about the last failure on this thread; "" if there was none. */
SFI_API const char * sfi_last_error(void);

/* Names, e.g. "SFI_ERR_FULL", "fast", "max_span". */
SFI_API const char * sfi_status_name(int status);
SFI_API const char * sfi_kind_name  (enum sfi_step_kind kind);
SFI_API const char * sfi_reason_name(enum sfi_reason reason);

/* What llama.cpp and this library have to say, line by line; NULL: to stderr. For the whole process, as llama_log_set(). */
SFI_API void sfi_log_set(ggml_log_callback log, void * user);

/* SFI_VERSION of the library. */
SFI_API int sfi_version(void);

/* The sources this library was built from: "<llama.cpp commit>+<hash of our patches and native code>". SFI_SOURCE_ID in
 * sfi-source-id.h, beside this header where the library was installed, is that of the library it came with. */
SFI_API const char * sfi_source_id(void);

#ifdef __cplusplus
}
#endif

#endif /* SFI_H */
