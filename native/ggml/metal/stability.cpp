// SUPPORT_STABILITY on Metal: the kernel is in stability.metal.

#include "host.h"

namespace sfi_metal {

bool stability_supported(const ggml_tensor *) {
    return true;
}

size_t stability_scratch(const ggml_tensor *, int) {
    return 0;
}

void stability(encoder & e, const ggml_tensor * dst) {
    e.run("sfi_stability", stability_args_of(dst),
        { whole(dst->src[0]), whole(dst->src[1]), whole(dst->src[2]), whole(dst->src[3]), whole(dst->src[4]), whole(dst) },
        { (int) dst->ne[1] }, select_threads);
}

} // namespace sfi_metal
