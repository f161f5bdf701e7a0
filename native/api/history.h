// Where the text of a sequence is between two sentences, kept for the last tokens so that they can be taken back.

#pragma once

#include "sentences.h"

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

private:
    static constexpr size_t n_kept = 1024;

    std::vector<boundary_detector> past; // as it was when each of the last tokens came
    boundary_detector              detector;
};

} // namespace slowfast
