// The operations of a GPU's backend: a table by enum ggml_sfi_op, of functions that have the same names in each.

#pragma once

#include "ggml-sfi.h"

#include <cstddef>

// *_supported(): there are kernels for what the constructor of the node accepted. *_scratch(): bytes that it needs beside its result.
#define SFI_GPU_OPERATION(context, name) \
    bool   name##_supported(const ggml_tensor * dst); \
    size_t name##_scratch  (const ggml_tensor * dst, int n_sm); \
    void   name            (context & c, const ggml_tensor * dst);

#define SFI_GPU_OPERATIONS(context) \
    SFI_GPU_OPERATION(context, sparse_attn) \
    SFI_GPU_OPERATION(context, evidence) \
    SFI_GPU_OPERATION(context, select) \
    SFI_GPU_OPERATION(context, stability) \
    SFI_GPU_OPERATION(context, sketch_encode) \
    SFI_GPU_OPERATION(context, sketch_scan) \
    \
    struct operation { \
        bool   (*supported)(const ggml_tensor * dst); \
        size_t (*scratch)  (const ggml_tensor * dst, int n_sm); \
        void   (*compute)  (context & c, const ggml_tensor * dst); \
    }; \
    \
    /* null: not one of ours, or one of the CPU alone */ \
    inline const operation * operation_of(const ggml_tensor * dst) { \
        static const operation all[GGML_SFI_OP_COUNT] = { \
            { sparse_attn_supported,   sparse_attn_scratch,   sparse_attn   }, \
            { evidence_supported,      evidence_scratch,      evidence      }, \
            { select_supported,        select_scratch,        select        }, \
            { stability_supported,     stability_scratch,     stability     }, \
            { sketch_encode_supported, sketch_encode_scratch, sketch_encode }, \
            { sketch_scan_supported,   sketch_scan_scratch,   sketch_scan   }, \
        }; \
        return dst->op == GGML_OP_SFI && all[ggml_get_sfi_op(dst)].supported ? &all[ggml_get_sfi_op(dst)] : nullptr; \
    }
