// Decoding exactly as dense steps would: fast steps draft, one dense pass verifies.

#include "context.h"

#include "llama.h"

#include <algorithm>
#include <vector>

// What a span began with, and how to get back to it.
struct span_start {
    sfi *         s;
    llama_seq_id  seq;
    llama_pos     pos; // of the last token in the cache

    llama_pos now() const { return llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq); }

    // A span that failed leaves nothing that a fast step computed.
    int undo(int err) const {
        const std::string text = sfi_last_error();
        sfi_rollback(s, seq, std::max(0, now() - pos));
        return fail(err, "%s", text.c_str());
    }
};

// Drafts follow `token`. As soon as a step is no fast one, enough is drafted: what that computed is as good as verified.
static int draft(const span_start & start, llama_token token, int32_t n, sfi_sample_fn sample, void * user, std::vector<llama_token> & drafts) {
    while ((int32_t) drafts.size() < n) {
        sfi_step_info info = {};
        info.struct_size = sizeof(info);
        if (const int err = sfi_step(start.s, start.seq, drafts.empty() ? token : drafts.back(), SFI_STEP_FAST, &info)) {
            return err;
        }
        const llama_token next = sample(user, -1, true);
        drafts.push_back(next < 0 || next >= start.s->n_vocab ? 0 : next);
        if (next != drafts.back() || info.kind != SFI_STEP_FAST) {
            break;
        }
    }
    return SFI_OK;
}

// A step without drafts, dense in any case.
static int one_step(sfi * s, llama_seq_id seq, llama_token token, sfi_step_kind planned, sfi_sample_fn sample, void * user, llama_token * out) {
    if (const int err = sfi_step(s, seq, token, planned == SFI_STEP_SLOW ? SFI_STEP_SLOW : SFI_STEP_DENSE, nullptr)) {
        return err;
    }
    out[0] = sample(user, -1, false);
    return 1;
}

static int span(sfi * s, llama_seq_id seq, llama_token token, int32_t n_drafts, bool refresh, sfi_sample_fn sample, void * user, llama_token * out) {
    const span_start start = { s, seq, llama_memory_seq_pos_max(llama_get_memory(s->lctx), seq) };
    std::vector<llama_token> tokens, drafts;
    if (const int err = draft(start, token, n_drafts, sample, user, drafts)) {
        return start.undo(err);
    }
    const int32_t n = (int32_t) drafts.size();
    tokens.push_back(token);
    tokens.insert(tokens.end(), drafts.begin(), drafts.end());
    if (const int err = sfi_verify(s, seq, tokens.data(), n + 1, n, refresh, nullptr)) {
        return start.undo(err);
    }
    int32_t kept = 0;
    for (bool more = true; more; ++kept) {
        out[kept] = sample(user, kept, false);
        more = kept < n && out[kept] == drafts[kept];
    }
    const int err = sfi_rollback(s, seq, n - kept + 1);
    return err ? err : kept;
}

int sfi_exact(struct sfi * s, llama_seq_id seq, llama_token token, int32_t n_drafts, sfi_sample_fn sample, void * user, llama_token * out) {
    if (!sample || !out) {
        return fail(SFI_ERR_ARGUMENT, "%s is NULL.", !sample ? "sample" : "out");
    }
    sfi_step_kind kind;
    if (const int err = sfi_peek(s, seq, token, &kind, nullptr)) {
        return err;
    }
    bool refresh = false;
    int32_t room = 0;
    const int err = guarded(s, [&](llama_support & support) {
        const auto facts = support.facts(seq);
        room    = (int32_t) support.get_kv().get_size() - facts.depth - 1; // the token itself takes a cell
        refresh = refreshes(s->settings.params.policy) && 2*facts.span >= s->settings.params.max_span; // before the window is full
        if (kind == SFI_STEP_FAST && support.has_portable()) {
            kind = SFI_STEP_DENSE; // whose batches round otherwise
        }
        return check_range("n_drafts", n_drafts, 0, (int32_t) llama_n_batch(s->lctx) - 1);
    });
    if (err) {
        return err;
    }
    n_drafts = std::min(n_drafts, room);
    return no_throw([&] {
        return n_drafts < 1 || kind != SFI_STEP_FAST ? one_step(s, seq, token, kind, sample, user, out)
                                                     : span(s, seq, token, n_drafts, refresh, sample, user, out);
    });
}
