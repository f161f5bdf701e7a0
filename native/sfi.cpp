// The C API: validates, picks the kind of each step, and hands it to llama_decode().

#include "sfi.h"

#include "boundary.h"
#include "schedule.h"
#include "sfi-source-id.h"
#include "tail.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"
#include "llama-portable.h"
#include "llama-support.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

struct sfi {
    llama_context              * lctx = nullptr;
    std::weak_ptr<llama_support> support;      // gone when the KV cache is
    const llama_kv_cache       * kv_swa = nullptr;
    sfi_params                   params;
    std::vector<slowfast::token_class>       tokens;    // by token id
    std::vector<slowfast::tail>  tails;        // by stream
    std::vector<float>           tail_mass;    // by stream, of the last fast step
    sfi_stats                    stats = {};
    mutable std::atomic<int>     state{0};     // of enum below
};

enum { SFI_IDLE, SFI_INSIDE, SFI_INSIDE_FREED }; // freed while a thread is inside: the last one out deletes

// ---- errors --------------------------------------------------------------------------------------------------------------

static std::string & last_error() {
    static thread_local std::string text;
    return text;
}

static int fail(int status, const char * format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    last_error() = text;
    return status;
}

const char * sfi_last_error(void) {
    return last_error().c_str();
}

const char * sfi_status_name(int status) {
    switch (status) {
        case SFI_OK:             return "SFI_OK";
        case SFI_ERR_ARGUMENT:   return "SFI_ERR_ARGUMENT";
        case SFI_ERR_MODEL:      return "SFI_ERR_MODEL";
        case SFI_ERR_CONTEXT:    return "SFI_ERR_CONTEXT";
        case SFI_ERR_KV_TYPE:    return "SFI_ERR_KV_TYPE";
        case SFI_ERR_BACKEND:    return "SFI_ERR_BACKEND";
        case SFI_ERR_FULL:       return "SFI_ERR_FULL";
        case SFI_ERR_MEMORY:     return "SFI_ERR_MEMORY";
        case SFI_ERR_DECODE:     return "SFI_ERR_DECODE";
        case SFI_ERR_ABORTED:    return "SFI_ERR_ABORTED";
        case SFI_ERR_NO_SUPPORT: return "SFI_ERR_NO_SUPPORT";
        case SFI_ERR_BUSY:       return "SFI_ERR_BUSY";
        case SFI_ERR_DETACHED:   return "SFI_ERR_DETACHED";
        default:                 return "unknown status";
    }
}

const char * sfi_kind_name(enum sfi_step_kind kind) {
    switch (kind) {
        case SFI_STEP_AUTO:  return "auto";
        case SFI_STEP_SLOW:  return "slow";
        case SFI_STEP_FAST:  return "fast";
        case SFI_STEP_DENSE: return "dense";
    }
    return "unknown";
}

const char * sfi_reason_name(enum sfi_reason reason) {
    switch (reason) {
        case SFI_REASON_NONE:        return "none";
        case SFI_REASON_FIRST:       return "first";
        case SFI_REASON_BOUNDARY:    return "boundary";
        case SFI_REASON_MAX_SPAN:    return "max_span";
        case SFI_REASON_UNSTABLE:    return "unstable";
        case SFI_REASON_INVALIDATED: return "invalidated";
        case SFI_REASON_FORCED:      return "forced";
        case SFI_REASON_SHORT:       return "short";
        case SFI_REASON_VERIFY:      return "verify";
        case SFI_REASON_COUNT:       break;
    }
    return "unknown";
}

const char * sfi_path_name(enum sfi_path path) {
    switch (path) {
        case SFI_PATH_NONE:     return "none";
        case SFI_PATH_NATIVE:   return "native";
        case SFI_PATH_PORTABLE: return "portable";
    }
    return "unknown";
}

const char * sfi_source_id(void) {
    return SFI_SOURCE_ID;
}

// The next graph of the context is built anew: one that was built for another support, or for none, does not fit, and it keeps
// that support alive, as its inputs do.
static void forget_graphs(llama_context & lctx) {
    llama_synchronize(&lctx);
    const auto full = lctx.get_memory()->init_full();
    const uint32_t n_seq = lctx.n_seq_max();
    lctx.graph_reserve(n_seq, n_seq, 1, full.get(), true); // resets the others; splits this one, and allocates nothing
}

static void destroy(const sfi * s) {
    if (const auto support = s->support.lock()) {
        support->get_kv()->support.reset();
        try {
            forget_graphs(*s->lctx);
        } catch (const std::exception &) { // out of memory; the next graph gives back what this one was to
        }
    }
    delete s;
}

// Entry into a context: one thread at a time, and only while its KV cache lives. No exception leaves the library.
template <class F>
static int guarded(const sfi * s, F && f) {
    if (!s) {
        return fail(SFI_ERR_ARGUMENT, "The sfi context is NULL.");
    }
    int idle = SFI_IDLE;
    if (!s->state.compare_exchange_strong(idle, SFI_INSIDE)) {
        return fail(SFI_ERR_BUSY, "Another thread is inside this context; give each thread its own, or take turns.");
    }
    struct leave {
        const sfi * s;
        ~leave() {
            int inside = SFI_INSIDE;
            if (!s->state.compare_exchange_strong(inside, SFI_IDLE)) {
                destroy(s);
            }
        }
    } on_exit{s};

    const std::shared_ptr<llama_support> support = s->support.lock();
    if (!support) {
        return fail(SFI_ERR_DETACHED, "The llama_context that this was attached to has been freed.");
    }
    try {
        support->notice_edits();
        return f(*support);
    } catch (const std::bad_alloc &) {
        return fail(SFI_ERR_MEMORY, "Out of memory; use a smaller context or a smaller KV type.");
    } catch (const std::exception & e) {
        return fail(SFI_ERR_DECODE, "llama.cpp failed: %s", e.what());
    }
}

// ---- parameters ----------------------------------------------------------------------------------------------------------

