#include "document.h"

#include "sfi-research.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

namespace ask {

static constexpr int ROOM     = 2048; // tokens for questions and answers, where the model has them
static constexpr int MIN_ROOM = 256;
static constexpr int N_LOOKED = 24;   // heads, spread over the layers
static constexpr int64_t LOOK_US = 50000; // between two looks

// ---- the log: quiet, but the last error explains why a file did not load ----------------------------------------------

static std::mutex  log_lock;
static std::string last_error_line;

static void keep_errors(ggml_log_level level, const char * line, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::lock_guard<std::mutex> guard(log_lock);
        last_error_line = line;
    }
}

static std::string why_from_log() {
    std::lock_guard<std::mutex> guard(log_lock);
    std::string why = last_error_line.substr(0, last_error_line.find_last_not_of("\n ") + 1);
    return why.empty() ? "its log says nothing" : why;
}

// ---- the model ---------------------------------------------------------------------------------------------------------

static void check_is_model(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    char magic[4] = {};
    if (!file.read(magic, 4) && !file.gcount()) {
        throw Failure("There is no model to read at " + path + ": choose another file.");
    }
    if (memcmp(magic, "GGUF", 4) != 0) {
        throw Failure(path + " is no model: a GGUF file begins with the letters GGUF. Choose another file.");
    }
}

Document::Model Document::model_from(const std::string & path, const llama_model_params & params, const std::atomic<bool> & stop) {
    sfi_log_set(keep_errors, nullptr);
    check_is_model(path);
    Model model(llama_model_load_from_file(path.c_str(), params));
    if (stop) {
        throw Stopped();
    }
    if (!model) {
        throw Failure(path + " cannot be loaded: " + why_from_log());
    }
    return model;
}

Need Document::need(const std::string & path, int n_ctx) {
    llama_model_params params = llama_model_default_params();
    params.no_alloc  = true; // the head of the file alone
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    return need_of(model_from(path, params, false).get(), n_ctx);
}

struct Loading {
    const std::function<void(float)> & progress;
    const std::atomic<bool> & stop;
};

void Document::load(const std::string & path, const std::function<void(float)> & progress) {
    detach();
    model.reset();
    Loading loading = {progress, stop};
    llama_model_params params = llama_model_default_params();
    params.progress_callback_user_data = &loading;
    params.progress_callback = [](float share, void * user) {
        auto * loading = static_cast<Loading *>(user);
        loading->progress(share);
        return !loading->stop;
    };
    model = model_from(path, params, stop);
    prompt = Prompt::of(model.get());
}

std::string Document::name() const {
    char name[128] = "";
    llama_model_meta_val_str(model.get(), "general.name", name, sizeof(name));
    return *name ? name : "model";
}

// ---- the text ----------------------------------------------------------------------------------------------------------

static bool is_utf8(const std::string & text) {
    for (size_t i = 0, n; i < text.size(); i += n) {
        const unsigned char c = text[i];
        n = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 0;
        if (n == 0 || c == 0 || i + n > text.size()) {
            return false;
        }
        for (size_t j = 1; j < n; ++j) {
            if (((unsigned char) text[i + j] & 0xc0) != 0x80) {
                return false;
            }
        }
    }
    return true;
}

static std::string read_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file.is_open() || file.bad() || (text.empty() && file.fail() && !file.eof())) {
        throw Failure("There is no text to read at " + path + ": choose another file.");
    }
    if (text.find_first_not_of(" \t\r\n") == text.npos) {
        throw Failure(path + " is empty: choose another file.");
    }
    if (!is_utf8(text)) {
        throw Failure(path + " is not plain text in UTF-8: save it as that, or choose another file.");
    }
    return text;
}

void Document::open(const std::string & path, int n_ctx, size_t memory) {
    if (!model) {
        throw Failure("There is no model yet: choose one first.");
    }
    detach();
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    text   = tokenize(vocab, prompt.head, true, true);
    n_head = text.size();
    const Tokens body = tokenize(vocab, read_file(path), false);
    text.insert(text.end(), body.begin(), body.end());

    const int limit = n_ctx > 0 ? n_ctx : llama_model_n_ctx_train(model.get());
    if (n_text() + MIN_ROOM > limit) {
        throw Failure("The text has " + with_commas((long) body.size()) + " tokens, and this model can hold " + with_commas(limit) + ", " +
                      with_commas(MIN_ROOM + (long) n_head) + " of them for questions and answers: open a shorter text, or a model with a longer context.");
    }
    const int n_cells = std::min(limit, n_text() + ROOM);
    check_memory(n_cells, memory);
    split_text(n_head);
    attach(n_cells);
}

