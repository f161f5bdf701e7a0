// SUPPORT_SELECT on Metal: the kernels are in select.metal.

#include "host.h"

namespace sfi_metal {

bool select_supported(const ggml_tensor * dst) {
    return select_supported_by_both(dst);
}

size_t select_scratch(const ggml_tensor * dst, int) {
    return ggml_nelements(dst->src[0])*sizeof(uint32_t);
}

void select(encoder & e, const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * cells = dst->src[1], * plan = dst->src[2];
    const select_args a = select_args_of(dst);
    const int   n_head_kv = (int) dst->ne[1];
    const place keys = scratch_parts().take(ggml_nelements(evidence), sizeof(uint32_t));
    e.run("sfi_select_keys", a, { whole(evidence), whole(cells), whole(plan), keys },
        { (int) n_chunks(a.n_list, list_threads), n_head_kv }, list_threads);
    e.barrier();
    e.run("sfi_select", a, { keys, whole(cells), whole(dst) }, { n_head_kv }, select_threads);
}

} // namespace sfi_metal
