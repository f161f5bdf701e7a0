// What an embedder meets: an exception inside llama_decode(). Prints every failure; exit code 1 if there was one. usage: sfi-test-embed MODEL.gguf

#include "sfi.h"

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

static int failures = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAILED: %s\n", what.c_str());
        ++failures;
    }
}

static bool throwing = false;

static bool on_node(ggml_tensor *, bool, void *) {
    if (throwing) {
        throw std::runtime_error("thrown by a test");
    }
    return false;
}

static llama_context * new_context(llama_model * model) {
    llama_context_params p = llama_context_default_params();
    p.n_ctx           = 1024;
    p.n_batch         = 512;
    p.n_ubatch        = 64;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    p.cb_eval         = on_node;
    return llama_init_from_model(model, p);
}

// The first of several ubatches throws: the others were announced, and must not be what the caller decodes next.
static void test_an_exception_ends_the_announcement(llama_context * lctx) {
    sfi * s = nullptr;
    check(sfi_attach(lctx, nullptr, &s) == SFI_OK, "attach");
    std::vector<llama_token> tokens(200);
    for (size_t i = 0; i < tokens.size(); ++i) {
        tokens[i] = (llama_token) (i*7 % 200);
    }
    check(sfi_prefill(s, 0, tokens.data(), (int32_t) tokens.size(), nullptr, nullptr) == SFI_OK, "prefill");
    sfi_step_kind kind;
    sfi_reason reason;
    check(sfi_peek(s, 0, 5, &kind, &reason) == SFI_OK && kind == SFI_STEP_FAST, "a fast step would follow");

    throwing = true;
    const int err = sfi_prefill(s, 0, tokens.data(), (int32_t) tokens.size(), nullptr, nullptr);
    throwing = false;
    check(err == SFI_ERR_DECODE && std::string(sfi_last_error()).find("thrown by a test") != std::string::npos, sfi_last_error());
    check(sfi_peek(s, 0, 5, &kind, &reason) == SFI_OK && kind == SFI_STEP_SLOW && reason == SFI_REASON_INVALIDATED, "the support is invalid");
    sfi_step_info info = {};
    info.struct_size = sizeof(info);
    check(sfi_step(s, 0, 5, SFI_STEP_AUTO, &info) == SFI_OK && info.kind == SFI_STEP_SLOW, sfi_last_error());
    check(sfi_step(s, 0, 6, SFI_STEP_AUTO, &info) == SFI_OK && info.kind == SFI_STEP_FAST, sfi_last_error());
    sfi_free(s);
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context * lctx = model ? new_context(model) : nullptr;
    check(lctx, "the model cannot be loaded");
    if (lctx) {
        test_an_exception_ends_the_announcement(lctx);
        llama_free(lctx);
    }
    llama_model_free(model);
    return failures > 0;
}
