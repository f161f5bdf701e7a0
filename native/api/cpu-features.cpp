// Whether the CPU has what the kernels were compiled for. SFI_CPU_FLAGS comes from sfi-cpu-flags.cmake; a portable build needs nothing.

#include "errors.h"
#include "start.h"

#include <cstring>

#ifndef SFI_CPU_FLAGS
#define SFI_CPU_FLAGS ""
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// name in /proc/cpuinfo, and how the CPU itself is asked: an emulator shows the file of the machine it runs on. What is not listed is
// taken to be there.
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FEATURES(X) X(pni, "sse3") X(ssse3, "ssse3") X(sse4_1, "sse4.1") X(sse4_2, "sse4.2") X(popcnt, "popcnt") X(avx, "avx") X(avx2, "avx2") \
    X(fma, "fma") X(bmi1, "bmi") X(bmi2, "bmi2") X(avx512f, "avx512f") X(avx512cd, "avx512cd") X(avx512bw, "avx512bw")                   \
    X(avx512dq, "avx512dq") X(avx512vl, "avx512vl") X(avx512ifma, "avx512ifma") X(avx512vbmi, "avx512vbmi")                                \
    X(avx512_vbmi2, "avx512vbmi2") X(avx512_vnni, "avx512vnni") X(avx512_bitalg, "avx512bitalg")                                             \
    X(avx512_vpopcntdq, "avx512vpopcntdq") X(avx512_bf16, "avx512bf16") X(gfni, "gfni") X(vpclmulqdq, "vpclmulqdq")
#define HAS(feature) __builtin_cpu_supports(feature)
#elif defined(__aarch64__) && defined(__linux__)
#define FEATURES(X) X(asimddp, AT_HWCAP, 20) X(asimdhp, AT_HWCAP, 10) X(sve, AT_HWCAP, 22) X(atomics, AT_HWCAP, 8) X(sve2, AT_HWCAP2, 1) \
    X(i8mm, AT_HWCAP2, 13) X(bf16, AT_HWCAP2, 14) X(sme, AT_HWCAP2, 23)
#define HAS(which, bit) ((getauxval(which) >> bit) & 1)
#else
#define FEATURES(X)
#endif

static bool needs(const char * name) {
    const size_t n = strlen(name);
    for (const char * at = SFI_CPU_FLAGS; (at = strstr(at, name)); at += n) {
        if ((at == (const char *) SFI_CPU_FLAGS || at[-1] == ' ') && (at[n] == ' ' || !at[n])) {
            return true;
        }
    }
    return false;
}

std::string missing_cpu_features() {
    std::string missing;
    [[maybe_unused]] const auto look = [&missing](const char * name, bool has) {
        if (!has && needs(name)) {
            missing += (missing.empty() ? "" : ", ") + std::string(name);
        }
    };
#define X(name, ...) look(#name, HAS(__VA_ARGS__));
    FEATURES(X)
#undef X
    return missing;
}

int check_cpu() {
    const std::string missing = missing_cpu_features();
    return missing.empty() ? SFI_OK : fail(SFI_ERR_CPU, "This library was built for a CPU with %s, which this one lacks: use a portable build of "
        "it (-DSFI_PORTABLE=ON), or build it on this machine.", missing.c_str());
}
