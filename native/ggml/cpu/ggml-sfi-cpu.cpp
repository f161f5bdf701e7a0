#include "ggml-sfi-cpu.h"

#include "sfi-ops.h"

namespace {

struct operation {
    void   (*compute)  (const ggml_compute_params * params, ggml_tensor * dst);
    size_t (*work_size)(const ggml_tensor * dst, int n_threads);
    bool   (*supported)(const ggml_tensor * dst);
};

const operation & operation_of(const ggml_tensor * dst) {
    static const operation all[GGML_SFI_OP_COUNT] = { // in the order of enum ggml_sfi_op
        { sfi::sparse_attn,   sfi::sparse_attn_work_size,   sfi::sparse_attn_supported   },
        { sfi::evidence,      sfi::evidence_work_size,      sfi::evidence_supported      },
        { sfi::select,        sfi::select_work_size,        sfi::select_supported        },
        { sfi::stability,     sfi::stability_work_size,     sfi::stability_supported     },
        { sfi::sketch_encode, sfi::sketch_encode_work_size, sfi::sketch_encode_supported },
        { sfi::sketch_scan,   sfi::sketch_scan_work_size,   sfi::sketch_scan_supported   },
        { sfi::block_mul_mat, sfi::block_mul_mat_work_size, sfi::block_mul_mat_supported },
        { sfi::few_mul_mat,   sfi::few_mul_mat_work_size,   sfi::few_mul_mat_supported   },
    };
    return all[ggml_get_sfi_op(dst)];
}

} // namespace

void ggml_compute_forward_sfi(const ggml_compute_params * params, ggml_tensor * dst) {
    operation_of(dst).compute(params, dst);
}

size_t ggml_cpu_sfi_work_size(const ggml_tensor * dst, int n_threads) {
    return operation_of(dst).work_size(dst, n_threads);
}

bool ggml_cpu_sfi_supported(const ggml_tensor * dst) {
    return operation_of(dst).supported(dst);
}
