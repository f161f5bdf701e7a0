// The entry points: each validates, picks the kind of a step, and hands it to llama_decode().

#include "context.h"
#include "grown.h"

#include "sfi-source-id.h"

#include <algorithm>
#include <functional>
#include <set>

// ---- identity, log -------------------------------------------------------------------------------------------------------

int sfi_version(void) {
    return SFI_VERSION;
}

const char * sfi_source_id(void) {
    return SFI_SOURCE_ID;
}

void sfi_log_set(ggml_log_callback log, void * user) {
    llama_log_set(log, user);
}

// ---- parameters and meters -----------------------------------------------------------------------------------------------

int sfi_get_params(const struct sfi * s, struct sfi_params * params) {
    return guarded(s, [&](llama_support &) {
        if (const int err = check_struct(params, "params")) {
            return err;
        }
        sfi_params out = s->settings.params;
        out.research = &s->settings.research;
        give(params, out);
        return (int) SFI_OK;
    });
}

int sfi_get_stats(const struct sfi * s, struct sfi_stats * stats) {
    if (!s) {
        return fail(SFI_ERR_ARGUMENT, "The sfi context is NULL.");
    }
    if (const int err = check_struct(stats, "stats")) {
        return err;
    }
    const std::lock_guard<std::mutex> lock(s->meter);
    give(stats, s->stats);
    return SFI_OK;
}

int sfi_reset_stats(struct sfi * s) {
    if (!s) {
        return fail(SFI_ERR_ARGUMENT, "The sfi context is NULL.");
    }
    const std::lock_guard<std::mutex> lock(s->meter);
    s->stats = {};
    return SFI_OK;
}

size_t sfi_memory(const struct sfi * s) {
    if (!s || s->support.expired()) {
        return 0;
    }
    const std::lock_guard<std::mutex> lock(s->meter);
    return s->memory;
}

// ---- steps ---------------------------------------------------------------------------------------------------------------

int busy(const sfi * s) {
    return s->inside == std::this_thread::get_id()
        ? fail(SFI_ERR_BUSY, "This call comes from a callback of a call on the same context: return from it first.")
        : fail(SFI_ERR_BUSY, "Another thread is inside this context; give each thread its own, or take turns.");
}

int check_seq(const llama_support & support, llama_seq_id seq) {
    const uint32_t n = support.get_kv().get_n_stream();
    if (seq < 0 || (uint32_t) seq >= n) {
        return fail(SFI_ERR_ARGUMENT, "Sequence %d does not exist; this context has sequences 0 to %u.", seq, n - 1);
    }
    return SFI_OK;
}

static int check_tokens(const sfi * s, const llama_token * tokens, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= s->n_vocab) {
            return fail(SFI_ERR_ARGUMENT, "Token %d is not in the vocabulary (0 to %d).", tokens[i], s->n_vocab - 1);
        }
    }
    return SFI_OK;
}

static int check_room(const llama_support & support, llama_seq_id seq, int32_t n) {
    const int32_t depth = support.facts(seq).depth, size = (int32_t) support.get_kv().get_size();
    if (n > size - depth) {
        return fail(SFI_ERR_FULL, "%d tokens do not fit: the context has %d cells and %d are in use. Make it larger, or remove some.", n, size, depth);
    }
    return SFI_OK;
}

// what a token can do for a boundary; nothing where boundaries do not count
static slowfast::token_class class_of(const sfi * s, llama_token token) {
    return s->tokens.empty() ? slowfast::token_class() : s->tokens[token];
}

static slowfast::decision decide(const sfi * s, const llama_support & support, llama_seq_id seq, llama_token token, sfi_step_kind asked) {
    slowfast::schedule_input in;
    const auto facts = support.facts(seq);
    in.depth       = facts.depth;
    in.span        = facts.span;
    in.valid       = facts.valid;
    in.edited      = facts.edited;
    in.window_full = facts.window_room < 1;
    in.boundary    = s->histories[seq].peek(class_of(s, token));
    return slowfast::decide(s->schedule, in, (slowfast::kind) asked);
}

// the two of schedule.h and of sfi.h are the same numbers
static_assert((int) slowfast::DENSE == SFI_STEP_DENSE && (int) slowfast::FAST == SFI_STEP_FAST && (int) slowfast::SLOW == SFI_STEP_SLOW, "kinds");
static_assert((int) slowfast::FIRST == SFI_REASON_FIRST && (int) slowfast::MAX_SPAN == SFI_REASON_MAX_SPAN
           && (int) slowfast::INVALIDATED == SFI_REASON_INVALIDATED && (int) slowfast::VERIFY == SFI_REASON_VERIFY, "reasons");

static int stopped(const sfi * s) {
    return fail(SFI_ERR_ABORTED, s->cancelled ? "Stopped by sfi_cancel(), or by the progress callback." : "Stopped by the abort callback.");
}

