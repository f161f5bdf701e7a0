#include "stalls.h"

#include <glib.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fcntl.h>
#include <unistd.h>

namespace ask {

static Stalls longest;
static int    schedstat = -1;
static double wall_began = 0, work_began = 0; // when the last wait ended

static double wall_ms() {
    return g_get_monotonic_time()/1000.0;
}

static double work_ms() {
    timespec used = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return used.tv_sec*1e3 + used.tv_nsec/1e6;
}

// Milliseconds for which this thread could have run and had no core; 0 where the kernel does not say.
static double without_core_ms() {
    char text[96];
    long long ran = 0, waited = 0;
    const ssize_t n = schedstat < 0 ? 0 : pread(schedstat, text, sizeof(text) - 1, 0);
    if (n > 0) {
        text[n] = 0;
        sscanf(text, "%lld %lld", &ran, &waited);
    }
    return waited/1e6;
}

static gint timed_poll(GPollFD * fds, guint n, gint timeout) {
    if (wall_began > 0) {
        longest.work_ms = std::max(longest.work_ms, work_ms() - work_began);
        longest.wall_ms = std::max(longest.wall_ms, wall_ms() - wall_began);
    }
    const gint ready = g_poll(fds, n, timeout);
    wall_began = wall_ms();
    work_began = work_ms();
    return ready;
}

void watch_main_loop() {
    schedstat = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    g_main_context_set_poll_func(nullptr, timed_poll);
}

Stalls stalls_since_last() {
    const Stalls found = longest;
    longest = {};
    return found;
}

Held::Held() : began_ms(wall_ms() - without_core_ms()) {}

Held::~Held() {
    longest.held_ms = std::max(longest.held_ms, wall_ms() - without_core_ms() - began_ms);
}

} // namespace ask
