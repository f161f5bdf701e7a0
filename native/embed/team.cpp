// The threads of libsfi. ggml is compiled with OpenMP, and GCC's code for it calls the few functions below, which are libgomp's
// elsewhere. Here they are ours, because libgomp does not do for a library inside of somebody's program: how long its threads spin
// before they sleep is read from the environment when it is loaded (for milliseconds by default, which costs most of the speed beside
// other work), and after fork() the child waits for threads that it does not have.
//
// A thread that computes has workers of its own, which sleep between two graphs and end with it:
//
//     region    what its threads do together; number 0 is the thread that began it
//     barrier   the last one to arrive counts `passed` up; the others spin for a while and then sleep until it changes
//     start     likewise, of each worker: counted up when there is a region for it

#include "team.h"

#include "blocked-signals.h"
#include "start.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

static int32_t spin_count() {
    const int32_t n = start_spin();
    return n > 0 ? n : TEAM_SPIN_COUNT;
}

static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

// ---- a word that threads wait for ----------------------------------------------------------------------------------------

namespace {

class word {
public:
    uint32_t now() const { return value.load(std::memory_order_acquire); }

    // counts up, and wakes whoever sleeps
    void advance() {
        value.fetch_add(1, std::memory_order_seq_cst);
        if (n_asleep.load(std::memory_order_seq_cst) > 0) {
            syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
        }
    }

    void wait_while(uint32_t old) {
        for (int32_t i = spin_count(); i > 0; --i) {
            if (now() != old) {
                return;
            }
            relax();
        }
        n_asleep.fetch_add(1, std::memory_order_seq_cst);
        while (now() == old) {
            syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
        }
        n_asleep.fetch_sub(1, std::memory_order_seq_cst);
    }

private:
    std::atomic<uint32_t> value{0};
    std::atomic<int32_t>  n_asleep{0};
};

struct worker {
    struct team * of;
    int       number; // from 1
    word      start;
    pthread_t thread;
};

// A thread that computes, and its workers.
struct team {
    void (*fn)(void *) = nullptr; // the region
    void * data        = nullptr;
    int    n_threads   = 1;
    bool   ending      = false;
    word   passed;
    std::atomic<int> n_arrived{0};
    const uint32_t   process; // the workers of another one are not here
    std::vector<std::unique_ptr<worker>> workers;

    explicit team(uint32_t process) : process(process) {}

    void barrier() {
        const uint32_t generation = passed.now();
        if (n_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < n_threads) {
            passed.wait_while(generation);
            return;
        }
        n_arrived.store(0, std::memory_order_relaxed);
        passed.advance();
    }
};

struct place { // of a thread in a region
    team * in        = nullptr;
    int    number    = 0;
    int    n_threads = 1;
};

} // namespace

static thread_local place here;

// ---- workers -------------------------------------------------------------------------------------------------------------

static void * work(void * p) {
    worker & self = *(worker *) p;
    team & t = *self.of;
    for (uint32_t seen = 0;; ++seen) {
        self.start.wait_while(seen);
        if (t.ending) {
            return nullptr;
        }
        here = { &t, self.number, t.n_threads };
        t.fn(t.data);
        t.barrier();
    }
}

// One worker more; false where the system gives no thread.
static bool grow(team & t) {
    std::unique_ptr<worker> w(new (std::nothrow) worker{ &t, (int) t.workers.size() + 1, {}, {} });
    if (!w) {
        return false;
    }
    const blocked_signals none;
    const int err = pthread_create(&w->thread, nullptr, work, w.get());
    if (!err) {
        t.workers.push_back(std::move(w));
    }
    return !err;
}

static void end(team & t) {
    t.ending = true;
    for (auto & w : t.workers) {
        w->start.advance();
    }
    for (auto & w : t.workers) {
        pthread_join(w->thread, nullptr);
    }
}

// ---- the team of this thread ---------------------------------------------------------------------------------------------

static std::atomic<uint32_t> process{0}; // counts forks

namespace {

struct owned_team {
    team * t = nullptr;

    // nobody is waited for who is not there (fork) or waits for us (exit() in a signal handler, say)
    ~owned_team() {
        if (t && t->process == process && !here.in) {
            end(*t);
            delete t;
        }
    }
};

} // namespace

static team * own_team() {
    static thread_local owned_team own;
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { ++process; }); });
    if (!own.t || own.t->process != process) {
        own.t = new (std::nothrow) team(process); // that of before a fork stays as it is
    }
    return own.t;
}

static void alone(void (*fn)(void *), void * data) {
    const place before = here;
    here = { before.in, 0, 1 };
    fn(data);
    here = before;
}

// ---- what GCC calls ------------------------------------------------------------------------------------------------------

extern "C" {

void GOMP_parallel(void (*fn)(void *), void * data, unsigned n, unsigned /*flags*/) {
    const int wanted = n > 0 ? (int) n : team_default_threads();
    team * t = here.in || wanted < 2 ? nullptr : own_team();
    if (!t) {
        alone(fn, data);
        return;
    }
    while ((int) t->workers.size() < wanted - 1 && grow(*t)) {
    }
    t->fn        = fn;
    t->data      = data;
    t->n_threads = std::min(wanted, (int) t->workers.size() + 1);
    here = { t, 0, t->n_threads };
    for (int i = 1; i < t->n_threads; ++i) {
        t->workers[i - 1]->start.advance();
    }
    fn(data);
    t->barrier();
    here = {};
}

void GOMP_barrier(void) {
    if (here.in && here.n_threads > 1) {
        here.in->barrier();
    }
}

int omp_get_thread_num (void) { return here.number; }
int omp_get_num_threads(void) { return here.n_threads; }

bool GOMP_single_start(void) {
    return here.number == 0;
}

// A loop: each thread has an equal part of it.
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long /*chunk*/, long * from, long * to) {
    const long n     = step > 0 ? (last - first + step - 1)/step : (last - first + step + 1)/step;
    const long begin = n*here.number/here.n_threads, end = n*(here.number + 1)/here.n_threads;
    *from = first + begin*step;
    *to   = first + end*step;
    return begin < end;
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *, long *) {
    return false;
}

void GOMP_loop_end(void) {
    GOMP_barrier();
}

static std::mutex atomic_mutex;

void GOMP_atomic_start(void) { atomic_mutex.lock(); }
void GOMP_atomic_end  (void) { atomic_mutex.unlock(); }

} // extern "C"