// Do slow steps choose what fast steps attend to? Else each fast step does: few cells are enough then, and a slow step
// renews nothing.
static bool refreshes(sfi_policy policy) {
    return policy == SFI_POLICY_FROZEN || policy == SFI_POLICY_WINDOW;
}

struct sfi_params sfi_default_params(void) {
    return sfi_policy_params(SFI_POLICY_SKETCH);
}

struct sfi_params sfi_policy_params(enum sfi_policy policy) {
    const bool follows = !refreshes(policy);
    sfi_params p = {};
    p.struct_size = sizeof(p);
    p.policy      = policy;
    p.selector    = SFI_SELECTOR_TOPK;
    p.n_sink      = 4;
    p.n_recent    = follows ? 32 : 256;
    p.pinned      = true;
    p.n_selected  = policy == SFI_POLICY_SKETCH ? 1024 : follows ? 256 : 2048;
    p.tolerance   = 3e-4f;
    p.second_look = 0.5f;
    p.max_span    = follows ? 0 : 32;
    p.min_span    = 16;
    p.boundary    = !follows;
    p.repair      = false;
    p.auto_depth  = 0;
    p.n_queries   = 16;
    p.n_slow_queries = 1;
    p.pool_after  = 16;
    p.pool_before = 2;
    // the authors' code; the paper gives lambda_clip 0.02, a_soft 0.5, a_cross 0.35 and no others
    p.alpha       = 0.5f;
    p.gamma       = 0.5f;
    p.beta        = 0.568f;
    p.p           = 1.8f;
    p.eta         = 0.4f;
    p.lambda_clip = 0.02f;
    p.a_soft      = 0.5f;
    p.a_cross     = 0.35f;
    p.temperature = 2.0f;
    p.nms_radius  = 16;
    return p;
}

static int check_range(const char * name, int32_t value, int32_t min, int32_t max) {
    if (value < min || value > max) {
        return fail(SFI_ERR_ARGUMENT, "%s is %d, but must be from %d to %d.", name, value, min, max);
    }
    return SFI_OK;
}

static int check_params(const sfi_params & p) {
    if (p.struct_size != sizeof(sfi_params)) {
        return fail(SFI_ERR_ARGUMENT, "struct sfi_params has another size than this library's; fill it with "
                "sfi_default_params() and build against this library's sfi.h (source id %s).", SFI_SOURCE_ID);
    }
    const int32_t many = 1 << 24;
    const struct { const char * name; int32_t value, min, max; } ranges[] = {
        { "policy",      p.policy,      SFI_POLICY_FROZEN, SFI_POLICY_ORACLE },
        { "selector",    p.selector,    SFI_SELECTOR_TOPK, SFI_SELECTOR_PAPER },
        { "n_sink",      p.n_sink,      0, many },
        { "n_queries",   p.n_queries,   1, 64 },
        { "n_slow_queries", p.n_slow_queries, 1, 64 },
        { "n_recent",    p.n_recent,    p.policy == SFI_POLICY_FROZEN ? p.n_queries : 1, many },
        { "n_selected",  p.n_selected,  1, many },
        { "max_span",    p.max_span,    refreshes(p.policy), many },
        { "min_span",    p.min_span,    0, many },
        { "auto_depth",  p.auto_depth,  0, INT32_MAX },
        { "pool_after",  p.pool_after,  0, 4096 },
        { "pool_before", p.pool_before, 0, 4096 },
        { "nms_radius",  p.nms_radius,  0, 4096 },
        { "sketch_k4",   p.sketch_k4,   0, 512 },
        { "sketch_k2",   p.sketch_k2,   0, 512 },
        { "sketch_k1",   p.sketch_k1,   0, 512 },
        { "sketch_v4",   p.sketch_v4,   0, 512 },
        { "sketch_v2",   p.sketch_v2,   0, 512 },
        { "sketch_first", p.sketch_first, 0, 64 },
    };
    for (const auto & r : ranges) {
        if (const int err = check_range(r.name, r.value, r.min, r.max)) {
            return err;
        }
    }
    if (p.sketch_k4 % 4 || p.sketch_k2 % 4 || p.sketch_k1 % 4 || (4*p.sketch_k4 + 2*p.sketch_k2 + p.sketch_k1) % 32) {
        return fail(SFI_ERR_ARGUMENT, "sketch_k4, sketch_k2 and sketch_k1 must be multiples of 4, and their bits together a multiple of 32.");
    }
    if (p.sketch_first > 0 && 32*p.sketch_first >= 4*p.sketch_k4 + 2*p.sketch_k2 + p.sketch_k1) {
        return fail(SFI_ERR_ARGUMENT, "sketch_first must be less than the bits of sketch_k4, sketch_k2 and sketch_k1 over 32.");
    }
    if (p.sketch_v4 % 16 || p.sketch_v2 % 16) {
        return fail(SFI_ERR_ARGUMENT, "sketch_v4 and sketch_v2 must be multiples of 16.");
    }
    const struct { const char * name; float value; } constants[] = {
        { "alpha", p.alpha }, { "gamma", p.gamma }, { "beta", p.beta }, { "p", p.p }, { "eta", p.eta },
        { "lambda_clip", p.lambda_clip }, { "a_soft", p.a_soft }, { "a_cross", p.a_cross }, { "temperature", p.temperature }, { "tolerance", p.tolerance },
        { "max_tail_mass", p.max_tail_mass }, { "second_look", p.second_look },
    };
    for (const auto & c : constants) {
        if (!std::isfinite(c.value)) {
            return fail(SFI_ERR_ARGUMENT, "%s is not a finite number.", c.name);
        }
    }
    if (!(p.alpha > 0.0f) || !(p.temperature > 0.0f) || !(p.lambda_clip >= 0.0f && p.lambda_clip <= 1.0f)) {
        return fail(SFI_ERR_ARGUMENT, "alpha and temperature must be above 0, lambda_clip from 0 to 1.");
    }
    if (p.tolerance < 0.0f || p.max_tail_mass < 0.0f || p.second_look < 0.0f) {
        return fail(SFI_ERR_ARGUMENT, "tolerance, max_tail_mass and second_look must be 0 or more.");
    }
    return SFI_OK;
}

