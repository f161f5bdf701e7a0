// The last tokens of a sequence, kept so that they can be computed again or taken back.

#pragma once

#include "sentences.h"
#include "llama.h"

#include <algorithm>
#include <vector>

namespace slowfast {

class history {
public:
    // is this token the first content after the end of a sentence?
    bool peek(const token_class & t) const { return detector.peek(t); }

    // A token was added to the sequence; with refresh by a step that chose a new support.
    void feed(llama_token token, const token_class & t, bool refresh) {
        if (past.size() >= 2*n_kept) {
            past.erase(past.begin(), past.begin() + n_kept);
        }
        past.push_back({ token, detector });
        detector.feed(t);
        n_since = refresh ? 0 : std::min(n_since + 1, past.size());
    }

    // The last n tokens were removed. Beyond what is kept, the text before them counts as one without an ender.
    void take_back(size_t n) {
        if (n > past.size()) {
            clear();
            return;
        }
        for (; n > 0; --n) {
            detector = past.back().before;
            past.pop_back();
            n_since -= n_since > 0;
        }
    }

    // The tokens since the last refresh, at most n of them.
    std::vector<llama_token> since_refresh(size_t n) const {
        std::vector<llama_token> tokens;
        for (size_t i = past.size() - std::min(n, n_since); i < past.size(); ++i) {
            tokens.push_back(past[i].token);
        }
        return tokens;
    }

    void clear() { *this = {}; }

private:
    static constexpr size_t n_kept = 1024;

    struct entry {
        llama_token       token;
        boundary_detector before; // as it was when the token came
    };
    std::vector<entry> past;
    size_t             n_since = 0; // of them, after the last refresh
    boundary_detector  detector;
};

} // namespace slowfast
