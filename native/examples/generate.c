/*
 * Continue a text slow-fast, from plain C.
 *
 *     sfi-example-generate MODEL.gguf TEXTFILE [N]
 *
 * Prefills the file, generates N tokens greedily (default 64) and says on stderr which steps were slow and why.
 */
#include "sfi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void only_errors(enum ggml_log_level level, const char * text, void * user) {
    (void) user;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

/* The file as a string, or NULL. */
static char * read_file(const char * path, size_t * size) {
    FILE * file = fopen(path, "rb");
    if (!file) {
        return NULL;
    }
    size_t capacity = 1 << 16;
    char * text = malloc(capacity);
    *size = 0;
    for (size_t n = 1; text && n > 0; *size += n) {
        if (*size == capacity) {
            char * larger = realloc(text, capacity *= 2);
            if (!larger) {
                free(text);
            }
            text = larger;
        }
        n = text ? fread(text + *size, 1, capacity - *size, file) : 0;
    }
    fclose(file);
    return text;
}

static bool show_progress(void * user, enum sfi_phase phase, int32_t done, int32_t total) {
    (void) user;
    fprintf(stderr, "%s %d/%d\n", phase == SFI_PHASE_PREFILL ? "prefill" : "fit of layer", done, total);
    return true;
}

static void print_token(const struct llama_vocab * vocab, llama_token token) {
    char piece[256];
    const int n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
    if (n > 0) {
        fwrite(piece, 1, n, stdout);
    }
}

static int generate(struct sfi * sfi, struct llama_context * lctx, const llama_token * prompt, int32_t n_prompt, int n) {
    const struct llama_vocab * vocab = llama_model_get_vocab(llama_get_model(lctx));
    struct llama_sampler * sampler = llama_sampler_init_greedy();

    int err = sfi_prefill(sfi, 0, prompt, n_prompt, show_progress, NULL);
    for (int i = 0; !err && i < n; ++i) {
        const llama_token token = llama_sampler_sample(sampler, lctx, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        print_token(vocab, token);

        struct sfi_step_info info = { .struct_size = sizeof(info) };
        err = sfi_step(sfi, 0, token, SFI_STEP_AUTO, &info);
        if (!err && info.kind != SFI_STEP_FAST) {
            fprintf(stderr, "step %d: %s (%s), %d cells\n", i, sfi_kind_name(info.kind), sfi_reason_name(info.reason), info.n_cells);
        }
    }
    putchar('\n');
    llama_sampler_free(sampler);
    return err;
}

static void print_stats(const struct sfi * sfi) {
    struct sfi_stats stats = { .struct_size = sizeof(stats) };
    if (sfi_get_stats(sfi, &stats) == SFI_OK) {
        fprintf(stderr, "%lld slow and %lld fast steps, %.2f of the KV read\n", (long long) stats.n_slow, (long long) stats.n_fast,
                stats.kv_dense > 0 ? (double) stats.kv_read/(double) stats.kv_dense : 1.0);
    }
}

static int run(struct llama_model * model, const char * text, size_t size, int n) {
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    llama_token * prompt = malloc((size + 8)*sizeof(llama_token));
    if (!prompt) {
        fprintf(stderr, "out of memory\n");
        return 1;
    }
    const int32_t n_prompt = llama_tokenize(vocab, text, (int32_t) size, prompt, (int32_t) size + 8, true, false);
    if (n_prompt < 1 || n < 0) {
        fprintf(stderr, "%s\n", n < 0 ? "N is negative" : n_prompt < 0 ? "the text is too long to tokenize" : "the text is empty");
        free(prompt);
        return 1;
    }

    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = n_prompt + n;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context * lctx = llama_init_from_model(model, cparams);

    struct sfi * sfi = NULL;
    int err = sfi_attach(lctx, NULL, &sfi);
    if (!err) {
        err = generate(sfi, lctx, prompt, n_prompt, n);
        print_stats(sfi);
    }
    if (err) {
        fprintf(stderr, "%s: %s\n", sfi_status_name(err), sfi_last_error());
    }
    sfi_free(sfi);
    llama_free(lctx);
    free(prompt);
    return err ? 1 : 0;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL.gguf TEXTFILE [N]\n", argv[0]);
        return 2;
    }
    size_t size;
    char * text = read_file(argv[2], &size);
    if (!text) {
        fprintf(stderr, "cannot read %s\n", argv[2]);
        return 1;
    }
    llama_log_set(only_errors, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    const int code = model ? run(model, text, size, argc > 3 ? atoi(argv[3]) : 64) : 1;
    llama_model_free(model);
    free(text);
    return code;
}
