#include "sentences.h"

#include <algorithm>
#include <cstring>

namespace slowfast {

static bool starts_with(const std::string & s, size_t i, const char * what) {
    return s.compare(i, strlen(what), what) == 0;
}

// The ender at byte i and its length in bytes, or ENDER_NONE.
static ender ender_at(const std::string & s, size_t i, size_t & length) {
    struct entry { const char * text; ender kind; };
    static const entry table[] = {
        { "\n", ENDER_LINE }, { "\r", ENDER_LINE },
        { ".", ENDER_SENTENCE }, { "!", ENDER_SENTENCE }, { "?", ENDER_SENTENCE }, { "\u2026", ENDER_SENTENCE },
        { ";", ENDER_CLAUSE },
        { "\u3002", ENDER_CJK }, { "\uff01", ENDER_CJK }, { "\uff1f", ENDER_CJK }, { "\uff1b", ENDER_CJK },
    };
    for (const auto & e : table) {
        if (starts_with(s, i, e.text)) {
            length = strlen(e.text);
            return e.kind;
        }
    }
    return ENDER_NONE;
}

// Length in bytes of punctuation that neither ends a sentence nor is content: quotes, brackets, emphasis.
static size_t wrapper_at(const std::string & s, size_t i) {
    static const char * const table[] = {
        "\"", "'", "(", ")", "[", "]", "{", "}", "*", "_", "`", "\u2018", "\u2019", "\u201c", "\u201d", "\u00ab", "\u00bb",
        "\u300c", "\u300d", "\u300e", "\u300f", "\uff08", "\uff09",
    };
    for (const char * w : table) {
        if (starts_with(s, i, w)) {
            return strlen(w);
        }
    }
    return 0;
}

token_class classify(const std::string & text) {
    token_class t;
    for (size_t i = 0; i < text.size(); ) {
        size_t length = 1;
        const ender e = ender_at(text, i, length);
        if (e != ENDER_NONE) {
            uint8_t & to = t.content ? t.ends : t.leads;
            to = std::max<uint8_t>(to, e);
            t.apart = t.apart || (!t.content && e == ENDER_LINE);
        } else if (text[i] == ' ' || text[i] == '\t') {
            t.apart = t.apart || !t.content;
        } else if (const size_t n = wrapper_at(text, i)) {
            length = n;
        } else {
            if (!t.content) {
                t.content    = true;
                t.lower_case = text[i] >= 'a' && text[i] <= 'z';
            }
            t.ends = ENDER_NONE; // what came before was inside the token
        }
        i += length;
    }
    return t;
}

bool boundary_detector::peek(const token_class & t) const {
    const uint8_t kind = std::max(armed, t.leads);
    if (!t.content || kind == ENDER_NONE) {
        return false;
    }
    const bool stands_apart = apart || t.apart;
    switch (kind) {
        case ENDER_SENTENCE: return stands_apart && !t.lower_case;
        case ENDER_CLAUSE:   return stands_apart;
        default:             return true;
    }
}

bool boundary_detector::feed(const token_class & t) {
    const bool fires = peek(t);
    if (t.content) {
        armed = t.ends;
        apart = false;
    } else {
        armed = std::max(armed, t.leads);
        apart = armed != ENDER_NONE && (apart || t.apart);
    }
    return fires;
}

} // namespace slowfast