static constexpr int32_t sketch_batch   = 32; // cells that leave the window, and get their codes, at once
static constexpr int32_t sketch_queries = 64; // the basis is fitted to the last ones

static llama_support_policy support_policy(sfi_policy policy) {
    switch (policy) {
        case SFI_POLICY_WINDOW: return LLAMA_SUPPORT_WINDOW;
        case SFI_POLICY_SKETCH: return LLAMA_SUPPORT_SKETCH;
        case SFI_POLICY_ORACLE: return LLAMA_SUPPORT_ORACLE;
        default:                return LLAMA_SUPPORT_FROZEN;
    }
}

static llama_support_params support_params(const sfi_params & p) {
    const bool paper = p.selector == SFI_SELECTOR_PAPER;
    llama_support_params sp;
    const bool sketch = p.policy == SFI_POLICY_SKETCH;
    sp.policy     = support_policy(p.policy);
    sp.n_sink     = p.n_sink;
    sp.n_recent   = p.n_recent;
    sp.n_selected = p.n_selected;
    sp.n_grow     = sketch ? sketch_batch : p.max_span;
    sp.pinned     = p.pinned || sketch;
    sp.n_queries  = sketch ? sketch_queries : p.n_queries;
    sp.tolerance  = p.tolerance;
    sp.second_look = p.second_look;
    sp.format     = { p.sketch_k4, p.sketch_k2, p.sketch_k1, p.sketch_v4, p.sketch_v2, p.sketch_first };
    sp.n_slow_evidence = paper ? 1 : std::min(p.n_slow_queries, p.n_queries);
    sp.n_evidence = paper ? 1 : p.n_queries; // the paper: the slow step's query alone
    sp.selector.kind        = p.selector == SFI_SELECTOR_PAPER ? GGML_SUPPORT_SELECTOR_PAPER : GGML_SUPPORT_SELECTOR_TOPK;
    sp.selector.pool_after  = p.pool_after;
    sp.selector.pool_before = p.pool_before;
    sp.selector.nms_radius  = p.nms_radius;
    sp.selector.alpha       = p.alpha;
    sp.selector.gamma       = p.gamma;
    sp.selector.beta        = p.beta;
    sp.selector.p           = p.p;
    sp.selector.eta         = p.eta;
    sp.selector.lambda_clip = p.lambda_clip;
    sp.selector.a_soft      = p.a_soft;
    sp.selector.a_cross     = p.a_cross;
    sp.selector.temperature = p.temperature;
    return sp;
}

int sfi_get_params(const struct sfi * s, struct sfi_params * params) {
    return guarded(s, [&](llama_support &) {
        if (!params) {
            return fail(SFI_ERR_ARGUMENT, "params is NULL.");
        }
        *params = s->params;
        return (int) SFI_OK;
    });
}

// ---- attach --------------------------------------------------------------------------------------------------------------

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

// The KV cache whose layers can be sparse; null if the model keeps its state elsewhere.
static llama_kv_cache * sparse_cache(llama_memory_t memory, const llama_kv_cache ** kv_swa) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        *kv_swa = iswa->get_swa();
        return iswa->get_base();
    }
    *kv_swa = nullptr;
    return dynamic_cast<llama_kv_cache *>(memory);
}

// Says what a layer's device lacks, and what does without.
static int lacks_operations(const llama_support & support, const llama_model & model, int32_t il, const llama_support_params & p) {
    ggml_backend_dev_t dev = llama_path_device(support.get_kv()->get_k_storage(il)->buffer);
    const std::string & lacks = support.layer(il).lacks;
    const std::string what = lacks.empty() ? "" : " (" + lacks + ")";
    llama_support_params frozen = p;
    frozen.policy = LLAMA_SUPPORT_FROZEN;
    frozen.selector.kind = GGML_SUPPORT_SELECTOR_TOPK;
    const char * remedy = "use mode stock";
    if (!llama_portable_has(p) && support.path_of(model, il, frozen) != LLAMA_PATH_NONE) {
        remedy = "use policy frozen with selector topk (--policy frozen), which works there";
    } else if (support.has_path_with_f16(model, il)) {
        remedy = "use KV type f16 (--kv-type f16), which works there";
    }
    return fail(SFI_ERR_BACKEND, "Layer %d lives on %s, which lacks operations%s that these settings need: %s, or keep the model on the "
            "CPU (n_gpu_layers = 0).", il, dev ? ggml_backend_dev_name(dev) : "a device without a name", what.c_str(), remedy);
}

static int check_layers(const llama_support & support, const llama_model & model, const llama_support_params & p) {
    const auto & layers = support.get_layers();
    bool any = false;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        if (!support.is_sparse(il)) {
            continue;
        }
        any = true;
        if (support.layer(il).path == LLAMA_PATH_NONE) {
            return lacks_operations(support, model, il, p);
        }
    }
    if (!any) {
        return fail(SFI_ERR_MODEL, "No layer of this model can be sparse: layer 0 %s. Use mode stock.",
                layers.empty() ? "does not exist" : layers[0].why.c_str());
    }
    return SFI_OK;
}

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

