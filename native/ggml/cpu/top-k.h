// The k best of n scores without sorting them.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace sfi {

// Order-preserving map of float to unsigned, so that a rank can be found digit by digit.
inline uint32_t sortable(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The k-th largest key (1-based) among n >= k scores, and how many of the keys equal to it belong to the top k.
// Radix select: 11 bits at a time, three passes at most, each over what the last one left.
struct threshold { uint32_t key; int64_t n_equal; };

inline threshold kth_largest(const float * score, int64_t n, int64_t k) {
    uint32_t prefix = 0, mask = 0;
    std::vector<int32_t> count(1u << 11);
    for (const int shift : { 21, 10, 0 }) {
        const uint32_t digits = shift == 0 ? 1u << 10 : 1u << 11;
        count.assign(digits, 0);
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = sortable(score[i]);
            if ((key & mask) == prefix) {
                ++count[(key >> shift) & (digits - 1)];
            }
        }
        uint32_t digit = digits - 1;
        while (k > count[digit]) {
            k -= count[digit--];
        }
        prefix |= digit << shift;
        mask   |= (digits - 1) << shift;
    }
    return { prefix, k };
}

} // namespace sfi
