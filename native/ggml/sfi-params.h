// What the constructors write into op_params, and backends read from them.

#pragma once

#include "ggml-sfi.h"

#ifdef  __cplusplus
#include <cstring>
#endif

struct sfi_attn_params {
    int32_t op; // enum ggml_sfi_op, first in all
    float   scale, softcap;
    int32_t in_blocks; // ggml_sparse_attn_set_blocks()
    float   least;     // ggml_sparse_attn_skip_tiles()
};

struct sfi_evidence_params {
    int32_t op;
    float   scale, softcap, alpha;
    int32_t over; // enum ggml_support_softmax
};

struct sfi_select_params {
    int32_t op;
    struct ggml_support_selector selector;
};

struct sfi_stability_params {
    int32_t op;
};

struct sfi_encode_params {
    int32_t op;
    struct ggml_sketch_format format;
};

struct sfi_scan_params {
    int32_t op;
    struct ggml_sketch_format format; // at the place of that of an encode
    int32_t n_list;
    float   scale, softcap, second_look;
};

struct sfi_mul_mat_params {
    int32_t op;
};

#ifdef  __cplusplus
namespace sfi {

template <class Params> Params params_of(const ggml_tensor * node) {
    Params p;
    memcpy(&p, node->op_params, sizeof(p));
    return p;
}

inline ggml_sketch_format format_of(const ggml_tensor * sketch_node) { return params_of<sfi_encode_params>(sketch_node).format; }

} // namespace sfi
#endif