static int attach(llama_context * lctx, const sfi_params & params, std::unique_ptr<sfi> & out) {
    if (const int err = check_params(params)) {
        return err;
    }
    if (const int err = check_context(*lctx)) {
        return err;
    }
    const llama_kv_cache * kv_swa = nullptr;
    llama_kv_cache * kv = sparse_cache(lctx->get_memory(), &kv_swa);
    if (!kv || kv->get_layer_ids().empty()) {
        return fail(SFI_ERR_MODEL, "This model keeps its state elsewhere than in a plain KV cache, so no layer can be sparse. Use mode stock.");
    }
    if (kv->support) {
        return fail(SFI_ERR_ARGUMENT, "Something is attached to this context already; free it with sfi_free() first.");
    }
    for (const ggml_type type : { kv->type_k(), kv->type_v() }) {
        if (!kv_type_supported(type)) {
            return fail(SFI_ERR_KV_TYPE, "There is no sparse-attention kernel for KV type %s; use f32, f16, bf16, q8_0 or q4_0.", ggml_type_name(type));
        }
    }
    const auto & model = lctx->get_model();
    const auto   sp    = support_params(params);
    auto support = std::make_shared<llama_support>(kv, model, sp);
    if (const int err = check_layers(*support, model, sp)) {
        return err;
    }
    auto s = std::make_unique<sfi>();
    s->lctx    = lctx;
    s->support = support;
    s->kv_swa  = kv_swa;
    s->params  = params;
    s->tokens  = classify_tokens(llama_model_get_vocab(&model));
    s->tails.resize(kv->get_n_stream());
    s->tail_mass.resize(kv->get_n_stream());
    kv->support = std::move(support);
    forget_graphs(*lctx);
    out = std::move(s);
    return SFI_OK;
}

int sfi_attach(struct llama_context * lctx, const struct sfi_params * params, struct sfi ** out) {
    if (!lctx || !params || !out) {
        return fail(SFI_ERR_ARGUMENT, "%s is NULL.", !lctx ? "lctx" : !params ? "params" : "out");
    }
    *out = nullptr;
    try {
        std::unique_ptr<sfi> s;
        const int err = attach(lctx, *params, s);
        *out = s.release();
        return err;
    } catch (const std::bad_alloc &) {
        return fail(SFI_ERR_MEMORY, "There is not enough memory for the support of this context; use a smaller n_selected or fewer sequences.");
    } catch (const std::exception & e) {
        return fail(SFI_ERR_CONTEXT, "Could not attach: %s", e.what());
    }
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
    return guarded(s, [&](llama_support & support) {
        if (!params) {
            return fail(SFI_ERR_ARGUMENT, "params is NULL.");
        }
        if (const int err = check_params(*params)) {
            return err;
        }
        llama_kv_cache * kv = support.get_kv();
        const auto & model = s->lctx->get_model();
        const auto   sp    = support_params(*params);
        auto fresh = std::make_shared<llama_support>(kv, model, sp);
        if (const int err = check_layers(*fresh, model, sp)) {
            return err;
        }
        s->support  = fresh;
        s->params   = *params;
        kv->support = std::move(fresh); // `support` stays alive until guarded() returns
        forget_graphs(*s->lctx);
        return (int) SFI_OK;
    });
}

// ---- steps ---------------------------------------------------------------------------------------------------------------

static int check_seq(const llama_support & support, llama_seq_id seq) {
    const uint32_t n = support.get_kv()->get_n_stream();
    if (seq < 0 || (uint32_t) seq >= n) {
        return fail(SFI_ERR_ARGUMENT, "Sequence %d does not exist; this context has sequences 0 to %u.", seq, n - 1);
    }
    return SFI_OK;
}

static int check_tokens(const sfi * s, const llama_token * tokens, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= (llama_token) s->tokens.size()) {
            return fail(SFI_ERR_ARGUMENT, "Token %d is not in the vocabulary (0 to %zu).", tokens[i], s->tokens.size() - 1);
        }
    }
    return SFI_OK;
}

static int check_room(const llama_support & support, llama_seq_id seq, int32_t n) {
    const int32_t depth = support.depth(seq), size = (int32_t) support.get_kv()->get_size();
    if (n > size - depth) {
        return fail(SFI_ERR_FULL, "%d tokens do not fit: the context has %d cells and %d are in use. Make it larger, or remove some.", n, size, depth);
    }
    return SFI_OK;
}

static slowfast::decision decide(const sfi * s, const llama_support & support, llama_seq_id seq, llama_token token, sfi_step_kind asked) {
    slowfast::schedule_input in;
    in.depth       = support.depth(seq);
    in.span        = support.span(seq);
    in.valid       = support.valid(seq);
    in.edited      = support.was_edited(seq);
    in.window_full = support.window_full(seq);
    in.tail_mass   = s->tail_mass[seq];
    in.boundary    = s->tails[seq].peek(s->tokens[token]);
    return slowfast::decide(s->params, in, asked);
}

static int sketch_failed() {
    return fail(SFI_ERR_DECODE, "The codes of the sketch could not be computed; llama.cpp's log says why.");
}

static int decode_status(int ret) {
    switch (ret) {
        case 0:  return SFI_OK;
        case 1:  return fail(SFI_ERR_FULL, "The KV cache has no free cell; make the context larger.");
        case 2:  return fail(SFI_ERR_ABORTED, "Stopped by the abort callback.");
        default: return fail(SFI_ERR_DECODE, "llama_decode() failed with code %d; its log says why.", ret);
    }
}

// One llama_decode() of tokens at the end of a sequence; the logits of the last n_logits of them are kept.
static int decode(sfi * s, llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n,
                  llama_support_kind kind, bool refresh, int32_t n_logits) {
    std::unique_ptr<llama_batch, void (*)(llama_batch *)> batch(new llama_batch(llama_batch_init(n, 0, 1)),
            [](llama_batch * b) { llama_batch_free(*b); delete b; });
    const llama_pos pos = llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq) + 1;
    batch->n_tokens = n;
    for (int32_t i = 0; i < n; ++i) {
        batch->token[i]     = tokens[i];
        batch->pos[i]       = pos + i;
        batch->n_seq_id[i]  = 1;
        batch->seq_id[i][0] = seq;
        batch->logits[i]    = i >= n - n_logits;
    }
    support.announce(seq, kind, n, refresh);
    const int ret = llama_decode(s->lctx, *batch);
    llama_synchronize(s->lctx);
    support.finish(ret == 0);
    if (ret == 0 && refresh && !support.refresh_portable(*s->lctx, seq, kind == LLAMA_SUPPORT_SLOW)) {
        return fail(SFI_ERR_DECODE, "The support could not be chosen; llama.cpp's log says why.");
    }
    if (ret == 0 && refresh && !support.update_sketch(*s->lctx, seq)) {
        return sketch_failed();
    }
    return decode_status(ret);
}

