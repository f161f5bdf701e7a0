// The operations behind ggml_compute_forward_sfi(), one file each.

#pragma once

#include "ggml-sfi-cpu.h"

namespace sfi {

void   sparse_attn          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sparse_attn_work_size(const ggml_tensor * dst, int n_threads);
bool   sparse_attn_supported(const ggml_tensor * dst);

// ... of many tokens
void   sparse_attn_blocks          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sparse_attn_blocks_work_size(const ggml_tensor * dst, int n_threads);

void   evidence          (const ggml_compute_params * params, ggml_tensor * dst);
size_t evidence_work_size(const ggml_tensor * dst, int n_threads);
bool   evidence_supported(const ggml_tensor * dst);

void   select          (const ggml_compute_params * params, ggml_tensor * dst);
size_t select_work_size(const ggml_tensor * dst, int n_threads);
bool   select_supported(const ggml_tensor * dst);

void   stability          (const ggml_compute_params * params, ggml_tensor * dst);
size_t stability_work_size(const ggml_tensor * dst, int n_threads);
bool   stability_supported(const ggml_tensor * dst);

void   sketch_encode          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sketch_encode_work_size(const ggml_tensor * dst, int n_threads);
bool   sketch_encode_supported(const ggml_tensor * dst);

void   sketch_scan          (const ggml_compute_params * params, ggml_tensor * dst);
size_t sketch_scan_work_size(const ggml_tensor * dst, int n_threads);
bool   sketch_scan_supported(const ggml_tensor * dst);

void   block_mul_mat          (const ggml_compute_params * params, ggml_tensor * dst);
size_t block_mul_mat_work_size(const ggml_tensor * dst, int n_threads);
bool   block_mul_mat_supported(const ggml_tensor * dst);

void   few_mul_mat          (const ggml_compute_params * params, ggml_tensor * dst);
size_t few_mul_mat_work_size(const ggml_tensor * dst, int n_threads);
bool   few_mul_mat_supported(const ggml_tensor * dst);

} // namespace sfi
