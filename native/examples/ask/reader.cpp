#include "reader.h"

#include <chrono>
#include <utility>

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace ask {

// A window that shares its cores with a model is drawn in time if the model gives way. Threads made from here inherit it.
static void give_way() {
#if defined(__linux__)
    setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + 5); // of this thread alone
#endif
}

Reader::Reader(std::function<void()> wake, int n_ctx, size_t memory)
    : wake(std::move(wake)), n_ctx(n_ctx), memory(memory), thread([this] { run(); }) {}

Reader::~Reader() {
    {
        std::unique_lock<std::mutex> guard(lock);
        closing = true;
        jobs.clear();
        changed.notify_all();
        while (!gone) {
            document.cancel();
            changed.wait_for(guard, std::chrono::milliseconds(20));
        }
    }
    thread.join();
}

void Reader::stop() {
    std::lock_guard<std::mutex> guard(lock);
    jobs.clear();
    document.cancel();
}

void Reader::post(std::function<void()> job) {
    std::lock_guard<std::mutex> guard(lock);
    jobs.push_back(std::move(job));
    changed.notify_all();
}

std::vector<Event> Reader::take() {
    std::lock_guard<std::mutex> guard(lock);
    return std::exchange(events, {});
}

void Reader::tell(Event event) {
    bool first;
    {
        std::lock_guard<std::mutex> guard(lock);
        first = events.empty();
        events.push_back(std::move(event));
    }
    if (first) {
        wake();
    }
}

void Reader::run() {
    give_way();
    for (;;) {
        std::function<void()> job;
        {
            std::unique_lock<std::mutex> guard(lock);
            changed.wait(guard, [this] { return closing || !jobs.empty(); });
            if (closing) {
                gone = true;
                changed.notify_all();
                return;
            }
            job = std::move(jobs.front());
            jobs.pop_front();
            document.go_on();
        }
        do_job(job);
    }
}

void Reader::do_job(const std::function<void()> & job) {
    try {
        job();
    } catch (const Stopped &) {
        tell({Event::STOPPED});
    } catch (const std::bad_alloc &) {
        fail({Event::FAILED, "There is not enough memory: close other programs, or open a shorter text."});
    } catch (const std::exception & error) {
        fail({Event::FAILED, error.what()});
    }
}

void Reader::fail(Event event) {
    {
        std::lock_guard<std::mutex> guard(lock);
        jobs.clear(); // they build on what failed
    }
    tell(std::move(event));
}

// ---- the work ----------------------------------------------------------------------------------------------------------

Document::Progress Reader::progress() {
    return [this](sfi_phase phase, int done, int total) {
        Event event = {phase == SFI_PHASE_PREFILL ? Event::READING : Event::FITTING};
        event.done = done;
        event.total = total;
        tell(std::move(event));
    };
}

// What the model takes is told before anything is loaded.
bool Reader::fits(const std::string & path) {
    Event event = {Event::NEEDS};
    const size_t free = memory ? memory : free_bytes();
    event.need = Document::need(path, n_ctx);
    event.text = event.need.sentence(free);
    tell(event);
    if (!free || event.need.weights + event.need.least <= free) {
        return true;
    }
    event.kind = Event::TOO_LARGE;
    fail(std::move(event));
    return false;
}

void Reader::load(const std::string & path, bool all_the_same) {
    post([this, path, all_the_same] {
        if (!all_the_same && !fits(path)) {
            return;
        }
        document.load(path, [this](float share) {
            Event event = {Event::LOADING};
            event.share = share;
            tell(std::move(event));
        });
        tell({Event::LOADED, document.name()});
    });
}

void Reader::open(const std::string & path) {
    post([this, path] {
        document.open(path, n_ctx, memory);
        Event event = {Event::OPENED, path};
        event.total = document.n_text();
        event.n_ctx = document.n_ctx();
        event.passages = document.passages();
        tell(std::move(event));
        do_read();
    });
}

void Reader::read() {
    post([this] { do_read(); });
}

void Reader::do_read() {
    Event event = {Event::READ};
    event.n = document.read(progress());
    event.done = document.n_read();
    event.total = document.n_text();
    tell(std::move(event));
}

void Reader::ask(const std::string & question) {
    post([this, question] {
        Event event = {Event::ANSWERED};
        event.answer = document.answer(question, progress(), [this](const Step & step) {
            Event event = {Event::STEP};
            event.step = step;
            tell(std::move(event));
        });
        tell(std::move(event));
    });
}

void Reader::forget() {
    post([this] {
        document.forget();
        tell({Event::FORGOT});
    });
}

} // namespace ask
