/*
 * What several threads may do with contexts of one model, for check-threads.sh:
 *
 *   - two of them each prefill and step a context of their own, one slow-fast, one stock; their weights are the same
 *   - a third calls into the first context meanwhile: steps, statistics, sfi_cancel()
 *   - at last sfi_free() is called while a thread is inside a prefill
 *
 *     threads MODEL.gguf [ROUNDS [race]]
 *
 * With `race` two threads also write one variable without a lock, to see that this would be found.
 *
 * Exits with 0 if every call gave one of the statuses that it may give, and the first context decodes afterwards.
 */
#include "sfi.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_PROMPT = 60, N_STEPS = 6, N_CTX = 256 };

struct shared {
    struct llama_context * lctx;
    struct sfi * sfi;
    int rounds;
    atomic_bool cancel, done, inside, freed;
    atomic_int wrong, busy, aborted;
};

/* Each call that is cancelled is an error to llama.cpp. */
static void no_log(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

static bool should_stop(void * flag) {
    return atomic_load((atomic_bool *) flag);
}

static struct llama_context * new_context(struct llama_model * model) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.n_batch = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = 1; /* libgomp's own threads and barriers are unknown to helgrind */
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return llama_init_from_model(model, params);
}

static void prompt_of(llama_token * tokens) {
    for (int i = 0; i < N_PROMPT; ++i) {
        tokens[i] = 65 + i % 20;
    }
}

static void count(struct shared * s, int status) {
    switch (status) {
        case SFI_OK: break;
        case SFI_ERR_BUSY:    atomic_fetch_add(&s->busy, 1); break;
        case SFI_ERR_ABORTED: atomic_fetch_add(&s->aborted, 1); break;
        case SFI_ERR_FULL: break; /* the third thread steps as well */
        default:
            fprintf(stderr, "%s: %s\n", sfi_status_name(status), sfi_last_error());
            atomic_fetch_add(&s->wrong, 1);
    }
}

static void * slow_fast(void * user) {
    struct shared * s = user;
    llama_token prompt[N_PROMPT];
    prompt_of(prompt);
    for (int round = 0; round < s->rounds; ++round) {
        int err;
        do { /* the third thread may be inside: only who is inside may touch the memory */
            err = sfi_prefill(s->sfi, 0, prompt, N_PROMPT, NULL, NULL);
            count(s, err);
        } while (err == SFI_ERR_BUSY);
        for (int i = 0; i < N_STEPS; ++i) {
            count(s, sfi_step(s->sfi, 0, 66 + i, SFI_STEP_AUTO, NULL));
        }
        const int32_t n = llama_memory_seq_pos_max(llama_get_memory(s->lctx), 0) + 1;
        do {
            err = sfi_rollback(s->sfi, 0, n);
            count(s, err);
        } while (err == SFI_ERR_BUSY);
    }
    atomic_store(&s->done, true);
    return NULL;
}

static void * stock(void * user) {
    struct shared * s = user;
    llama_token prompt[N_PROMPT];
    prompt_of(prompt);
    for (int round = 0; round < s->rounds; ++round) {
        llama_memory_clear(llama_get_memory(s->lctx), true);
        int status = llama_decode(s->lctx, llama_batch_get_one(prompt, N_PROMPT));
        for (int i = 0; i < N_STEPS && status == 0; ++i) {
            llama_token token = 66 + i;
            status = llama_decode(s->lctx, llama_batch_get_one(&token, 1));
        }
        llama_synchronize(s->lctx);
        if (status != 0 && status != 2) {
            atomic_fetch_add(&s->wrong, 1);
        }
        if (status == 2) {
            atomic_fetch_add(&s->aborted, 1);
            atomic_store(&s->cancel, false);
        }
    }
    atomic_store(&s->done, true);
    return NULL;
}

struct both { struct shared * a, * b; };

static int unguarded;

/* Nothing orders two threads that do this, whichever comes first. */
static void * write_unguarded(void * user) {
    (void) user;
    ++unguarded;
    return NULL;
}

static void * intruder(void * user) {
    struct both * both = user;
    struct sfi_stats stats = { .struct_size = sizeof(stats) };
    for (unsigned i = 0; !atomic_load(&both->a->done) || !atomic_load(&both->b->done); ++i) {
        count(both->a, sfi_get_stats(both->a->sfi, &stats));
        if (i % 64 == 0) {
            sfi_cancel(both->a->sfi);
            atomic_store(&both->b->cancel, true);
        }
    }
    return NULL;
}

static bool while_it_is_freed(void * user, enum sfi_phase phase, int32_t done, int32_t total) {
    (void) phase, (void) done, (void) total;
    struct shared * s = user;
    atomic_store(&s->inside, true);
    while (!atomic_load(&s->freed)) {
    }
    return true;
}

static void * last_prefill(void * user) {
    struct shared * s = user;
    llama_token prompt[N_PROMPT];
    prompt_of(prompt);
    count(s, sfi_prefill(s->sfi, 0, prompt, N_PROMPT, while_it_is_freed, s));
    return NULL;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: threads MODEL.gguf [ROUNDS]\n");
        return 2;
    }
    llama_backend_init();
    llama_log_set(no_log, NULL);
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 2;
    }
    static struct shared a, b;
    a.rounds = b.rounds = argc > 2 ? atoi(argv[2]) : 2;
    a.lctx = new_context(model);
    b.lctx = new_context(model);
    struct sfi_params params = { .struct_size = sizeof(params) };
    const int err = sfi_default_params(&params, SFI_POLICY_SKETCH);
    params.n_selected = 40;
    if (err || !a.lctx || !b.lctx || sfi_attach(a.lctx, &params, &a.sfi)) {
        fprintf(stderr, "%s\n", sfi_last_error());
        return 2;
    }
    llama_set_abort_callback(b.lctx, should_stop, &b.cancel);

    struct both both = { &a, &b };
    pthread_t threads[3];
    for (int i = 0; i < 2 && argc > 3; ++i) {
        pthread_create(&threads[i], NULL, write_unguarded, NULL);
    }
    for (int i = 0; i < 2 && argc > 3; ++i) {
        pthread_join(threads[i], NULL);
    }
    pthread_create(&threads[0], NULL, slow_fast, &a);
    pthread_create(&threads[1], NULL, stock, &b);
    pthread_create(&threads[2], NULL, intruder, &both);
    for (int i = 0; i < 3; ++i) {
        pthread_join(threads[i], NULL);
    }

    pthread_create(&threads[0], NULL, last_prefill, &a);
    while (!atomic_load(&a.inside)) {
    }
    sfi_free(a.sfi); /* a thread is inside: it frees when it leaves */
    atomic_store(&a.freed, true);
    pthread_join(threads[0], NULL);

    llama_free(a.lctx);
    llama_free(b.lctx);
    llama_model_free(model);
    printf("%d wrong, %d busy, %d aborted\n", atomic_load(&a.wrong) + atomic_load(&b.wrong), atomic_load(&a.busy) + atomic_load(&b.busy),
           atomic_load(&a.aborted) + atomic_load(&b.aborted));
    return atomic_load(&a.wrong) + atomic_load(&b.wrong) != 0;
}
