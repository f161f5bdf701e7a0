#pragma once

#include "ggml-impl.h"

#include <cstddef>
#include <cstdint>

namespace sfi {

// rows of work memory, each on cache lines of its own; without memory, only its size
struct arena {
    char * base;
    size_t used;

    template <class T> void take(T *& row, int64_t n) {
        row = base ? (T *) (base + used) : nullptr;
        used += GGML_PAD(n*sizeof(T), 64);
    }
};

} // namespace sfi