int sfi_prefill(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, sfi_progress_fn progress, void * user) {
    return guarded(s, [&](llama_support & support) {
        if (!tokens || n < 1) {
            return fail(SFI_ERR_ARGUMENT, "There are no tokens to prefill.");
        }
        for (const int err : { check_seq(support, seq), check_tokens(s, tokens, n) }) {
            if (err) {
                return err;
            }
        }
        if (const int err = check_room(support, seq, n)) {
            return err;
        }
        const int32_t n_batch = (int32_t) llama_n_batch(s->lctx);
        const bool    refresh = support.depth(seq) + n >= s->params.auto_depth;
        const int64_t start   = ggml_time_us();
        for (int32_t i = 0; i < n; i += n_batch) {
            const int32_t m    = std::min(n_batch, n - i);
            const bool    last = i + m == n;
            if (const int err = decode(s, support, seq, tokens + i, m, LLAMA_SUPPORT_PREFILL, refresh && last, last)) {
                return err;
            }
            s->stats.n_prefill += m;
            if (progress && !progress(user, i + m, n) && !last) {
                return fail(SFI_ERR_ABORTED, "Prefill was stopped after %d of %d tokens; they stay in the cache.", i + m, n);
            }
        }
        s->stats.us_prefill += ggml_time_us() - start;
        s->tails[seq].clear();
        for (int32_t i = std::max(0, n - 8); i < n; ++i) {
            s->tails[seq].feed(tokens[i], s->tokens[tokens[i]], true);
        }
        return (int) SFI_OK;
    });
}

// Bytes of K and V of one cell in the layers that a fast step makes sparse.
static int64_t sparse_cell_bytes(const llama_support & support, const llama_hparams & hparams, bool keys_only) {
    const llama_kv_cache * kv = support.get_kv();
    int64_t size = 0;
    for (int32_t il = 0; il < (int32_t) support.get_layers().size(); ++il) {
        if (support.is_sparse(il)) {
            size += ggml_row_size(kv->type_k(), hparams.n_embd_k_gqa(il));
            size += keys_only ? 0 : ggml_row_size(kv->type_v(), hparams.n_embd_v_gqa(il));
        }
    }
    return size;
}

// Bytes that the other layers read at a depth, whatever the kind of step.
static int64_t other_bytes(const sfi * s, const llama_support & support, const llama_hparams & hparams, int64_t depth) {
    int64_t size = 0;
    const auto add = [&](const llama_kv_cache * kv, bool swa) {
        for (const uint32_t il : kv->get_layer_ids()) {
            if (il < support.get_layers().size() && !(kv == support.get_kv() && support.is_sparse(il))) {
                const int64_t n = swa ? std::min<int64_t>(depth, hparams.n_swa) : depth;
                size += n*(ggml_row_size(kv->type_k(), hparams.n_embd_k_gqa(il)) + ggml_row_size(kv->type_v(), hparams.n_embd_v_gqa(il)));
            }
        }
    };
    add(support.get_kv(), false);
    if (s->kv_swa) {
        add(s->kv_swa, true);
    }
    return size;
}

// What a fast step with a sketch left in the tensors that the layers of a device share. Each is read once, for a copy from a
// device takes tens of microseconds however small it is; in the host's memory they are looked at where they lie.
class step_results {
public:
    explicit step_results(llama_seq_id seq) : seq(seq) {}

    template <class T> const T * of(const ggml_tensor * t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return (const T *) ((const char *) t->data + seq*t->nb[2]);
        }
        auto & row = rows[t->view_src];
        if (row.empty()) {
            row.resize(t->view_src->nb[1]);
            ggml_backend_tensor_get(t->view_src, row.data(), seq*t->view_src->nb[1], row.size());
        }
        return (const T *) (row.data() + t->view_offs);
    }

private:
    llama_seq_id seq;
    std::map<const ggml_tensor *, std::vector<char>> rows;
};

static float mean_tail_mass(const llama_support & support, step_results & results) {
    double sum = 0.0;
    int64_t n = 0;
    for (const auto & layer : support.get_layers()) {
        if (layer.mass) {
            const float * values = results.of<float>(layer.mass); // {log-sum-exp, share of the tail} of every head
            for (int64_t h = 0; h < layer.mass->ne[1]; ++h, ++n) {
                sum += values[2*h + 1];
            }
        }
    }
    return n ? (float) (sum/n) : 0.0f;
}

// What the sketch had the last fast step attend to, beside `always`: over all layers and KV heads.
struct attended { int64_t n_heads = 0, n_cells = 0, bytes = 0; };

static attended attended_by_sketch(const sfi * s, const llama_support & support, llama_seq_id seq, step_results & results) {
    const auto & hparams = s->lctx->get_model().hparams;
    const llama_kv_cache * kv = support.get_kv();
    attended sum;
    for (int32_t il = 0; il < (int32_t) support.get_layers().size() && support.scanned(seq); ++il) {
        const auto & layer = support.layer(il);
        if (!layer.counts) {
            continue;
        }
        const int64_t cell_bytes = ggml_row_size(kv->type_k(), hparams.n_embd_head_k(il)) + ggml_row_size(kv->type_v(), hparams.n_embd_head_v(il));
        const int64_t more_bytes = ggml_sketch_cell_bytes(&layer.format) - 4*layer.format.n_first; // of a second look
        const int32_t * counts = results.of<int32_t>(layer.counts);
        for (int64_t h = 0; h < layer.n_head_kv; ++h) {
            sum.n_cells += counts[2*h];
            sum.bytes   += counts[2*h]*cell_bytes + counts[2*h + 1]*more_bytes;
        }
        sum.n_heads += layer.n_head_kv;
    }
    return sum;
}

