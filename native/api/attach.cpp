// What a context must be like, and how something is attached to it and freed.

#include "context.h"

#include "llama-kv-cache-iswa.h"
#include "llama-path.h"
#include "portable.h"
#include "start.h"

#include <utility>

// ---- graphs --------------------------------------------------------------------------------------------------------------

void forget_graphs(llama_context & lctx) {
    llama_synchronize(&lctx);
    const auto full = lctx.get_memory()->init_full();
    const uint32_t n_seq = lctx.n_seq_max();
    lctx.graph_reserve(n_seq, n_seq, 1, full.get(), true); // resets the others; splits this one, and allocates nothing
}

void destroy(const sfi * s) {
    if (const auto support = s->support.lock()) {
        llama_synchronize(s->lctx);
        support->get_kv().support.reset();
        unwatch_cancel(*s);
    }
    delete s;
}

// ---- what a context must be like -----------------------------------------------------------------------------------------

static bool kv_type_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16: case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_0: return true;
        default: return false;
    }
}

static int check_context(const llama_context & lctx) {
    const auto & cparams = lctx.get_cparams();
    if (cparams.embeddings || !cparams.causal_attn) {
        return fail(SFI_ERR_CONTEXT, "This context computes embeddings; slow-fast decoding generates text. Make one without embeddings.");
    }
    if (!cparams.flash_attn) {
        return fail(SFI_ERR_CONTEXT, "This context stores V transposed; make it with flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED.");
    }
    if (cparams.n_seq_max > 1 && cparams.kv_unified) {
        return fail(SFI_ERR_CONTEXT, "This context keeps %u sequences in one unified KV cache; make it with kv_unified = false.", cparams.n_seq_max);
    }
    return SFI_OK;
}

llama_kv_cache * sparse_cache(llama_memory_t memory, const llama_kv_cache ** kv_swa) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        *kv_swa = iswa->get_swa();
        return iswa->get_base();
    }
    *kv_swa = nullptr;
    return dynamic_cast<llama_kv_cache *>(memory);
}

static int check_cache(const llama_kv_cache * kv) {
    if (!kv || kv->get_layer_ids().empty()) {
        return fail(SFI_ERR_MODEL, "This model keeps its state elsewhere than in a plain KV cache, so no layer can be sparse: use the context without sfi.");
    }
    if (kv->support) {
        return fail(SFI_ERR_ARGUMENT, "Something is attached to this context already; free it with sfi_free() first.");
    }
    for (const ggml_type type : { kv->type_k(), kv->type_v() }) {
        if (!kv_type_supported(type)) {
            return fail(SFI_ERR_KV_TYPE, "There is no sparse-attention kernel for KV type %s; use f32, f16, bf16, q8_0 or q4_0.", ggml_type_name(type));
        }
    }
    return SFI_OK;
}

// Says what a layer's device lacks, and what does without.
static int lacks_operations(const llama_support & support, int32_t il, const llama_support_params & p) {
    ggml_backend_dev_t dev = llama_path_device(support.get_kv().get_k_storage(il)->buffer);
    const std::string & lacks = support.layer(il).lacks;
    const std::string what = lacks.empty() ? "" : " (" + lacks + ")";
    llama_support_params frozen = p;
    frozen.policy = LLAMA_SUPPORT_FROZEN;
    frozen.selector.kind = GGML_SUPPORT_SELECTOR_TOPK;
    const char * remedy = "use the context without sfi";
    if (!llama_portable_has(p) && support.path_of(il, frozen) != LLAMA_PATH_NONE) {
        remedy = "use policy frozen with selector topk, which works there";
    } else if (support.has_path_with_f16(il)) {
        remedy = "use f16 for K and V (type_k, type_v), which works there";
    } else if (const int64_t n = support.most_cells(il)) {
        return fail(SFI_ERR_BACKEND, "Layer %d lives on %s, whose operations%s cannot have a sequence of %u cells: make the context of %lld "
                "cells or less for each sequence.", il, dev ? ggml_backend_dev_name(dev) : "a device without a name", what.c_str(),
                support.get_kv().get_size(), (long long) n);
    }
    return fail(SFI_ERR_BACKEND, "Layer %d lives on %s, which lacks operations%s that these parameters need: %s, or keep the model on the "
            "CPU (n_gpu_layers = 0).", il, dev ? ggml_backend_dev_name(dev) : "a device without a name", what.c_str(), remedy);
}

