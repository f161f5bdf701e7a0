// How a text and questions about it are told to a model: by its chat template, in parts, so that what was read stays as it is.
#pragma once

#include "llama.h"

#include <string>
#include <vector>

namespace ask {

using Tokens = std::vector<llama_token>;

// head TEXT question tail ANSWER joint question tail ANSWER ...
struct Prompt {
    std::string head;  // before the text
    std::string tail;  // from a question to its answer
    std::string joint; // from an answer to the next question

    // By the model's template, or plainly where it has none that llama.h knows.
    static Prompt of(const llama_model * model);
};

// special: names of special tokens in it are those tokens; begin: with the token that begins a text, where the model has one
Tokens tokenize(const llama_vocab * vocab, const std::string & text, bool special, bool begin = false);

std::string piece(const llama_vocab * vocab, llama_token token);

// Takes from the front of `held` what is whole in UTF-8: a character may be spread over tokens.
std::string take_whole(std::string & held);

std::string with_commas(long n); // 12,345

} // namespace ask
