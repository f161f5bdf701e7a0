#include "memory.h"

#include "document.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

namespace ask {

static constexpr int N_BATCH = 256;
static constexpr int N_SHORT = 2048; // tokens of a short text with what is asked about it

llama_context_params context_params(int n_ctx) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = N_BATCH;
    params.n_ubatch        = N_BATCH;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return params;
}

struct sfi_params attached_params() {
    struct sfi_params params = {};
    params.struct_size = sizeof(params);
    if (sfi_default_params(&params, SFI_POLICY_SKETCH) < 0) {
        throw Failure(sfi_last_error());
    }
    params.auto_depth = -1;
    return params;
}

size_t context_bytes(llama_model * model, int n_ctx) {
    const llama_context_params cparams = context_params(n_ctx);
    const struct sfi_params params = attached_params();
    struct sfi_bytes bytes = {};
    bytes.struct_size = sizeof(bytes);
    if (sfi_context_bytes(model, &cparams, &params, &bytes) < 0) {
        throw Failure(sfi_last_error());
    }
    return bytes.kv + bytes.sfi + bytes.compute;
}

Need need_of(llama_model * model, int n_ctx) {
    Need need;
    need.weights = llama_model_size(model);
    need.n_most  = n_ctx > 0 ? n_ctx : llama_model_n_ctx_train(model);
    need.n_least = std::min(need.n_most, N_SHORT);
    need.least   = context_bytes(model, need.n_least);
    need.most    = need.n_most == need.n_least ? need.least : context_bytes(model, need.n_most);
    return need;
}

std::string Need::sentence(size_t free) const {
    std::string text = "Its weights take " + as_size(weights) + ", a text of " + with_commas(n_least) + " tokens " + as_size(least);
    if (n_most > n_least) {
        text += ", one of " + with_commas(n_most) + " " + as_size(most);
    }
    return text + (free ? "; " + as_size(free) + " are free." : ".");
}

size_t free_bytes() {
    std::ifstream file("/proc/meminfo"); // Linux alone has it
    std::string name;
    for (size_t kib; file >> name >> kib; file.ignore(64, '\n')) {
        if (name == "MemAvailable:") {
            return kib*1024;
        }
    }
    return 0;
}

std::string as_size(size_t bytes) {
    char text[32];
    snprintf(text, sizeof(text), bytes < 10e9 ? "%.0f MB" : "%.1f GB", bytes/(bytes < 10e9 ? 1e6 : 1e9));
    return text;
}

} // namespace ask