// per head, rounded
static int64_t mean_cells(const attended & a) {
    return a.n_heads ? (a.n_cells + a.n_heads/2)/a.n_heads : 0;
}

static void count(sfi * s, const llama_support & support, llama_seq_id seq, const sfi_step_info & info, const attended & sketched) {
    auto & stats = s->stats;
    const auto & hparams = s->lctx->get_model().hparams;
    const int64_t cell  = sparse_cell_bytes(support, hparams, false);
    const int64_t other = other_bytes(s, support, hparams, info.depth);

    stats.kv_dense += cell*info.depth + other;
    stats.kv_read  += cell*(info.n_cells - mean_cells(sketched)) + sketched.bytes + other;
    if (info.kind == SFI_STEP_FAST) {
        stats.kv_read += support.sketch_bytes(seq);
        stats.kv_read += s->params.policy == SFI_POLICY_ORACLE ? sparse_cell_bytes(support, hparams, true)*info.depth : 0;
    }
    if (info.reason != SFI_REASON_NONE) {
        ++stats.n_reason[info.reason];
    }
    switch (info.kind) {
        case SFI_STEP_SLOW:
            ++stats.n_slow;
            stats.us_slow += info.t_us;
            if (s->params.policy == SFI_POLICY_FROZEN && (s->params.selector == SFI_SELECTOR_PAPER || support.has_portable())) {
                // whose evidence reads the keys once more
                stats.kv_read += sparse_cell_bytes(support, hparams, true)*info.depth;
            }
            break;
        case SFI_STEP_FAST:
            ++stats.n_fast;
            stats.us_fast += info.t_us;
            break;
        default:
            ++stats.n_dense;
            stats.us_dense += info.t_us;
    }
}

static llama_support_kind support_kind(const slowfast::decision & d) {
    switch (d.kind) {
        case SFI_STEP_SLOW: return LLAMA_SUPPORT_SLOW;
        case SFI_STEP_FAST: return LLAMA_SUPPORT_FAST;
        default:            return d.reason == SFI_REASON_SHORT ? LLAMA_SUPPORT_SHORT : LLAMA_SUPPORT_DENSE;
    }
}

// Remove the last n tokens from cache and support; `tails` is the caller's.
static int remove_last(sfi * s, llama_support & support, llama_seq_id seq, int32_t n) {
    const llama_memory_t memory = llama_get_memory(s->lctx);
    const llama_pos first = llama_memory_seq_pos_max(memory, seq) + 1 - n;
    const auto & swa = s->lctx->get_model().hparams;
    if (n > 0 && s->kv_swa && s->kv_swa->seq_pos_min(seq) > std::max<llama_pos>(0, first - (llama_pos) swa.n_swa)) {
        return fail(SFI_ERR_CONTEXT, "%d tokens cannot be taken back: the sliding-window layers have dropped the cells before "
                "them. Make the context with swa_full = true.", n);
    }
    if (n > 0 && !llama_memory_seq_rm(memory, seq, first, -1)) {
        support.invalidate(seq);
        return fail(SFI_ERR_DECODE, "The last %d tokens could not be removed from the memory of this model.", n);
    }
    if (n > 0) {
        support.roll_back(seq, n);
    }
    return SFI_OK;
}

// A slow step that computes the tokens since the last refresh again, in one batch with its own.
static int repairing_step(sfi * s, llama_support & support, llama_seq_id seq, llama_token token) {
    auto tokens = s->tails[seq].since_refresh(llama_n_batch(s->lctx) - 1);
    const int32_t n = (int32_t) tokens.size();
    if (const int err = remove_last(s, support, seq, n)) {
        return err;
    }
    tokens.push_back(token);
    if (const int err = decode(s, support, seq, tokens.data(), n + 1, LLAMA_SUPPORT_VERIFY, true, 1)) {
        s->tails[seq].take_back(n);
        return err;
    }
    s->stats.n_repaired += n;
    return SFI_OK;
}

int sfi_step(struct sfi * s, llama_seq_id seq, llama_token token, enum sfi_step_kind kind, struct sfi_step_info * info) {
    return guarded(s, [&](llama_support & support) {
        for (const int err : { check_seq(support, seq), check_tokens(s, &token, 1), check_range("kind", kind, SFI_STEP_AUTO, SFI_STEP_DENSE) }) {
            if (err) {
                return err;
            }
        }
        if (const int err = check_room(support, seq, 1)) {
            return err;
        }
        const auto d = decide(s, support, seq, token, kind);
        if (d.kind == SFI_STEP_AUTO) {
            return fail(SFI_ERR_NO_SUPPORT, "A fast step needs a support: prefill, or take a slow step first.");
        }
        const int64_t start = ggml_time_us();
        if (d.reason == SFI_REASON_UNSTABLE) {
            support.outgrow(seq);
        }
        const bool repair = d.kind == SFI_STEP_SLOW && s->params.repair && support.valid(seq) && support.span(seq) > 0
            && refreshes(s->params.policy);
        if (d.kind == SFI_STEP_FAST && !support.update_sketch(*s->lctx, seq)) {
            return sketch_failed();
        }
        if (const int err = repair ? repairing_step(s, support, seq, token)
                : decode(s, support, seq, &token, 1, support_kind(d), d.kind == SFI_STEP_SLOW, 1)) {
            return err;
        }
        s->tails[seq].feed(token, s->tokens[token], d.kind == SFI_STEP_SLOW);

        sfi_step_info done = {};
        done.kind    = d.kind;
        done.reason  = d.reason;
        done.pos     = llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq);
        done.depth   = support.depth(seq);
        const bool scanned = d.kind == SFI_STEP_FAST && support.scanned(seq);
        step_results results(seq);
        const attended sketched = scanned ? attended_by_sketch(s, support, seq, results) : attended();
        done.n_cells = d.kind != SFI_STEP_FAST ? done.depth : support.n_fast_cells(seq) + (int32_t) mean_cells(sketched);
        done.t_us    = ggml_time_us() - start;
        done.tail_mass = scanned ? mean_tail_mass(support, results) : 0.0f;
        s->tail_mass[seq] = done.tail_mass;
        count(s, support, seq, done, sketched);
        if (info) {
            *info = done;
        }
        return (int) SFI_OK;
    });
}

