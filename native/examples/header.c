/* The example of sfi.h, as a program: sfi-example-header MODEL.gguf TEXT [N]. tests/build/test_package.py compares the two. */
#include "sfi.h"
#include <stdio.h>

static int generate(struct llama_context * lctx, struct llama_sampler * sampler, const llama_token * prompt, int n_prompt, int n) {
    struct sfi * sfi = NULL;
    int err = sfi_attach(lctx, NULL, &sfi);                            // NULL: the defaults
    if (!err) {
        err = sfi_prefill(sfi, 0, prompt, n_prompt, NULL, NULL);       // the logits of the last token are ready
    }
    for (int i = 0; i < n && !err; ++i) {
        const llama_token token = llama_sampler_sample(sampler, lctx, -1);
        if (llama_vocab_is_eog(llama_model_get_vocab(llama_get_model(lctx)), token)) {
            break;
        }
        printf("%d\n", token);
        err = sfi_step(sfi, 0, token, SFI_STEP_AUTO, NULL);            // the logits of the next token are ready
    }
    if (err) {
        fprintf(stderr, "%s: %s\n", sfi_status_name(err), sfi_last_error());
    }
    sfi_free(sfi);
    return err;
}

/* ---- what the header leaves to llama.h ------------------------------------------------------------------------------- */

#include <stdlib.h>
#include <string.h>

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL.gguf TEXT [N]\n", argv[0]);
        return 2;
    }
    const int n = argc > 3 ? atoi(argv[3]) : 32;
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    const int size = (int) strlen(argv[2]);
    llama_token * prompt = malloc((size + 8)*sizeof(llama_token));
    const int n_prompt = prompt ? llama_tokenize(llama_model_get_vocab(model), argv[2], size, prompt, size + 8, true, false) : 0;

    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = (n_prompt > 0 && n > 0 ? n_prompt + n : 0) + 8;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context * lctx    = llama_init_from_model(model, cparams);
    struct llama_sampler * sampler = llama_sampler_init_greedy();
    const int err = generate(lctx, sampler, prompt, n_prompt, n);

    llama_sampler_free(sampler);
    llama_free(lctx);
    llama_model_free(model);
    free(prompt);
    return err ? 1 : 0;
}
