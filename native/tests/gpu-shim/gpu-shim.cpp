#undef _FORTIFY_SOURCE // longjmp between stacks is what fibers do

#include "gpu-shim.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <ucontext.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sfi_shim {

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int    warp_size   = 32;

enum class state { ready, at_warp, at_block, done };

struct fiber {
    std::unique_ptr<char[]> stack { new char[stack_bytes] };
    ucontext_t context;
    jmp_buf    where;
    bool       started = false;
    state      at = state::done;
    dim3       thread;
    int        n_exchanges = 0;
};

struct warp {
    uint64_t slots[2][warp_size];
};

std::vector<fiber> fibers;
std::vector<warp>  warps;
fiber *            current = nullptr;
jmp_buf            scheduler;
const std::function<void()> * work = nullptr;
std::mt19937        gen([] { const char * seed = getenv("SFI_SHIM_SEED"); return seed ? (unsigned) atoi(seed) : 2603u; }());

void run_thread() {
    (*work)();
    current->at = state::done;
    _longjmp(scheduler, 1);
}

void resume(fiber & f) {
    current   = &f;
    threadIdx = f.thread;
    if (_setjmp(scheduler) == 0) {
        if (f.started) {
            _longjmp(f.where, 1);
        }
        f.started = true;
        setcontext(&f.context);
    }
}

void wait(state at) {
    current->at = at;
    if (_setjmp(current->where) == 0) {
        _longjmp(scheduler, 1);
    }
}

void prepare(fiber & f, unsigned i) {
    f.started     = false;
    f.at          = state::ready;
    f.thread      = dim3(i % blockDim.x, i/blockDim.x % blockDim.y, i/blockDim.x/blockDim.y);
    f.n_exchanges = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_thread, 0);
}

// i-th of n in one of two orders: a kernel that needs one of them lacks a barrier
size_t in_some_order(size_t i, size_t n, bool backwards) {
    return backwards ? n - 1 - i : i;
}

// until all of the warp have left or are at a barrier of the block
void run_warp(size_t first, size_t last) {
    while (true) {
        const bool backwards = gen() & 1;
        size_t n_at_warp = 0;
        for (size_t j = first; j < last; ++j) {
            const size_t i = first + in_some_order(j - first, last - first, backwards);
            if (fibers[i].at == state::ready) {
                resume(fibers[i]);
            }
            n_at_warp += fibers[i].at == state::at_warp;
        }
        if (n_at_warp == 0) {
            return;
        }
        if (n_at_warp != last - first) {
            fail("threads of a warp are apart at an operation of the warp");
        }
        for (size_t i = first; i < last; ++i) {
            fibers[i].at = state::ready;
        }
    }
}

void run_block(size_t n) {
    for (size_t i = 0; i < n; ++i) {
        prepare(fibers[i], (unsigned) i);
    }
    while (true) {
        const bool   backwards = gen() & 1;
        const size_t n_warps   = (n + warp_size - 1)/warp_size;
        for (size_t w = 0; w < n_warps; ++w) {
            const size_t first = warp_size*in_some_order(w, n_warps, backwards);
            run_warp(first, std::min(first + warp_size, n));
        }
        const size_t n_done = std::count_if(fibers.begin(), fibers.begin() + n, [](const fiber & f) { return f.at == state::done; });
        if (n_done == n) {
            return;
        }
        if (n_done > 0) {
            fail("a thread has left while others wait at a barrier of the block");
        }
        for (size_t i = 0; i < n; ++i) {
            fibers[i].at = state::ready;
        }
    }
}

} // namespace

void fail(const char * what) {
    fprintf(stderr, "gpu-shim: %s (block %u,%u,%u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
    abort();
}

void block_barrier() { wait(state::at_block); }
void warp_barrier()  { wait(state::at_warp); }

const uint64_t * exchange(uint64_t value) {
    auto & slots = warps[(current - fibers.data())/warp_size].slots[current->n_exchanges++ % 2];
    slots[(current - fibers.data()) % warp_size] = value;
    warp_barrier();
    return slots;
}

void launch(dim3 grid, dim3 block, const std::function<void()> & thread) {
    const size_t n = (size_t) block.x*block.y*block.z, n_blocks = (size_t) grid.x*grid.y*grid.z;
    if (n == 0 || n > 1024 || n_blocks == 0 || grid.y > 65535 || grid.z > 65535) {
        fail("a launch that no GPU accepts");
    }
    while (fibers.size() < n) {
        fibers.emplace_back();
    }
    warps.resize((n + warp_size - 1)/warp_size);
    gridDim  = grid;
    blockDim = block;
    work     = &thread;

    std::vector<size_t> order(n_blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), gen);
    for (const size_t b : order) {
        blockIdx = dim3(b % grid.x, b/grid.x % grid.y, b/grid.x/grid.y);
        run_block(n);
    }
}

} // namespace sfi_shim
