// What a model and a text take, reckoned before anything of that size is loaded; and what is free.
#pragma once

#include "sfi.h"

#include <cstddef>
#include <string>

namespace ask {

// Of every context here: N_BATCH tokens between two reports of progress, short texts are read whole.
llama_context_params context_params(int n_ctx);
struct sfi_params    attached_params(); // throws Failure

struct Need { // in bytes, beside the program itself
    size_t weights = 0;
    int    n_least = 0, n_most = 0; // tokens: of a short text, of the longest that the model can hold
    size_t least = 0, most = 0;     // what a context of so many takes

    std::string sentence(size_t free) const; // free: 0: not known
};

// Of a model of which only the head of its file was read. n_ctx: cells at most; 0: as many as it was trained with. Throws Failure.
Need   need_of(llama_model * model, int n_ctx);
size_t context_bytes(llama_model * model, int n_ctx); // throws Failure

size_t free_bytes(); // of this machine's memory; 0: the system does not say

std::string as_size(size_t bytes); // 92 MB, 11.5 GB

} // namespace ask
