// When a step is slow: one pure function, shared by every caller, that knows no type of the API.

#pragma once

#include <cstdint>

namespace slowfast {

enum kind   { AUTO, SLOW, FAST, DENSE };
enum reason { NONE, FIRST, BOUNDARY, MAX_SPAN, INVALIDATED, FORCED, SHORT, VERIFY };

struct schedule {
    int32_t auto_depth = 0;     // dense below
    int32_t max_span   = 0;     // fast steps at most; 0: any number
    int32_t min_span   = 0;     // fast steps before a boundary counts
    bool    boundary   = false; // boundaries count
};

struct schedule_input {
    int32_t depth       = 0;     // cells of the sequence before the step
    int32_t span        = 0;     // fast steps since the last slow one
    bool    valid       = false; // there is a support, and it fits the cache
    bool    edited      = false; // there was one, until the cache was edited
    bool    window_full = false; // frozen: the window has no room for this token
    bool    boundary    = false; // the token is the first content after the end of a sentence
};

struct decision {
    enum kind   kind;
    enum reason reason;
};

// kind AUTO means: a fast step was asked for, and there is no support for it
decision decide(const schedule & s, const schedule_input & in, kind asked);

} // namespace slowfast
