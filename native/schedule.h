// When a step is slow: one pure function, shared by every caller.

#pragma once

#include "sfi.h"

namespace slowfast {

struct schedule_input {
    int32_t depth       = 0;     // cells of the sequence before the step
    int32_t span        = 0;     // fast steps since the last slow one
    bool    valid       = false; // there is a support, and it fits the cache
    bool    edited      = false; // there was one, until the cache was edited
    bool    window_full = false; // the pinned window has no room for this token
    float   tail_mass   = 0.0f;  // of the last fast step
    bool    boundary    = false; // the token is the first content after the end of a sentence
};

struct decision {
    sfi_step_kind kind;
    sfi_reason    reason;
};

// kind AUTO means: a fast step was asked for, and there is no support for it
decision decide(const sfi_params & params, const schedule_input & in, sfi_step_kind asked);

} // namespace slowfast
