// The k best of n scores without sorting them.

#pragma once

#include <cstdint>
#include <cstring>

namespace sfi {

// Order-preserving map of float to unsigned, so that a rank can be found digit by digit.
inline uint32_t sortable(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

inline float from_sortable(uint32_t u) {
    u = u & 0x80000000u ? u ^ 0x80000000u : ~u;
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

// The k-th largest (1-based) among n >= k keys, and how many of those equal to it belong to the top k. By bisection: every
// step is one pass that compilers vectorise.
struct threshold { uint32_t key; int64_t n_equal; };

inline threshold kth_largest_key(const uint32_t * key, int64_t n, int64_t k) {
    uint32_t least = UINT32_MAX, most = 0;
    for (int64_t i = 0; i < n; ++i) {
        least = key[i] < least ? key[i] : least;
        most  = key[i] > most  ? key[i] : most;
    }
    int64_t above = 0; // keys above `most`
    while (least < most) { // n_keys(>= least) >= k > n_keys(> most)
        const uint32_t middle = least + (most - least)/2 + 1;
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) {
            count += key[i] >= middle;
        }
        if (count == k) {
            return { middle - 1, 0 };
        }
        if (count > k) {
            least = middle;
        } else {
            most  = middle - 1;
            above = count;
        }
    }
    return { most, k - above };
}

} // namespace sfi
