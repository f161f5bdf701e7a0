// sfi_cancel(), beside an abort callback of the caller's own.

#include "context.h"

#include <utility>

// llama.cpp lets a caller set its abort callback, and nobody ask for it. The argument of an explicit instantiation may name what
// is private, which is the one way to the members that needs no patch.
template <class Tag, typename Tag::type member> struct reveal {
    friend typename Tag::type member_of(Tag) { return member; }
};
struct callback_tag { using type = ggml_abort_callback llama_context::*; friend type member_of(callback_tag); };
struct data_tag     { using type = void *              llama_context::*; friend type member_of(data_tag); };
template struct reveal<callback_tag, &llama_context::abort_callback>;
template struct reveal<data_tag,     &llama_context::abort_callback_data>;

static bool should_stop(void * data) {
    const sfi & s = *(const sfi *) data;
    return s.cancelled || (s.their_abort && s.their_abort(s.their_abort_data));
}

static bool is_ours(const sfi & s) {
    return s.lctx->*member_of(callback_tag()) == should_stop && s.lctx->*member_of(data_tag()) == &s;
}

void watch_cancel(sfi & s) {
    if (!is_ours(s)) {
        s.their_abort      = s.lctx->*member_of(callback_tag());
        s.their_abort_data = s.lctx->*member_of(data_tag());
        s.lctx->set_abort_callback(should_stop, &s);
    }
}

void unwatch_cancel(const sfi & s) {
    if (is_ours(s)) {
        s.lctx->set_abort_callback(s.their_abort, s.their_abort_data);
    }
}

void sfi_cancel(struct sfi * s) {
    if (s) {
        s->cancelled = true; // the next call begins without it
    }
}
