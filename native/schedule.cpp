#include "schedule.h"

namespace slowfast {

decision decide(const sfi_params & params, const schedule_input & in, sfi_step_kind asked) {
    if (asked == SFI_STEP_SLOW || asked == SFI_STEP_DENSE) {
        return { asked, SFI_REASON_FORCED };
    }
    if (asked == SFI_STEP_FAST) {
        if (!in.valid) {
            return { SFI_STEP_AUTO, SFI_REASON_NONE };
        }
        return in.window_full ? decision{ SFI_STEP_SLOW, SFI_REASON_MAX_SPAN } : decision{ SFI_STEP_FAST, SFI_REASON_FORCED };
    }
    if (in.depth < params.auto_depth) {
        return { SFI_STEP_DENSE, SFI_REASON_SHORT };
    }
    if (!in.valid) {
        return { SFI_STEP_SLOW, in.edited ? SFI_REASON_INVALIDATED : SFI_REASON_FIRST };
    }
    if ((params.max_span > 0 && in.span >= params.max_span) || in.window_full) {
        return { SFI_STEP_SLOW, SFI_REASON_MAX_SPAN };
    }
    if (params.boundary && in.boundary && in.span >= params.min_span) {
        return { SFI_STEP_SLOW, SFI_REASON_BOUNDARY };
    }
    return { SFI_STEP_FAST, SFI_REASON_NONE };
}

} // namespace slowfast
