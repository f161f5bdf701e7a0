// Loops that are worth the registers of AVX2, in a library that is built for any CPU. Without FMA, and with sums in the same
// order: the results are the same bits.

#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#define LLAMA_WIDE_LOOP __attribute__((always_inline)) // of the loop and of what it calls, which else would be compiled for any CPU

template <typename Loop> __attribute__((target("avx2"))) void llama_loop_by_avx2(const Loop & loop) {
    loop();
}

template <typename Loop> void llama_loop_widely(const Loop & loop) {
    static const bool has = __builtin_cpu_supports("avx2");
    if (has) {
        llama_loop_by_avx2(loop);
    } else {
        loop();
    }
}

#else

#define LLAMA_WIDE_LOOP

template <typename Loop> void llama_loop_widely(const Loop & loop) {
    loop();
}

#endif
