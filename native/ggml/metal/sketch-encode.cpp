// GGML_OP_SKETCH_ENCODE on Metal: the kernel is in sketch-encode.metal.

#include "host.h"
#include "sketch.h"

#include <cstdio>

namespace sfi_metal {

bool sketch_encode_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[2], * v = dst->src[3];
    return sfi::sketch_layout::supported(dst) && kv_type_name(k->type) && k->type == v->type
        && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 && k->ne[0] <= encode_head_size && v->ne[0] <= encode_head_size
        && k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0
        && has_aligned_rows(k) && has_aligned_rows(v) && k->ne[2] <= 65535;
}

size_t sketch_encode_scratch(const ggml_tensor *) {
    return 0;
}

void sketch_encode(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * codes = dst->src[0], * basis = dst->src[1], * k = dst->src[2], * v = dst->src[3], * cells = dst->src[4];
    const ggml_sketch_format f = sfi::sketch_layout::format_of(dst);
    const sfi::sketch_layout layout(dst);
    encode_args a = {};
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2];
    a.head_bytes  = codes->nb[2];
    a.d_k         = (int) k->ne[0];
    a.d_v         = (int) v->ne[0];
    a.n_k         = layout.n_k;
    a.n_v         = layout.n_v;
    a.n_k4        = f.n_k4;
    a.n_k2        = f.n_k2;
    a.n_v4        = f.n_v4;
    a.n_listed    = (int) cells->ne[0];
    a.n_cells     = (int) k->ne[1];
    a.basis_size  = (int) basis->ne[0];
    a.k_planes     = layout.k_planes;
    a.first_planes = layout.first_planes;
    a.block_bytes  = (int) layout.block_bytes();
    a.record_bytes = layout.record_bytes;
    a.records_at   = codes->ne[1]*layout.block_bytes();

    char kernel[64];
    snprintf(kernel, sizeof(kernel), "sfi_sketch_encode_%s", kv_type_name(k->type));
    e.run(kernel, a, { whole(codes), whole(basis), whole(k), whole(v), whole(cells) },
        { (int) n_chunks(a.n_listed, encode_cells), (int) k->ne[2] }, encode_threads);
}

} // namespace sfi_metal