static int decode_status(const sfi * s, int ret) {
    switch (ret) {
        case 0:  return SFI_OK;
        case 1:  return fail(SFI_ERR_FULL, "The KV cache has no free cell; make the context larger.");
        case 2:  return stopped(s);
        case LLAMA_SUPPORT_FAILED:
            return s->cancelled ? stopped(s) : fail(SFI_ERR_DECODE, "What fast steps need of the text could not be computed; llama.cpp's log says why.");
        default: return fail(SFI_ERR_DECODE, "llama_decode() failed with code %d; its log says why.", ret);
    }
}

// Tokens for one llama_decode().
class batch {
public:
    explicit batch(int32_t n_max) : b(llama_batch_init(n_max, 0, 1)) { b.n_tokens = 0; }
    ~batch() { llama_batch_free(b); }
    batch(const batch &) = delete;

    void add(llama_seq_id seq, llama_pos pos, llama_token token, bool logits) {
        const int32_t i = b.n_tokens++;
        b.token[i]     = token;
        b.pos[i]       = pos;
        b.n_seq_id[i]  = 1;
        b.seq_id[i][0] = seq;
        b.logits[i]    = logits;
    }
    const llama_batch & get() const { return b; }

private:
    llama_batch b;
};

static llama_pos next_pos(const sfi * s, llama_seq_id seq) {
    return llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq) + 1;
}

static int decode(sfi * s, llama_support & support, const batch & tokens, const std::vector<llama_support_work> & work) {
    watch_cancel(*s);
    return decode_status(s, support.run(*s->lctx, work, [&] {
        const int ret = llama_decode(s->lctx, tokens.get());
        llama_synchronize(s->lctx);
        return ret;
    }));
}

// Tokens at the end of a sequence; the logits of the last n_logits of them are kept.
static int decode(sfi * s, llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n,
                  llama_support_kind kind, bool refresh, int32_t n_logits, int32_t n_after = 0) {
    batch b(n);
    const llama_pos pos = next_pos(s, seq);
    for (int32_t i = 0; i < n; ++i) {
        b.add(seq, pos + i, tokens[i], i >= n - n_logits);
    }
    return decode(s, support, b, { { (uint32_t) seq, kind, n, refresh, n_after } });
}

// more: this is not the end of the text, so nothing is chosen and no logits are kept
static int prefill(sfi * s, llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n, bool more, sfi_progress_fn progress, void * user) {
    const int32_t n_batch = (int32_t) llama_n_batch(s->lctx);
    const bool    refresh = !more && support.facts(seq).depth + n >= s->schedule.auto_depth;
    auto & history = s->histories[seq];
    history.clear(); // also if it fails: nothing is known then of the text before
    for (int32_t i = 0; i < n; i += n_batch) {
        const int32_t m     = std::min(n_batch, n - i);
        const bool    last  = i + m == n;
        const int64_t start = ggml_time_us();
        if (const int err = decode(s, support, seq, tokens + i, m, LLAMA_SUPPORT_PREFILL, refresh && last, !more && last, more ? INT32_MAX/2 : n - i - m)) {
            return err;
        }
        count_prefill(s, m, ggml_time_us() - start);
        const bool go_on = !progress || progress(user, SFI_PHASE_PREFILL, i + m, n);
        if ((!go_on || s->cancelled) && !last) {
            return fail(SFI_ERR_ABORTED, "Prefill was stopped after %d of %d tokens; they stay in the cache.", i + m, n);
        }
    }
    for (int32_t i = std::max(0, n - 8); i < n; ++i) {
        history.feed(class_of(s, tokens[i]));
    }
    return SFI_OK;
}

static int checked_prefill(sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, bool more, sfi_progress_fn progress, void * user) {
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
        struct watching { // the fit at the end, for as long as this call
            llama_support & support;
            ~watching() { support.on_fit(nullptr); }
        } on_exit{support};
        support.on_fit([&](int32_t done, int32_t total) {
            if (progress && !progress(user, SFI_PHASE_FIT, done, total)) {
                s->cancelled = true;
            }
            return !s->cancelled;
        });
        return prefill(s, support, seq, tokens, n, more, progress, user);
    });
}

int sfi_prefill(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, sfi_progress_fn progress, void * user) {
    return checked_prefill(s, seq, tokens, n, false, progress, user);
}

int sfi_prefill_part(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, sfi_progress_fn progress, void * user) {
    return checked_prefill(s, seq, tokens, n, true, progress, user);
}

static llama_support_kind support_kind(const slowfast::decision & d) {
    switch (d.kind) {
        case slowfast::SLOW: return LLAMA_SUPPORT_SLOW;
        case slowfast::FAST: return LLAMA_SUPPORT_FAST;
        default:             return d.reason == slowfast::SHORT ? LLAMA_SUPPORT_SHORT : LLAMA_SUPPORT_DENSE;
    }
}

