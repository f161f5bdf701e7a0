// What is attached to a llama_context, and the way in: one thread at a time, and only while the KV cache lives.

#pragma once

#include "errors.h"
#include "history.h"
#include "params.h"
#include "schedule.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "llama-support.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

struct sfi {
    llama_context              * lctx = nullptr;
    std::weak_ptr<llama_support> support;          // gone when the KV cache is
    const llama_kv_cache       * kv_swa = nullptr; // of the layers with a sliding window, if they have one of their own
    sfi_settings                 settings;
    slowfast::schedule           schedule;
    int32_t                      n_vocab = 0;
    std::vector<slowfast::token_class> tokens;     // by token id; empty where boundaries do not count
    std::vector<slowfast::history>     histories;  // by stream

    mutable std::mutex           meter;            // of what follows, which is read while a step runs
    sfi_stats                    stats  = {};
    size_t                       memory = 0;

    mutable std::atomic<int>             state{0}; // of enum below
    mutable std::atomic<std::thread::id> inside{};
    mutable std::atomic<bool>            cancelled{false};
    ggml_abort_callback          their_abort      = nullptr; // which the caller had set
    void                       * their_abort_data = nullptr;
};

enum { SFI_IDLE, SFI_INSIDE, SFI_INSIDE_FREED }; // freed while a thread is inside: the last one out deletes

void destroy(const sfi * s);

// The reason why this thread cannot come in.
int busy(const sfi * s);

template <class F> int guarded(const sfi * s, F && f) {
    if (!s) {
        return fail(SFI_ERR_ARGUMENT, "The sfi context is NULL.");
    }
    int idle = SFI_IDLE;
    if (!s->state.compare_exchange_strong(idle, SFI_INSIDE)) {
        return busy(s);
    }
    s->inside    = std::this_thread::get_id();
    s->cancelled = false;
    struct leave {
        const sfi * s;
        ~leave() {
            s->inside = std::thread::id();
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
    return no_throw([&] {
        support->notice_edits();
        return f(*support);
    });
}

// ---- attach.cpp ----------------------------------------------------------------------------------------------------------

// The next graph of the context is built anew: one that was built without a support knows nothing of it.
void forget_graphs(llama_context & lctx);

// The KV cache whose layers can be sparse, and that of the layers with a sliding window, if they have one of their own; null if the
// model keeps its state elsewhere.
llama_kv_cache * sparse_cache(llama_memory_t memory, const llama_kv_cache ** kv_swa);

// ---- cancel.cpp ----------------------------------------------------------------------------------------------------------

// Before each llama_decode(): has llama.cpp ask sfi_cancel() and what the caller set.
void watch_cancel(sfi & s);
void unwatch_cancel(const sfi & s);

// ---- accounting.cpp ------------------------------------------------------------------------------------------------------

// kv_read: bytes that the step read, by the report of the support
void count_step   (sfi * s, const llama_support & support, const sfi_step_info & info, int64_t kv_read);
void count_verify (sfi * s, const llama_support & support, const sfi_step_info & info, int32_t n, int32_t n_new, int64_t kv_read);
void count_prefill(sfi * s, int32_t n, int64_t t_us);
void count_taken_back(sfi * s, const llama_support & support, int64_t depth, int32_t n);

// ---- sfi.cpp -------------------------------------------------------------------------------------------------------------

int check_seq(const llama_support & support, llama_seq_id seq);
