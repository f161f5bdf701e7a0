#include "schedule.h"

namespace slowfast {

decision decide(const schedule & s, const schedule_input & in, kind asked) {
    if (asked == SLOW || asked == DENSE) {
        return { asked, FORCED };
    }
    if (asked == FAST) {
        if (!in.valid) {
            return { AUTO, NONE };
        }
        return in.window_full ? decision{ SLOW, MAX_SPAN } : decision{ FAST, FORCED };
    }
    if (in.depth < s.auto_depth) {
        return { DENSE, SHORT };
    }
    if (!in.valid) {
        return { SLOW, in.edited ? INVALIDATED : FIRST };
    }
    if ((s.max_span > 0 && in.span >= s.max_span) || in.window_full) {
        return { SLOW, MAX_SPAN };
    }
    if (s.boundary && in.boundary && in.span >= s.min_span) {
        return { SLOW, BOUNDARY };
    }
    return { FAST, NONE };
}

} // namespace slowfast
