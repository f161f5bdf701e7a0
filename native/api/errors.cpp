#include "errors.h"

#include "sfi-research.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

// ---- the last error of a thread ----------------------------------------------------------------------------------------

// no string: keeping it must not fail for lack of memory
static char * last_error() {
    static thread_local char text[1024] = "";
    return text;
}

int fail(int status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    char text[1024]; // an argument may be the last text
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    memcpy(last_error(), text, sizeof(text));
    return status;
}

const char * sfi_last_error(void) {
    return last_error();
}

int check_range(const char * name, int64_t value, int64_t min, int64_t max) {
    if (value < min || value > max) {
        return fail(SFI_ERR_ARGUMENT, "%s is %lld, but must be from %lld to %lld.", name, (long long) value, (long long) min, (long long) max);
    }
    return SFI_OK;
}

int report_exception() {
    try {
        throw;
    } catch (const std::bad_alloc &) {
        return fail(SFI_ERR_MEMORY, "Out of memory: make the context smaller, take a smaller KV type, or a smaller n_selected.");
    } catch (const std::exception & e) {
        return fail(SFI_ERR_DECODE, "llama.cpp failed: %s", e.what());
    } catch (...) {
        return fail(SFI_ERR_DECODE, "llama.cpp failed: an exception without a text.");
    }
}

// ---- names ---------------------------------------------------------------------------------------------------------------

// Every value once. The switches made of these have no default, so the compiler names a value that a list lacks.
#define STATUSES(X) X(OK) X(ERR_ARGUMENT) X(ERR_MODEL) X(ERR_CONTEXT) X(ERR_KV_TYPE) X(ERR_BACKEND) X(ERR_FULL) X(ERR_MEMORY) \
    X(ERR_DECODE) X(ERR_ABORTED) X(ERR_NO_SUPPORT) X(ERR_BUSY) X(ERR_DETACHED) X(ERR_VERSION) X(ERR_CPU)
#define KINDS(X)    X(AUTO, "auto") X(SLOW, "slow") X(FAST, "fast") X(DENSE, "dense")
#define REASONS(X)  X(NONE, "none") X(FIRST, "first") X(BOUNDARY, "boundary") X(MAX_SPAN, "max_span") \
    X(INVALIDATED, "invalidated") X(FORCED, "forced") X(SHORT, "short") X(VERIFY, "verify")
#define PATHS(X)    X(NONE, "none") X(NATIVE, "native") X(PORTABLE, "portable")

const char * sfi_status_name(int status) {
#define X(name) case SFI_##name: return "SFI_" #name;
    switch ((sfi_status) status) { STATUSES(X) }
#undef X
    return "unknown status";
}

const char * sfi_kind_name(enum sfi_step_kind kind) {
#define X(name, text) case SFI_STEP_##name: return text;
    switch (kind) { KINDS(X) }
#undef X
    return "unknown";
}

const char * sfi_reason_name(enum sfi_reason reason) {
#define X(name, text) case SFI_REASON_##name: return text;
    switch (reason) { REASONS(X) }
#undef X
    return "unknown";
}

const char * sfi_path_name(enum sfi_path path) {
#define X(name, text) case SFI_PATH_##name: return text;
    switch (path) { PATHS(X) }
#undef X
    return "unknown";
}
