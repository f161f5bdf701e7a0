// An operation's functions by its number.

#pragma once

#include "gpu.cuh"

namespace sfi_cuda {

struct operation {
    bool   (*supported)(const ggml_tensor * dst);
    size_t (*scratch)  (const ggml_tensor * dst, int n_sm);
    void   (*compute)  (const gpu & g, ggml_tensor * dst);
};

// null: not one of ours
inline const operation * operation_of(const ggml_tensor * dst) {
    static const operation attn      = { sparse_attn_supported,       sparse_attn_scratch,       sparse_attn       };
    static const operation evidence  = { support_evidence_supported,  support_evidence_scratch,  support_evidence  };
    static const operation select    = { support_select_supported,    support_select_scratch,    support_select    };
    static const operation stability = { support_stability_supported, support_stability_scratch, support_stability };
    static const operation encode    = { sketch_encode_supported,     sketch_encode_scratch,     sketch_encode     };
    static const operation scan      = { sketch_scan_supported,       sketch_scan_scratch,       sketch_scan       };
    switch (dst->op) {
        case GGML_OP_SPARSE_ATTN:       return &attn;
        case GGML_OP_SUPPORT_EVIDENCE:  return &evidence;
        case GGML_OP_SUPPORT_SELECT:    return &select;
        case GGML_OP_SUPPORT_STABILITY: return &stability;
        case GGML_OP_SKETCH_ENCODE:     return &encode;
        case GGML_OP_SKETCH_SCAN:       return &scan;
        default:                        return nullptr;
    }
}

} // namespace sfi_cuda
