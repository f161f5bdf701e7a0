#pragma once

#include "ggml-impl.h"

#include <cstddef>
#include <cstdint>

namespace sfi {

// Rows of work memory, each on cache lines of its own; without memory, only their size.
class arena {
public:
    static constexpr size_t line = 64; // memory may begin anywhere: have so many bytes more than size()

    arena() = default;
    explicit arena(void * memory) : base((char *) GGML_PAD((uintptr_t) memory, line)) {}

    template <class T> void take(T *& row, int64_t n) {
        row = base ? (T *) (base + used) : nullptr;
        used += GGML_PAD(n*sizeof(T), line);
    }
    // what lies `offset` bytes behind the rows that are taken
    arena behind(size_t offset) const {
        arena a;
        a.base = base ? base + used + offset : nullptr;
        return a;
    }
    size_t size() const { return used; }

private:
    char * base = nullptr;
    size_t used = 0;
};

// bytes of the rows of some kind
template <class Rows, class... Args>
size_t size_of(const Args &... args) {
    arena none;
    Rows(args..., none);
    return none.size();
}

} // namespace sfi
