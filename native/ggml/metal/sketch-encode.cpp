// SKETCH_ENCODE on Metal: the kernel is in sketch-encode.metal.

#include "host.h"

namespace sfi_metal {

bool sketch_encode_supported(const ggml_tensor * dst) {
    return encode_supported(dst);
}

size_t sketch_encode_scratch(const ggml_tensor *, int) {
    return 0;
}

void sketch_encode(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[2];
    const encode_args a = encode_args_of(dst);
    e.run(name_of("sfi_sketch_encode_%s", kv_type_name(k->type)), a,
        { whole(dst->src[0]), whole(dst->src[1]), whole(k), whole(dst->src[3]), whole(dst->src[4]) },
        { (int) n_chunks(a.n_listed, encode_cells), (int) k->ne[2] }, encode_threads);
}

} // namespace sfi_metal
