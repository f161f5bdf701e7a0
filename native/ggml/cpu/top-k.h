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

inline float from_sortable(uint32_t u) {
    u = u & 0x80000000u ? u ^ 0x80000000u : ~u;
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
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

// The same for few keys, by bisection: every step is one pass that compilers vectorise. The keys need not be scores.
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