int sfi_peek(const struct sfi * s, llama_seq_id seq, llama_token token, enum sfi_step_kind * kind, enum sfi_reason * reason) {
    return guarded(s, [&](llama_support & support) {
        for (const int err : { check_seq(support, seq), check_tokens(s, &token, 1) }) {
            if (err) {
                return err;
            }
        }
        const auto d = decide(s, support, seq, token, SFI_STEP_AUTO);
        if (kind) {
            *kind = d.kind;
        }
        if (reason) {
            *reason = d.reason;
        }
        return (int) SFI_OK;
    });
}

// Bytes of K and V that dense steps read for the last n of `depth` tokens.
static int64_t dense_bytes(const sfi * s, const llama_support & support, int64_t depth, int32_t n) {
    const auto & hparams = s->lctx->get_model().hparams;
    const int64_t cell = sparse_cell_bytes(support, hparams, false);
    int64_t size = 0;
    for (int64_t d = depth - n + 1; d <= depth; ++d) {
        size += cell*d + other_bytes(s, support, hparams, d);
    }
    return size;
}

int sfi_rollback(struct sfi * s, llama_seq_id seq, int32_t n) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        const int32_t depth = support.depth(seq);
        if (const int err = check_range("n", n, 0, depth)) {
            return err;
        }
        if (const int err = remove_last(s, support, seq, n)) {
            return err;
        }
        s->tails[seq].take_back(n);
        s->stats.kv_dense = std::max<int64_t>(0, s->stats.kv_dense - dense_bytes(s, support, depth, n));
        return (int) SFI_OK;
    });
}

static int check_verify(const sfi * s, const llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced) {
    if (!tokens) {
        return fail(SFI_ERR_ARGUMENT, "There are no tokens to verify.");
    }
    const int32_t depth = support.depth(seq);
    for (const int err : { check_range("n", n, 1, (int32_t) llama_n_batch(s->lctx)), check_range("n_replaced", n_replaced, 0, std::min(n, depth)) }) {
        if (err) {
            return err;
        }
    }
    if (const int err = check_tokens(s, tokens, n)) {
        return err;
    }
    return check_room(support, seq, n - n_replaced);
}

static void count_verify(sfi * s, const llama_support & support, const sfi_step_info & info, int32_t n, int32_t n_new, bool refresh) {
    auto & stats = s->stats;
    const auto & hparams = s->lctx->get_model().hparams;
    ++stats.n_verify;
    ++stats.n_reason[info.reason];
    stats.n_verified += n;
    stats.us_verify  += info.t_us;
    stats.kv_read    += dense_bytes(s, support, info.depth, 1);
    stats.kv_read    += refresh && s->params.policy == SFI_POLICY_FROZEN ? sparse_cell_bytes(support, hparams, true)*info.depth : 0;
    stats.kv_dense   += dense_bytes(s, support, info.depth, n_new);
}

int sfi_verify(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced, bool refresh, struct sfi_step_info * info) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        if (support.has_portable()) {
            return fail(SFI_ERR_BACKEND, "A device of this model attends to several tokens with other rounding than to one, so a batch "
                    "cannot verify what dense steps give: use mode dense, or keep the model on the CPU (n_gpu_layers = 0).");
        }
        if (const int err = check_verify(s, support, seq, tokens, n, n_replaced)) {
            return err;
        }
        const int64_t start = ggml_time_us();
        if (const int err = remove_last(s, support, seq, n_replaced)) {
            return err;
        }
        s->tails[seq].take_back(n_replaced);
        if (const int err = decode(s, support, seq, tokens, n, LLAMA_SUPPORT_VERIFY, refresh, n)) {
            return err;
        }
        for (int32_t i = 0; i < n; ++i) {
            s->tails[seq].feed(tokens[i], s->tokens[tokens[i]], true); // dense: nothing to repair
        }
        sfi_step_info done = {};
        done.kind    = refresh ? SFI_STEP_SLOW : SFI_STEP_DENSE;
        done.reason  = SFI_REASON_VERIFY;
        done.pos     = llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq);
        done.depth   = done.n_cells = support.depth(seq);
        done.t_us    = ggml_time_us() - start;
        count_verify(s, support, done, n, n - n_replaced, refresh);
        if (info) {
            *info = done;
        }
        return (int) SFI_OK;
    });
}

int sfi_invalidate(struct sfi * s, llama_seq_id seq) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        support.invalidate(seq);
        return (int) SFI_OK;
    });
}

// ---- inspection ----------------------------------------------------------------------------------------------------------

int32_t sfi_n_layer(const struct sfi * s) {
    int32_t n = 0;
    const int err = guarded(s, [&](llama_support & support) {
        n = (int32_t) support.get_layers().size();
        return (int) SFI_OK;
    });
    return err ? err : n;
}

static sfi_path public_path(llama_support_path path) {
    switch (path) {
        case LLAMA_PATH_NATIVE:   return SFI_PATH_NATIVE;
        case LLAMA_PATH_PORTABLE: return SFI_PATH_PORTABLE;
        default:                  return SFI_PATH_NONE;
    }
}

enum sfi_path sfi_device_path(size_t device, const struct sfi_params * params, const char ** lacks) {
    static thread_local std::string text;
    text.clear();
    llama_support_path path = LLAMA_PATH_NONE;
    if (params && device < ggml_backend_dev_count() && check_params(*params) == SFI_OK) {
        const llama_path_shape shape = { 8, 2, 128, 128, GGML_TYPE_F16, GGML_TYPE_F16 };
        path = llama_path_choose(ggml_backend_dev_get(device), shape, support_params(*params), &text);
    }
    if (lacks) {
        *lacks = path == LLAMA_PATH_NONE ? text.c_str() : "";
    }
    return public_path(path);
}

