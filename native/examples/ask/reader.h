// A Document on a thread of its own. The window gives it work and is told what happens; neither ever waits for the other.
#pragma once

#include "document.h"

#include <condition_variable>
#include <deque>
#include <thread>

namespace ask {

struct Event {
    enum Kind {
        NEEDS,    // text: a sentence; need
        TOO_LARGE, // text: likewise; the model is not loaded
        LOADING,  // share of the model
        LOADED,   // text: its name
        OPENED,   // total: tokens of the text, n_ctx; passages
        READING,  // done of total tokens
        FITTING,  // done of total layers
        READ,     // done of total tokens; n: of them now
        STEP,     // step
        ANSWERED, // answer
        FORGOT,
        STOPPED,
        FAILED,   // text: a sentence
    } kind;
    std::string text = {};
    float share = 0;
    int done = 0, total = 0, n = 0, n_ctx = 0;
    std::vector<std::string> passages = {};
    Step step = {};
    Answer answer = {};
    Need need = {};
};

class Reader {
public:
    // wake: called on the reader's thread when there are events to take
    // n_ctx, memory: as of Document::open()
    Reader(std::function<void()> wake, int n_ctx, size_t memory);
    ~Reader(); // ends what is running and waits for it

    // Each returns at once, and is done after what was asked for before.
    void load(const std::string & path, bool all_the_same = false); // all_the_same: even if it needs more memory than is free
    void open(const std::string & path); // and read it
    void read();                         // on, after stop()
    void ask(const std::string & question);
    void forget();

    void stop(); // what is running and what waits
    std::vector<Event> take();

private:
    void post(std::function<void()> job);
    void run();
    void do_job(const std::function<void()> & job);
    void tell(Event event);
    void fail(Event event);
    bool fits(const std::string & path);
    void do_read();
    Document::Progress progress();

    const std::function<void()> wake;
    const int n_ctx;
    const size_t memory;
    Document document;
    std::mutex lock; // of the three below
    std::deque<std::function<void()>> jobs;
    std::vector<Event> events;
    bool closing = false, gone = false;
    std::condition_variable changed;
    std::thread thread;
};

} // namespace ask
