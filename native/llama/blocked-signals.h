// While it lives, threads that are begun take no signals: those are for the program's threads.
#pragma once

#if defined(_WIN32)
struct blocked_signals {
    ~blocked_signals() {}
};
#else
#include <pthread.h>
#include <signal.h>

class blocked_signals {
public:
    blocked_signals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~blocked_signals() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    blocked_signals(const blocked_signals &) = delete;

private:
    sigset_t before;
};
#endif