// Remove the last n tokens from cache and support; `histories` is the caller's.
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

// What a step of t_us did, after it. i, n: of a fast step of several tokens
static sfi_step_info report(sfi * s, const llama_support & support, llama_seq_id seq, const slowfast::decision & d, int64_t t_us, int32_t i = 0, int32_t n = 1) {
    const auto read = support.report(seq, support_kind(d), d.kind == slowfast::SLOW, i, n);
    sfi_step_info done = {};
    done.kind      = (sfi_step_kind) d.kind;
    done.reason    = (sfi_reason) d.reason;
    done.pos       = next_pos(s, seq) - (n - i);
    done.depth     = support.facts(seq).depth - (n - 1 - i);
    done.n_cells   = read.n_cells;
    done.tail_mass = read.tail_mass;
    done.t_us      = t_us;
    count_step(s, support, done, read.kv_read);
    return done;
}

static int check_next(const sfi * s, const llama_support & support, const sfi_next * next, int32_t n, sfi_step_kind kind, const sfi_step_info * info) {
    if (!next) {
        return fail(SFI_ERR_ARGUMENT, "next is NULL.");
    }
    for (const int err : { check_range("n", n, 1, (int32_t) llama_n_batch(s->lctx)), check_range("kind", kind, SFI_STEP_AUTO, SFI_STEP_DENSE),
                           info ? check_struct(info, "info") : SFI_OK }) {
        if (err) {
            return err;
        }
    }
    std::set<llama_seq_id> seqs;
    for (int32_t i = 0; i < n; ++i) {
        for (const int err : { check_seq(support, next[i].seq), check_tokens(s, &next[i].token, 1) }) {
            if (err) {
                return err;
            }
        }
        if (!seqs.insert(next[i].seq).second) {
            return fail(SFI_ERR_ARGUMENT, "Sequence %d is there twice: a step is one token of each.", next[i].seq);
        }
        if (const int err = check_room(support, next[i].seq, 1)) {
            return err;
        }
    }
    if (n > 1 && support.has_portable()) {
        return fail(SFI_ERR_BACKEND, "A device of this model steps one sequence at a time: take one step after the other.");
    }
    return SFI_OK;
}

// Fills in element i of a caller's array, whose elements are as large as the first says; null: he wants none.
static void give_nth(sfi_step_info * infos, int32_t i, const sfi_step_info & done) {
    if (infos) {
        auto * to = (sfi_step_info *) ((char *) infos + i*infos->struct_size);
        to->struct_size = infos->struct_size;
        give(to, done);
    }
}

static int step_many(sfi * s, llama_support & support, const sfi_next * next, int32_t n, sfi_step_kind kind, sfi_step_info * info) {
    std::vector<slowfast::decision> decisions;
    std::vector<llama_support_work> work;
    batch tokens(n);
    for (int32_t i = 0; i < n; ++i) {
        const auto [seq, token] = next[i];
        const auto d = decide(s, support, seq, token, kind);
        if (d.kind == slowfast::AUTO) {
            return fail(SFI_ERR_NO_SUPPORT, "A fast step needs a support: prefill, or take a slow step first.");
        }
        const auto done = support_kind(d);
        decisions.push_back(d); // upstream's own path, which a short step may take, is for one sequence
        work.push_back({ (uint32_t) seq, n > 1 && done == LLAMA_SUPPORT_SHORT ? LLAMA_SUPPORT_DENSE : done, 1, d.kind == slowfast::SLOW });
        tokens.add(seq, next_pos(s, seq), token, true);
    }
    const llama_pos * before = tokens.get().pos;
    const int64_t start = ggml_time_us();
    if (const int err = decode(s, support, tokens, work)) {
        for (int32_t i = 0; i < n; ++i) { // llama_decode takes back the sequences of the ubatch that failed, and not those of the ones before
            llama_memory_seq_rm(llama_get_memory(s->lctx), next[i].seq, before[i], -1);
        }
        return err;
    }
    const int64_t t_us = (ggml_time_us() - start)/n;
    for (int32_t i = 0; i < n; ++i) {
        s->histories[next[i].seq].feed(class_of(s, next[i].token));
        give_nth(info, i, report(s, support, next[i].seq, decisions[i], t_us));
    }
    return SFI_OK;
}

int sfi_step_many(struct sfi * s, const struct sfi_next * next, int32_t n, enum sfi_step_kind kind, struct sfi_step_info * info) {
    return guarded(s, [&](llama_support & support) {
        const int err = check_next(s, support, next, n, kind, info);
        return err ? err : step_many(s, support, next, n, kind, info);
    });
}

