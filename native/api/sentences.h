// Where sentences and clauses end, told from the text of single tokens.
//
// A token that ends a sentence only arms; the boundary is the first content token after it, and only if the text
// agrees: after . ! ? the content must stand apart (a space before it) and not go on in lower case, so that "3.14"
// and "e.g. this" are no boundaries. A newline, ; and the CJK enders need no such proof.

#pragma once

#include <cstdint>
#include <string>

namespace slowfast {

// What a token's text can do, most decisive last.
enum ender : uint8_t {
    ENDER_NONE     = 0,
    ENDER_SENTENCE = 1, // . ! ? and the ellipsis
    ENDER_CLAUSE   = 2, // ;
    ENDER_CJK      = 3, // full-width enders, which stand without spaces
    ENDER_LINE     = 4, // a newline
};

struct token_class {
    uint8_t leads      = ENDER_NONE; // ender before the content ("\n\nThe": a line)
    uint8_t ends       = ENDER_NONE; // ender at the end, after the content
    bool    content    = false;      // has a letter, a digit or another symbol that is not mere punctuation
    bool    apart      = false;      // white space before the content
    bool    lower_case = false;      // the content starts with a lower-case ASCII letter
};

token_class classify(const std::string & text);

// Follows the tokens of one sequence.
class boundary_detector {
public:
    // true if this token is the first content after an ender
    bool feed(const token_class & t);
    // the same answer without taking the token
    bool peek(const token_class & t) const;

    // It as a byte, and back; false: it is none of these
    uint8_t packed() const { return armed | (apart ? 0x80 : 0); }
    bool    unpack(uint8_t byte) {
        armed = byte & 0x7f;
        apart = byte & 0x80;
        return armed <= ENDER_LINE;
    }
private:
    uint8_t armed = ENDER_NONE;
    bool    apart = false; // white space since the ender
};

} // namespace slowfast
