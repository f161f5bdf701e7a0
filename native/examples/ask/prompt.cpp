#include "prompt.h"

namespace ask {

static const char * const INSTRUCTION = "You answer questions about a text. Answer briefly, from the text alone.";

static std::string render(const char * name, const std::vector<llama_chat_message> & messages) {
    std::vector<char> out(4096);
    const int n = llama_chat_apply_template(name, messages.data(), messages.size(), true, out.data(), (int) out.size());
    return n > 0 && n <= (int) out.size() ? std::string(out.data(), n) : "";
}

Prompt Prompt::of(const llama_model * model) {
    const Prompt plain = {"", "\nAnswer:", "\n\nQuestion: "};
    const char * name = llama_model_chat_template(model, nullptr);
    if (!name) {
        return plain;
    }
    // letters that no text has mark where the text, an answer and a question go
    const std::string whole = render(name, {{"system", INSTRUCTION}, {"user", "\x01"}, {"assistant", "\x02"}, {"user", "\x03"}});
    const size_t text = whole.find('\x01'), answer = whole.find('\x02'), question = whole.find('\x03');
    if (text == whole.npos || answer == whole.npos || question == whole.npos) {
        return plain;
    }
    return {whole.substr(0, text), whole.substr(question + 1), whole.substr(answer + 1, question - answer - 1)};
}

Tokens tokenize(const llama_vocab * vocab, const std::string & text, bool special, bool begin) {
    Tokens tokens(text.size() + 8);
    const int n = llama_tokenize(vocab, text.data(), (int) text.size(), tokens.data(), (int) tokens.size(), begin, special);
    tokens.resize(n > 0 ? n : 0);
    return tokens;
}

std::string piece(const llama_vocab * vocab, llama_token token) {
    std::string out(256, '\0');
    const int n = llama_token_to_piece(vocab, token, out.data(), (int) out.size(), 0, false);
    out.resize(n > 0 ? n : 0);
    return out;
}

static size_t length_of(unsigned char first) {
    return first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

std::string take_whole(std::string & held) {
    size_t end = 0;
    while (end < held.size() && end + length_of(held[end]) <= held.size()) {
        end += length_of(held[end]);
    }
    std::string whole = held.substr(0, end);
    held.erase(0, end);
    return whole;
}

std::string with_commas(long n) {
    std::string out = std::to_string(n);
    for (int i = (int) out.size() - 3; i > 0; i -= 3) {
        out.insert(i, ",");
    }
    return out;
}

} // namespace ask
