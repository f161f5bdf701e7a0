// A negative status, and one sentence about it for the caller.

#pragma once

#include "sfi.h"

// Keeps the sentence for sfi_last_error() of this thread and returns the status.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int fail(int status, const char * format, ...);

// 0, or SFI_ERR_ARGUMENT
int check_range(const char * name, int64_t value, int64_t min, int64_t max);

// Calls f, and gives its status or that of what it threw: no exception leaves the library.
int report_exception(); // inside catch (...)

template <class F> int no_throw(F && f) {
    try {
        return f();
    } catch (...) {
        return report_exception();
    }
}