static int check_layers(const llama_support & support, const llama_support_params & p) {
    const auto & layers = support.get_layers();
    bool any = false;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (!support.is_sparse(il)) {
            continue;
        }
        any = true;
        if (support.layer(il).path == LLAMA_PATH_NONE) {
            return lacks_operations(support, il, p);
        }
    }
    if (!any) {
        return fail(SFI_ERR_MODEL, "No layer of this model can be sparse: layer 0 %s. Use the context without sfi.",
                layers.empty() ? "does not exist" : layers[0].why.c_str());
    }
    return SFI_OK;
}

// ---- attaching -----------------------------------------------------------------------------------------------------------

static std::vector<slowfast::token_class> classify_tokens(const llama_vocab * vocab) {
    std::vector<slowfast::token_class> classes(llama_vocab_n_tokens(vocab));
    std::string piece(256, '\0');
    for (llama_token id = 0; id < (llama_token) classes.size(); ++id) {
        const int32_t n = llama_token_to_piece(vocab, id, piece.data(), (int32_t) piece.size(), 0, false);
        if (n > 0) {
            classes[id] = slowfast::classify(piece.substr(0, n));
        }
    }
    return classes;
}

static slowfast::schedule schedule_of(const sfi_settings & s) {
    slowfast::schedule out;
    out.auto_depth    = auto_depth(s.params);
    out.max_span      = s.params.max_span;
    out.min_span      = s.research.min_span;
    out.boundary      = s.params.boundary;
    return out;
}

// Gives the cache a support with these settings.
static int install(sfi & s, llama_kv_cache * kv, const sfi_settings & settings) {
    const auto & model = s.lctx->get_model();
    const auto   sp    = support_params(settings);
    auto support = std::make_shared<llama_support>(kv, s.kv_swa, model, sp);
    if (const int err = check_layers(*support, sp)) {
        return err;
    }
    if (settings.params.boundary && s.tokens.empty()) {
        s.tokens = classify_tokens(llama_model_get_vocab(&model)); // a quarter of a million for some models
    }
    s.support  = support;
    s.settings = settings;
    s.schedule = schedule_of(settings);
    kv->support = support;
    forget_graphs(*s.lctx);
    const std::lock_guard<std::mutex> lock(s.meter);
    s.memory = support->memory();
    return SFI_OK;
}

static int attach(llama_context * lctx, const sfi_params * params, std::unique_ptr<sfi> & out) {
    sfi_settings settings;
    if (const int err = read_settings(params, settings)) {
        return err;
    }
    if (const int err = check_context(*lctx)) {
        return err;
    }
    auto s = std::make_unique<sfi>();
    llama_kv_cache * kv = sparse_cache(lctx->get_memory(), &s->kv_swa);
    if (const int err = check_cache(kv)) {
        return err;
    }
    s->lctx    = lctx;
    s->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&lctx->get_model()));
    s->histories.resize(kv->get_n_stream());
    if (const int err = install(*s, kv, settings)) {
        return err;
    }
    out = std::move(s);
    return SFI_OK;
}

// A context is missing where llama_init_from_model() failed: for lack of memory, say, or of kernels for this CPU.
static int no_context(const llama_context * lctx) {
    if (lctx) {
        return fail(SFI_ERR_ARGUMENT, "out is NULL.");
    }
    const int err = check_cpu();
    return err ? err : fail(SFI_ERR_ARGUMENT, "lctx is NULL: no context was made, and llama.cpp's log (sfi_log_set()) says why.");
}

int sfi_attach(struct llama_context * lctx, const struct sfi_params * params, struct sfi ** out) {
    if (!lctx || !out) {
        return no_context(lctx);
    }
    *out = nullptr;
    return no_throw([&] {
        std::unique_ptr<sfi> s;
        const int err = attach(lctx, params, s);
        *out = s.release();
        return err;
    });
}

void sfi_free(struct sfi * s) {
    if (!s) {
        return;
    }
    for (;;) {
        int state = SFI_IDLE;
        if (s->state.compare_exchange_strong(state, SFI_INSIDE)) {
            destroy(s);
            return;
        }
        if (state == SFI_INSIDE_FREED || s->state.compare_exchange_strong(state, SFI_INSIDE_FREED)) {
            return;
        }
    }
}

int sfi_set_params(struct sfi * s, const struct sfi_params * params) {
    return guarded(s, [&](llama_support & support) { // which stays alive until guarded() returns
        sfi_settings settings;
        if (const int err = read_settings(params, settings)) {
            return err;
        }
        return install(*s, &support.get_kv(), settings);
    });
}
