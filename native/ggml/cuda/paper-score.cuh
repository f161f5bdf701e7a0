// The score by which GGML_SUPPORT_SELECTOR_PAPER selects.

#pragma once

#include "gpu.cuh"

namespace sfi_cuda {

bool          paper_score_supported(const ggml_tensor * dst);
size_t        paper_score_scratch  (const ggml_tensor * dst); // bytes
const float * paper_score          (const gpu & g, const ggml_tensor * dst, char * scratch); // [n_head_kv, n_list], of candidates only

} // namespace sfi_cuda