void Document::split_text(size_t n_head) {
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    const size_t n = text.size() - n_head, size = (n + N_PARTS - 1)/N_PARTS;
    parts.assign((n + size - 1)/size, "");
    for (size_t i = 0; i < n; ++i) {
        parts[i/size] += piece(vocab, text[n_head + i]);
    }
}

// ---- the context -------------------------------------------------------------------------------------------------------

void Document::check_memory(int n_ctx, size_t memory) {
    const size_t weights = llama_model_size(model.get()), need = context_bytes(model.get(), n_ctx);
    const size_t free = memory ? memory - std::min(memory, weights) : free_bytes();
    if ((memory || free) && need > free) {
        throw Failure("The text with room for questions takes " + as_size(need) + ", and " + as_size(free) + " are free: close other programs, or open a shorter text.");
    }
}

void Document::attach(int n_ctx) {
    lctx.reset(llama_init_from_model(model.get(), context_params(n_ctx)));
    if (!lctx) {
        throw Failure("There is no memory for a context of " + with_commas(n_ctx) + " tokens: close other programs, or open a shorter text.");
    }
    const struct sfi_params params = attached_params();
    struct sfi * made = nullptr;
    check(sfi_attach(lctx.get(), &params, &made));
    std::lock_guard<std::mutex> guard(sfi_lock);
    sfi = made;
}

void Document::detach() {
    struct sfi * old = nullptr;
    {
        std::lock_guard<std::mutex> guard(sfi_lock);
        std::swap(old, sfi);
    }
    sfi_free(old);
    lctx.reset();
    text.clear();
    unsaid.clear();
    heads.clear();
    n_cached = 0;
    asked = false;
}

void Document::cancel() {
    stop = true;
    std::lock_guard<std::mutex> guard(sfi_lock);
    if (sfi) {
        sfi_cancel(sfi);
    }
}

void Document::check(int status) {
    if (status == SFI_ERR_ABORTED || stop) {
        throw Stopped();
    }
    if (status == SFI_ERR_FULL) {
        throw Failure("The context of " + with_commas(n_ctx()) + " tokens is full: press New questions, which keeps the text.");
    }
    if (status < 0) {
        throw Failure(sfi_last_error());
    }
}

int Document::used() const {
    return llama_memory_seq_pos_max(llama_get_memory(lctx.get()), 0) + 1;
}

void Document::roll_back(int n) {
    if (used() > n) {
        check(sfi_rollback(sfi, 0, used() - n));
    }
}

// ---- reading and answering ---------------------------------------------------------------------------------------------

struct Reading {
    const Document::Progress & progress;
    const std::atomic<bool> & stop;
    int n_done, n_total; // of the text
};

void Document::prefill(const Tokens & tokens, int n_done, const Progress & progress) {
    Reading reading = {progress, stop, n_done, n_done + (int) tokens.size()};
    check(SFI_OK);
    progress(SFI_PHASE_PREFILL, reading.n_done, reading.n_total);
    const auto report = [](void * user, enum sfi_phase phase, int32_t done, int32_t total) {
        auto * r = static_cast<Reading *>(user);
        phase == SFI_PHASE_PREFILL ? r->progress(phase, r->n_done + done, r->n_total) : r->progress(phase, done, total);
        return !r->stop; // a cancel() that came just before the call
    };
    check(sfi_prefill(sfi, 0, tokens.data(), (int) tokens.size(), report, &reading));
}

int Document::read(const Progress & progress) {
    const int n_before = n_cached;
    if (n_before == n_text()) {
        return 0;
    }
    try {
        prefill(Tokens(text.begin() + n_before, text.end()), n_before, progress);
    } catch (...) {
        n_cached = used(); // what was read stays
        throw;
    }
    n_cached = n_text();
    return n_cached - n_before;
}