static int check_layer(const llama_support & support, int32_t il) {
    return check_range("layer", il, 0, (int32_t) support.get_layers().size() - 1);
}

int sfi_get_layer(const struct sfi * s, int32_t il, struct sfi_layer * layer) {
    return guarded(s, [&](llama_support & support) {
        if (!layer) {
            return fail(SFI_ERR_ARGUMENT, "layer is NULL.");
        }
        if (const int err = check_layer(support, il)) {
            return err;
        }
        const auto & hparams = s->lctx->get_model().hparams;
        const llama_kv_cache * kv = support.get_kv();
        layer->sparse        = support.is_sparse(il);
        layer->n_head        = hparams.n_head(il);
        layer->n_head_kv     = hparams.n_head_kv(il);
        layer->n_embd_head_k = hparams.n_embd_head_k(il);
        layer->n_embd_head_v = hparams.n_embd_head_v(il);
        layer->kv_cell_bytes = ggml_row_size(kv->type_k(), hparams.n_embd_k_gqa(il)) + ggml_row_size(kv->type_v(), hparams.n_embd_v_gqa(il));
        layer->why           = support.layer(il).why.c_str();
        layer->path          = public_path(support.layer(il).path);
        return (int) SFI_OK;
    });
}

size_t sfi_memory(const struct sfi * s) {
    size_t size = 0;
    guarded(s, [&](llama_support & support) {
        size = support.memory();
        return (int) SFI_OK;
    });
    return size;
}

static int check_head(const sfi * s, const llama_support & support, llama_seq_id seq, int32_t il, int32_t head_kv) {
    if (const int err = check_seq(support, seq)) {
        return err;
    }
    if (const int err = check_layer(support, il)) {
        return err;
    }
    if (const int err = check_range("head_kv", head_kv, 0, (int32_t) s->lctx->get_model().hparams.n_head_kv(il) - 1)) {
        return err;
    }
    if (!support.is_sparse(il) || !support.layer(il).selected) {
        return fail(SFI_ERR_NO_SUPPORT, "Layer %d selects nothing: it %s.", il,
                support.is_sparse(il) ? "keeps sink and recent cells only (policy window)" : support.layer(il).why.c_str());
    }
    if (support.n_refresh(seq) == 0) {
        return fail(SFI_ERR_NO_SUPPORT, "Nothing has been selected yet: prefill, or take a slow step first.");
    }
    return SFI_OK;
}

int sfi_get_selected(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head_kv, int32_t * cells, int32_t * positions, int32_t n_max) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_head(s, support, seq, il, head_kv)) {
            return err;
        }
        llama_synchronize(s->lctx);
        const auto list = support.read_selected(seq, il, head_kv);
        const auto & kv_cells = support.get_kv()->get_cells(seq);
        for (int32_t i = 0; i < std::min<int32_t>(n_max, (int32_t) list.size()); ++i) {
            if (cells) {
                cells[i] = list[i];
            }
            if (positions) {
                positions[i] = kv_cells.is_empty(list[i]) ? -1 : kv_cells.pos_get(list[i]);
            }
        }
        return (int) list.size();
    });
}

int sfi_get_stability(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head_kv, struct sfi_stability * out) {
    return guarded(s, [&](llama_support & support) {
        if (!out) {
            return fail(SFI_ERR_ARGUMENT, "stability is NULL.");
        }
        if (const int err = check_head(s, support, seq, il, head_kv)) {
            return err;
        }
        llama_synchronize(s->lctx);
        const auto x = support.read_stability(seq, il, head_kv);
        const bool first = support.n_refresh(seq) == 1;
        out->n_selected = (int32_t) support.read_selected(seq, il, head_kv).size();
        out->evidence   = x[0];
        out->mass       = x[0] > 0.0f ? x[1]/x[0] : 1.0f;
        out->mass_prev  = first ? NAN : x[0] > 0.0f ? x[2]/x[0] : 1.0f;
        out->jaccard    = first ? NAN : x[3];
        return (int) SFI_OK;
    });
}

int sfi_get_tail(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head, struct sfi_tail * tail) {
    return guarded(s, [&](llama_support & support) {
        if (!tail) {
            return fail(SFI_ERR_ARGUMENT, "tail is NULL.");
        }
        for (const int err : { check_seq(support, seq), check_layer(support, il) }) {
            if (err) {
                return err;
            }
        }
        const auto & layer = support.layer(il);
        const auto & hparams = s->lctx->get_model().hparams;
        if (const int err = check_range("head", head, 0, (int32_t) hparams.n_head(il) - 1)) {
            return err;
        }
        if (!layer.mass || !support.scanned(seq)) {
            return fail(SFI_ERR_NO_SUPPORT, "Layer %d has no tail: only a fast step of policy sketch leaves one, when there are cells beyond the window.", il);
        }
        const int32_t n_head_kv = hparams.n_head_kv(il), group = hparams.n_head(il)/n_head_kv;
        tail->mass        = step_results(seq).of<float>(layer.mass)[2*head + 1];
        tail->logit_error = layer.logit_error[seq*n_head_kv + head/group];
        return (int) SFI_OK;
    });
}

int sfi_get_stats(const struct sfi * s, struct sfi_stats * stats) {
    return guarded(s, [&](llama_support &) {
        if (!stats) {
            return fail(SFI_ERR_ARGUMENT, "stats is NULL.");
        }
        *stats = s->stats;
        return (int) SFI_OK;
    });
}

int sfi_reset_stats(struct sfi * s) {
    return guarded(s, [&](llama_support &) {
        s->stats = {};
        return (int) SFI_OK;
    });
}
