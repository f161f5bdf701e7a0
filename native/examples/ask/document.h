// A model, a text that it reads once, and questions about it. Knows nothing of windows; one thread at a time, but for cancel().
#pragma once

#include "memory.h"
#include "prompt.h"
#include "sfi.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace ask {

struct Failure : std::runtime_error { using std::runtime_error::runtime_error; }; // a sentence for people
struct Stopped {};                                                                // by cancel()

struct Step {
    std::string text;  // that became whole with this token
    double share;      // of the cells before it that were attended to exactly
    bool   fast;
    std::vector<float> look; // of each part of the text, how much was selected, the most being 1; empty: not looked
};

struct Answer {
    int n_new;        // tokens that were read for it: the question, and what of the text was not read before
    int n_tokens;
    const char * end; // "end", "length", "context" or "stopped"
};

class Document {
public:
    using Progress = std::function<void(sfi_phase phase, int done, int total)>;
    static constexpr int N_PARTS = 180; // of the text, at most
    static constexpr int MAX_ANSWER = 512; // tokens

    ~Document() { detach(); }

    // The functions below throw Failure, or Stopped after cancel().
    static Need need(const std::string & path, int n_ctx); // of a model that is not loaded
    void load(const std::string & path, const std::function<void(float)> & progress);
    // n_ctx: cells at most; 0: as many as the model was trained with. memory: bytes at most with the weights; 0: what is free
    void open(const std::string & path, int n_ctx, size_t memory);
    int  read(const Progress & progress);           // the text, as far as it is not read; returns how many tokens that was
    Answer answer(const std::string & question, const Progress & progress, const std::function<void(const Step &)> & step);
    void forget();                                  // questions and answers, not the text

    void cancel();  // from any thread: what is running ends within one operation
    void go_on() { stop = false; } // before the next one

    bool loaded() const { return !!model; }
    bool opened() const { return !!sfi; }
    std::string name() const;
    int  n_text() const { return (int) text.size(); }     // tokens
    int  n_read() const { return n_cached; }
    int  n_ctx() const { return (int) llama_n_ctx(lctx.get()); }
    const std::vector<std::string> & passages() const { return parts; } // of N_PARTS parts of the text

private:
    template <class T, void (*F)(T *)> struct Free { void operator()(T * p) const { F(p); } };
    using Model   = std::unique_ptr<llama_model, Free<llama_model, llama_model_free>>;
    using Context = std::unique_ptr<llama_context, Free<llama_context, llama_free>>;
    using Sampler = std::unique_ptr<llama_sampler, Free<llama_sampler, llama_sampler_free>>;

    static Model model_from(const std::string & path, const llama_model_params & params, const std::atomic<bool> & stop);
    void check_memory(int n_ctx, size_t memory);
    void attach(int n_ctx);
    void detach();
    void prefill(const Tokens & tokens, int n_done, const Progress & progress);
    void check(int status);
    void roll_back(int n); // to so many tokens
    int  used() const;
    int  room() const { return n_ctx() - used(); }
    void split_text(size_t n_head);
    std::vector<float> look();

    Model   model;
    Context lctx;
    struct sfi * sfi = nullptr;
    std::mutex  sfi_lock; // of the pointer, which cancel() follows
    std::atomic<bool> stop{false};

    Prompt prompt;
    Tokens text;          // the head of the prompt and the text
    size_t n_head = 0;
    Tokens unsaid;        // that the answer shows, and that are not in the cache
    int    n_cached = 0;  // tokens of `text` that are
    bool   asked = false;
    std::vector<std::string> parts;
    std::vector<std::pair<int, int>> heads; // layer and KV head, of those that are looked at
    int64_t next_look = 0;
};

} // namespace ask
