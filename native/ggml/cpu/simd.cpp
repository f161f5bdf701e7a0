#include "simd.h"

#include <cstdlib>

namespace sfi {

static simd widest() {
    const char * env = getenv("SFI_SIMD");
    const char * path = env ? env : "";
    if (!strcmp(path, "scalar")) {
        return simd::scalar;
    }
#if defined(SFI_AVX512)
    if (strcmp(path, "avx2")) {
        return simd::avx512;
    }
#endif
#if defined(SFI_AVX2)
    return simd::avx2;
#elif defined(SFI_NEON)
    return simd::neon;
#else
    return simd::scalar;
#endif
}

simd simd_for(bool reference) {
    static const simd path = widest();
    return reference ? simd::scalar : path;
}

} // namespace sfi
