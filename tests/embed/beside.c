/* A text by libsfi in a program that another ggml, llama.cpp or OpenMP is linked to as well: beside MODEL.gguf. `other` is a function of that one. */
#include "sfi.h"

#include <stdio.h>

#ifdef OTHER
extern const char * OTHER(void);
#endif

static void quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level; (void) text; (void) user;
}

int main(int argc, char ** argv) {
#ifdef OTHER
    printf("%s\n", OTHER());
#endif
    sfi_log_set(quiet, NULL);
    struct llama_model * model = argc > 1 ? llama_model_load_from_file(argv[1], llama_model_default_params()) : NULL;
    struct llama_context_params p = llama_context_default_params();
    p.n_ctx           = 512;
    p.n_threads       = p.n_threads_batch = 2;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context * lctx = model ? llama_init_from_model(model, p) : NULL;
    struct llama_sampler * sampler = llama_sampler_init_greedy();
    struct sfi * sfi = NULL;
    int err = sfi_attach(lctx, NULL, &sfi);
    const llama_token prompt[] = { 504, 3575, 282, 4649, 314 };
    err = err ? err : sfi_prefill(sfi, 0, prompt, 5, NULL, NULL);
    for (int i = 0; !err && i < 8; ++i) {
        const llama_token token = llama_sampler_sample(sampler, lctx, -1);
        printf("%d ", token);
        err = sfi_step(sfi, 0, token, SFI_STEP_AUTO, NULL);
    }
    if (err) {
        printf("%s\n", sfi_last_error());
    }
    llama_sampler_free(sampler);
    sfi_free(sfi);
    llama_free(lctx);
    llama_model_free(model);
    return err != 0;
}
