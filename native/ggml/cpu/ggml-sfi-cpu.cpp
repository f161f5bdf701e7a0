#include "ggml-sfi-cpu.h"

#include "sfi-ops.h"

void ggml_compute_forward_sfi(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_SPARSE_ATTN:       sfi::sparse_attn      (params, dst); break;
        case GGML_OP_SUPPORT_EVIDENCE:  sfi::support_evidence (params, dst); break;
        case GGML_OP_SUPPORT_SELECT:    sfi::support_select   (params, dst); break;
        case GGML_OP_SUPPORT_STABILITY: sfi::support_stability(params, dst); break;
        case GGML_OP_SKETCH_ENCODE:     sfi::sketch_encode    (params, dst); break;
        case GGML_OP_SKETCH_SCAN:       sfi::sketch_scan      (params, dst); break;
        default: GGML_ABORT("%s is not an sfi operation", ggml_op_name(dst->op));
    }
}

size_t ggml_cpu_sfi_work_size(const ggml_tensor * dst, int n_threads) {
    switch (dst->op) {
        case GGML_OP_SPARSE_ATTN:      return sfi::sparse_attn_work_size     (dst, n_threads);
        case GGML_OP_SUPPORT_EVIDENCE: return sfi::support_evidence_work_size(dst, n_threads);
        case GGML_OP_SUPPORT_SELECT:   return sfi::support_select_work_size  (dst, n_threads);
        case GGML_OP_SUPPORT_STABILITY: return sfi::support_stability_work_size(dst, n_threads);
        case GGML_OP_SKETCH_ENCODE:    return sfi::sketch_encode_work_size   (dst, n_threads);
        case GGML_OP_SKETCH_SCAN:      return sfi::sketch_scan_work_size     (dst, n_threads);
        default:                       return 0;
    }
}

bool ggml_cpu_sfi_supported(const ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_SPARSE_ATTN:       return sfi::sparse_attn_supported     (dst);
        case GGML_OP_SUPPORT_EVIDENCE:  return sfi::support_evidence_supported(dst);
        case GGML_OP_SUPPORT_SELECT:    return sfi::support_select_supported  (dst);
        case GGML_OP_SUPPORT_STABILITY: return true;
        case GGML_OP_SKETCH_ENCODE:     return sfi::sketch_encode_supported   (dst);
        case GGML_OP_SKETCH_SCAN:       return sfi::sketch_scan_supported     (dst);
        default:                        return false;
    }
}
