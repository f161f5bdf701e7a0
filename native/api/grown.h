// Structs of the headers grow at their end, so a caller's may be shorter or longer than ours: each begins with its size.

#pragma once

#include "errors.h"

#include <algorithm>
#include <cstring>

// A caller's struct may be used; null is not.
template <class T> int check_struct(const T * theirs, const char * name) {
    if (!theirs) {
        return fail(SFI_ERR_ARGUMENT, "%s is NULL.", name);
    }
    if (theirs->struct_size <= sizeof(size_t)) {
        return fail(SFI_ERR_ARGUMENT, "%s->struct_size is %zu: set it to the size of the struct before the call.", name, theirs->struct_size);
    }
    return SFI_OK;
}

// Fills in what a caller's struct has room for; of what we do not know, zeros.
template <class T> void give(T * theirs, const T & ours) {
    const size_t size = theirs->struct_size;
    memset(theirs, 0, size);
    memcpy(theirs, &ours, std::min(size, sizeof(T)));
    theirs->struct_size = size;
}

// Replaces what the caller's struct has. What it lacks stays as it is in ours; what we do not know must be zero there.
template <class T> int take(const T * theirs, T & ours, const char * name) {
    const char * bytes = (const char *) theirs;
    for (size_t i = sizeof(T); i < theirs->struct_size; ++i) {
        if (bytes[i]) {
            return fail(SFI_ERR_ARGUMENT, "%s has a field that this library does not know: use the sfi.h of library version %d.", name, sfi_version());
        }
    }
    memcpy(&ours, theirs, std::min(theirs->struct_size, sizeof(T)));
    ours.struct_size = sizeof(T);
    return SFI_OK;
}
