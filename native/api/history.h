// Where the text of a sequence is between two sentences, kept for the last tokens so that they can be taken back.

#pragma once

#include "sentences.h"

#include <string>
#include <vector>

namespace slowfast {

class history {
public:
    // is this token the first content after the end of a sentence?
    bool peek(const token_class & t) const { return detector.peek(t); }

    // A token was added to the sequence.
    void feed(const token_class & t) {
        if (past.size() >= 2*n_kept) {
            past.erase(past.begin(), past.begin() + n_kept);
        }
        past.push_back(detector);
        detector.feed(t);
    }

    // The last n tokens were removed. Beyond what is kept, the text before them counts as one without an ender.
    void take_back(size_t n) {
        if (n > past.size()) {
            clear();
            return;
        }
        for (; n > 0; --n) {
            detector = past.back();
            past.pop_back();
        }
    }

    void clear() { *this = {}; }

    // All of it, a byte for each of the last tokens and one more; and back, false: it was never one.
    std::string bytes() const {
        std::string out;
        for (const auto & then : past) {
            out += (char) then.packed();
        }
        return out + (char) detector.packed();
    }
    bool take(const char * bytes, size_t n) {
        history taken;
        for (size_t i = 0; i < n; ++i) {
            boundary_detector then;
            if (!then.unpack((uint8_t) bytes[i])) {
                return false;
            }
            i + 1 < n ? taken.past.push_back(then) : void(taken.detector = then);
        }
        *this = std::move(taken);
        return n > 0 && n <= 2*n_kept + 1;
    }

private:
    static constexpr size_t n_kept = 1024;

    std::vector<boundary_detector> past; // as it was when each of the last tokens came
    boundary_detector              detector;
};

} // namespace slowfast
