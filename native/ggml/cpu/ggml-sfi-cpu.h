// What ggml-cpu calls: one entry for all sfi operations.

#pragma once

#include "ggml-sfi.h"

#ifdef  __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_sfi(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_cpu_sfi_work_size  (const struct ggml_tensor * dst, int n_threads);
bool   ggml_cpu_sfi_supported  (const struct ggml_tensor * dst);

#ifdef  __cplusplus
}
#endif
