// What the hosts of the CUDA and of the Metal kernels share: how they look at the nodes of our operations.

#pragma once

#include "ggml-sfi.h"

#include <cstdint>
#include <cstring>

namespace sfi {

inline int64_t n_chunks(int64_t n, int64_t size) { return (n + size - 1)/size; }

inline float float_param(const ggml_tensor * dst, int i) {
    float x;
    memcpy(&x, (const char *) dst->op_params + i*sizeof(x), sizeof(x));
    return x;
}

// rows can be read by the kernels' loads of eight values
inline bool has_aligned_rows(const ggml_tensor * t) {
    const size_t n = t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0 ? 2 : 16;
    return t->nb[1] % n == 0 && t->nb[2] % n == 0 && t->nb[3] % n == 0 && t->view_offs % n == 0;
}

// of GGML_OP_SUPPORT_EVIDENCE: rows of a KV head, each a query of a head of its group
inline int64_t evidence_rows(const ggml_tensor * dst) {
    return dst->src[0]->ne[1]/dst->src[1]->ne[2]*dst->src[0]->ne[2];
}

// of GGML_OP_SUPPORT_SELECT
inline ggml_support_selector selector_of(const ggml_tensor * dst) {
    ggml_support_selector s;
    memcpy(&s, dst->op_params, sizeof(s));
    return s;
}

} // namespace sfi