int sfi_step(struct sfi * s, llama_seq_id seq, llama_token token, enum sfi_step_kind kind, struct sfi_step_info * info) {
    const sfi_next next = { seq, token };
    return sfi_step_many(s, &next, 1, kind, info);
}

static int check_fast(const sfi * s, const llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n, const sfi_step_info * info) {
    if (!tokens) {
        return fail(SFI_ERR_ARGUMENT, "tokens is NULL.");
    }
    for (const int err : { check_seq(support, seq), check_range("n", n, 1, (int32_t) llama_n_batch(s->lctx)), info ? check_struct(info, "info") : SFI_OK }) {
        if (err) {
            return err;
        }
    }
    if (s->settings.params.policy != SFI_POLICY_SKETCH && s->settings.params.policy != SFI_POLICY_FROZEN) {
        return fail(SFI_ERR_ARGUMENT, "Fast steps of several tokens are for policies sketch and frozen, whose window stays between two of them.");
    }
    if (support.has_portable()) {
        return fail(SFI_ERR_BACKEND, "A device of this model steps one token at a time: take one step after the other.");
    }
    return check_tokens(s, tokens, n);
}

int sfi_step_fast(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, struct sfi_step_info * info) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_fast(s, support, seq, tokens, n, info)) {
            return err;
        }
        const auto d = decide(s, support, seq, tokens[0], SFI_STEP_AUTO);
        if (d.kind != slowfast::FAST) {
            return fail(SFI_ERR_NO_SUPPORT, "The next step is no fast one: take it by sfi_step().");
        }
        const int32_t m = std::min({ n, (int32_t) llama_n_ubatch(s->lctx), llama_support_max_tokens, support.facts(seq).window_room });
        if (const int err = check_room(support, seq, m)) {
            return err;
        }
        const int64_t start = ggml_time_us();
        if (const int err = decode(s, support, seq, tokens, m, LLAMA_SUPPORT_FAST, false, m)) {
            return err;
        }
        const int64_t t_us = (ggml_time_us() - start)/m;
        for (int32_t i = 0; i < m; ++i) {
            s->histories[seq].feed(class_of(s, tokens[i]));
            give_nth(info, i, report(s, support, seq, d, t_us, i, m));
        }
        return m;
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
            *kind = (sfi_step_kind) d.kind;
        }
        if (reason) {
            *reason = (sfi_reason) d.reason;
        }
        return (int) SFI_OK;
    });
}

int sfi_rollback(struct sfi * s, llama_seq_id seq, int32_t n) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        const int32_t depth = support.facts(seq).depth;
        if (const int err = check_range("n", n, 0, depth)) {
            return err;
        }
        if (const int err = remove_last(s, support, seq, n)) {
            return err;
        }
        s->histories[seq].take_back(n);
        count_taken_back(s, support, depth, n);
        return (int) SFI_OK;
    });
}

static int check_verify(const sfi * s, const llama_support & support, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced) {
    if (!tokens) {
        return fail(SFI_ERR_ARGUMENT, "There are no tokens to verify.");
    }
    const int32_t depth = support.facts(seq).depth;
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

int sfi_verify(struct sfi * s, llama_seq_id seq, const llama_token * tokens, int32_t n, int32_t n_replaced, bool refresh, struct sfi_step_info * info) {
    return guarded(s, [&](llama_support & support) {
        for (const int err : { check_seq(support, seq), info ? check_struct(info, "info") : SFI_OK }) {
            if (err) {
                return err;
            }
        }
        if (support.has_portable()) {
            return fail(SFI_ERR_BACKEND, "A device of this model attends to several tokens with other rounding than to one, so a batch "
                    "cannot verify what dense steps give: take dense steps, or keep the model on the CPU (n_gpu_layers = 0).");
        }
        if (const int err = check_verify(s, support, seq, tokens, n, n_replaced)) {
            return err;
        }
        const int64_t start = ggml_time_us();
        if (const int err = remove_last(s, support, seq, n_replaced)) {
            return err;
        }
        s->histories[seq].take_back(n_replaced);
        if (const int err = decode(s, support, seq, tokens, n, LLAMA_SUPPORT_VERIFY, refresh, n)) {
            return err;
        }
        for (int32_t i = 0; i < n; ++i) {
            s->histories[seq].feed(class_of(s, tokens[i]));
        }
        sfi_step_info done = {};
        done.kind    = refresh ? SFI_STEP_SLOW : SFI_STEP_DENSE;
        done.reason  = SFI_REASON_VERIFY;
        done.pos     = llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq);
        done.depth   = done.n_cells = support.facts(seq).depth;
        done.t_us    = ggml_time_us() - start;
        count_verify(s, support, done, n, n - n_replaced, support.report(seq, LLAMA_SUPPORT_VERIFY, refresh).kv_read);
        if (info) {
            give(info, done);
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
