// What a context will take, by making one that allocates nothing.

#include "context.h"
#include "grown.h"

#include <algorithm>

// While it lives, contexts of the model plan their memory and have none.
class planning {
public:
    explicit planning(llama_model & model) : flag(model.hparams.no_alloc), before(flag) { flag = true; }
    ~planning() { flag = before; }
private:
    bool &     flag;
    const bool before;
};

struct free_sfi     { void operator()(sfi * s)           const { sfi_free(s); } };
struct free_context { void operator()(llama_context * c) const { llama_free(c); } };

// Of each backend, for the largest batch: what the context itself reserves.
static std::vector<size_t> compute_bytes(llama_context & lctx) {
    std::vector<size_t> sizes(ggml_backend_sched_get_n_backends(lctx.get_sched()), 0);
    const uint32_t n_tokens = std::min(lctx.n_ctx(), lctx.n_ubatch());
    const auto full = lctx.get_memory()->init_full();
    lctx.graph_reserve(n_tokens, lctx.n_seq_max(), std::min(n_tokens, lctx.get_cparams().n_outputs_max), full.get(), true, sizes.data());
    return sizes;
}

static int plan(llama_model & model, const llama_context_params & cparams, const sfi_params * params, sfi_bytes & out) {
    const planning only(model);
    const std::unique_ptr<llama_context, free_context> lctx(llama_init_from_model(&model, cparams));
    if (!lctx) {
        return fail(SFI_ERR_CONTEXT, "llama.cpp makes no context of these parameters; its log says why.");
    }
    sfi * attached = nullptr;
    if (const int err = sfi_attach(lctx.get(), params, &attached)) {
        return err;
    }
    const std::unique_ptr<sfi, free_sfi> s(attached);
    out.sfi = sfi_memory(attached);
    for (const auto & [type, size] : lctx->get_memory()->memory_breakdown()) {
        out.kv += size;
    }
    for (const size_t size : compute_bytes(*lctx)) {
        out.compute += size;
    }
    return SFI_OK;
}

int sfi_context_bytes(struct llama_model * model, const struct llama_context_params * cparams, const struct sfi_params * params, struct sfi_bytes * bytes) {
    if (!model || !cparams) {
        return fail(SFI_ERR_ARGUMENT, "%s is NULL.", !model ? "model" : "cparams");
    }
    if (const int err = check_struct(bytes, "bytes")) {
        return err;
    }
    return no_throw([&] {
        sfi_bytes out = {};
        const int err = plan(*model, *cparams, params, out);
        if (!err) {
            give(bytes, out);
        }
        return err;
    });
}
