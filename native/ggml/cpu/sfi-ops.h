// The operations behind ggml_compute_forward_sfi(), one file each.

#pragma once

#include "ggml-sfi-cpu.h"

namespace sfi {

void   sparse_attn          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sparse_attn_work_size(const ggml_tensor * dst, int n_threads);
bool   sparse_attn_supported(const ggml_tensor * dst);

void   support_evidence          (const ggml_compute_params * params, ggml_tensor * dst);
size_t support_evidence_work_size(const ggml_tensor * dst, int n_threads);
bool   support_evidence_supported(const ggml_tensor * dst);

void   support_select          (const ggml_compute_params * params, ggml_tensor * dst);
size_t support_select_work_size(const ggml_tensor * dst, int n_threads);
bool   support_select_supported(const ggml_tensor * dst);

void   support_stability          (const ggml_compute_params * params, ggml_tensor * dst);
size_t support_stability_work_size(const ggml_tensor * dst, int n_threads);

void   sketch_encode          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sketch_encode_work_size(const ggml_tensor * dst, int n_threads);
bool   sketch_encode_supported(const ggml_tensor * dst);

void   sketch_scan          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sketch_scan_work_size(const ggml_tensor * dst, int n_threads);
bool   sketch_scan_supported(const ggml_tensor * dst);

} // namespace sfi
