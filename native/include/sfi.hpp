/*
 * sfi.hpp: sfi.h for C++17, in a namespace sfi_local (struct sfi has the shorter name): owners that free what they hold, and
 * exceptions with the library's sentence instead of codes.
 *
 *     sfi_local::model   model("model.gguf");
 *     sfi_local::context context(model, sfi_local::context_params(8192));
 *     sfi_local::engine  engine(context);
 *
 *     engine.prefill(model.tokenize("Once upon a time"));
 *     for (int i = 0; i < 64; ++i) {
 *         const llama_token token = llama_sampler_sample(sampler, context, -1);
 *         std::cout << model.piece(token);
 *         engine.step(token);
 *     }
 *
 * Every object converts to the pointer that llama.h and sfi.h take. A context keeps its model alive, an engine its context.
 */
#ifndef SFI_HPP
#define SFI_HPP

#include "sfi.h"

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace sfi_local {

class error : public std::runtime_error {
public:
    error(int status, const std::string & sentence) : std::runtime_error(sentence), status(status) {}
    const int status; // enum sfi_status
};

inline void check(int status) {
    if (status < 0) {
        throw error(status, sfi_last_error());
    }
}

/* threads, version and CPU; may be left out */
inline void init(int32_t n_threads = 0) {
    const sfi_init_params params = { sizeof(params), SFI_VERSION, n_threads, 0 };
    check(sfi_init(&params));
}

class model {
public:
    explicit model(const std::string & path, const llama_model_params & params = llama_model_default_params())
        : p(llama_model_load_from_file(path.c_str(), params), llama_model_free) {
        if (!p) {
            check(sfi_init(nullptr)); // this CPU, perhaps
            throw error(SFI_ERR_MODEL, path + " cannot be loaded; llama.cpp's log says why.");
        }
    }

    operator llama_model *() const { return p.get(); }
    const llama_vocab * vocab() const { return llama_model_get_vocab(p.get()); }
    bool ends(llama_token token) const { return llama_vocab_is_eog(vocab(), token); }

    /* special: the markers of a chat template are tokens, not text */
    std::vector<llama_token> tokenize(const std::string & text, bool add_special = true, bool special = false) const {
        std::vector<llama_token> tokens(text.size() + 8);
        const int32_t n = llama_tokenize(vocab(), text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(), add_special, special);
        if (n < 0) {
            throw error(SFI_ERR_ARGUMENT, "The text is too long to tokenize.");
        }
        tokens.resize((size_t) n);
        return tokens;
    }

    /* may be a part of a character */
    std::string piece(llama_token token, bool special = false) const {
        std::string text(64, '\0');
        int32_t n = llama_token_to_piece(vocab(), token, &text[0], (int32_t) text.size(), 0, special);
        if (n < 0) {
            text.resize((size_t) -n);
            n = llama_token_to_piece(vocab(), token, &text[0], (int32_t) text.size(), 0, special);
        }
        text.resize(n > 0 ? (size_t) n : 0);
        return text;
    }

private:
    std::shared_ptr<llama_model> p;
};

/* as sfi needs it */
inline llama_context_params context_params(uint32_t n_ctx) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return params;
}

/* what a context will take, before it is made */
inline sfi_bytes context_bytes(const model & m, const llama_context_params & params, const sfi_params * attached = nullptr) {
    sfi_bytes bytes = {};
    bytes.struct_size = sizeof(bytes);
    check(sfi_context_bytes(m, &params, attached, &bytes));
    return bytes;
}

class context {
public:
    context(const model & m, const llama_context_params & params)
        : owner(m), p(llama_init_from_model(m, params), llama_free) {
        if (!p) {
            throw error(SFI_ERR_CONTEXT, "The context cannot be made; llama.cpp's log says why.");
        }
    }

    operator llama_context *() const { return p.get(); }
    const model & of() const { return owner; }

private:
    model owner; // freed after the context
    std::shared_ptr<llama_context> p;
};

/* return false to stop */
using progress = std::function<bool(sfi_phase phase, int32_t done, int32_t total)>;

class engine {
public:
    explicit engine(const context & c, const sfi_params * params = nullptr) : owner(c), p(attach(c, params), sfi_free) {}

    operator struct ::sfi *() const { return p.get(); }
    const context & of() const { return owner; }

    void prefill(const std::vector<llama_token> & tokens, const progress & told = {}, llama_seq_id seq = 0) {
        call arguments = { &told, nullptr };
        const int status = sfi_prefill(p.get(), seq, tokens.data(), (int32_t) tokens.size(), told ? tell : nullptr, &arguments);
        if (arguments.thrown) {
            std::rethrow_exception(arguments.thrown);
        }
        check(status);
    }

    sfi_step_info step(llama_token token, sfi_step_kind kind = SFI_STEP_AUTO, llama_seq_id seq = 0) {
        sfi_step_info info = {};
        info.struct_size = sizeof(info);
        check(sfi_step(p.get(), seq, token, kind, &info));
        return info;
    }

    void rollback(int32_t n, llama_seq_id seq = 0) { check(sfi_rollback(p.get(), seq, n)); }

    /* from any thread */
    void cancel() { sfi_cancel(p.get()); }

    sfi_stats stats() const {
        sfi_stats stats = {};
        stats.struct_size = sizeof(stats);
        check(sfi_get_stats(p.get(), &stats));
        return stats;
    }

private:
    struct call {
        const progress *   told;
        std::exception_ptr thrown; // which must not pass through C
    };

    static bool tell(void * user, sfi_phase phase, int32_t done, int32_t total) {
        call & arguments = *static_cast<call *>(user);
        try {
            return (*arguments.told)(phase, done, total);
        } catch (...) {
            arguments.thrown = std::current_exception();
            return false;
        }
    }

    static struct ::sfi * attach(llama_context * c, const sfi_params * params) {
        struct ::sfi * out = nullptr;
        check(sfi_attach(c, params, &out));
        return out;
    }

    context owner; // freed after the engine
    std::shared_ptr<struct ::sfi> p;
};

} // namespace sfi_local

#endif // SFI_HPP