void Document::forget() {
    if (opened()) {
        roll_back(n_cached);
    }
    unsaid.clear();
    asked = false;
}

static void append(Tokens & to, const Tokens & more) {
    to.insert(to.end(), more.begin(), more.end());
}

Answer Document::answer(const std::string & question, const Progress & progress, const std::function<void(const Step &)> & show) {
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    Answer answer = {read(progress), 0, "length"};

    Tokens next = unsaid;
    append(next, tokenize(vocab, asked ? prompt.joint : "\n\n", true));
    append(next, tokenize(vocab, question, false));
    append(next, tokenize(vocab, prompt.tail, true));
    const int n_before = used();
    if ((int) next.size() + 1 > room()) {
        check(SFI_ERR_FULL);
    }
    try {
        prefill(next, 0, [](sfi_phase, int, int) {});
    } catch (...) {
        roll_back(n_before); // the question may be asked again
        throw;
    }
    unsaid.clear();
    asked = true;
    answer.n_new += (int) next.size();

    Sampler sampler(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    llama_sampler_chain_add(sampler.get(), llama_sampler_init_penalties(llama_vocab_n_tokens(vocab), 128, 1.1f, 0.0f, 0.0f));
    llama_sampler_chain_add(sampler.get(), llama_sampler_init_greedy());
    std::string held;
    while (answer.n_tokens < MAX_ANSWER) {
        if (room() < 1) {
            answer.end = "context";
            break;
        }
        const llama_token token = llama_sampler_sample(sampler.get(), lctx.get(), -1);
        if (llama_vocab_is_eog(vocab, token)) {
            answer.end = "end";
            break;
        }
        held += piece(vocab, token);
        ++answer.n_tokens;
        unsaid = {token};
        struct sfi_step_info info = {};
        info.struct_size = sizeof(info);
        const int status = stop ? SFI_ERR_ABORTED : sfi_step(sfi, 0, token, SFI_STEP_AUTO, &info);
        if (status == SFI_ERR_ABORTED) {
            show({take_whole(held), 0, false, {}});
            answer.end = "stopped";
            break;
        }
        check(status);
        unsaid.clear();
        const bool fast = info.kind == SFI_STEP_FAST;
        show({take_whole(held), (double) info.n_cells/std::max(1, info.depth), fast, fast ? look() : std::vector<float>()});
    }
    return answer;
}

// ---- where it reads ----------------------------------------------------------------------------------------------------

static std::vector<std::pair<int, int>> some_heads(const struct sfi * sfi) {
    std::vector<std::pair<int, int>> all, some;
    for (int il = 0; il < sfi_n_layer(sfi); ++il) {
        struct sfi_layer layer = {};
        layer.struct_size = sizeof(layer);
        if (sfi_get_layer(sfi, il, &layer) == SFI_OK && layer.sparse) {
            for (int head = 0; head < layer.n_head_kv; ++head) {
                all.emplace_back(il, head);
            }
        }
    }
    const size_t every = std::max<size_t>(1, all.size()/N_LOOKED);
    for (size_t i = 0; i < all.size(); i += every) {
        some.push_back(all[i]);
    }
    return some;
}

std::vector<float> Document::look() {
    if (llama_time_us() < next_look) {
        return {};
    }
    next_look = llama_time_us() + LOOK_US;
    if (heads.empty()) {
        heads = some_heads(sfi);
    }
    const int n = n_text() - (int) n_head, size = (n + N_PARTS - 1)/N_PARTS;
    std::vector<float> out(parts.size(), 0.0f);
    std::vector<int32_t> positions(n_ctx());
    for (const auto & [layer, head] : heads) {
        const int n_found = sfi_get_selected(sfi, 0, layer, head, nullptr, positions.data(), (int) positions.size());
        for (int i = 0; i < n_found; ++i) {
            const int at = positions[i] - (int) n_head;
            if (at >= 0 && at < n) {
                out[at/size] += 1.0f;
            }
        }
    }
    const float most = *std::max_element(out.begin(), out.end());
    for (float & part : out) {
        part = most > 0 ? part/most : 0;
    }
    return out;
}

} // namespace ask
