#pragma once

#include "sfi-ops.h"

namespace sfi {
namespace scan {

void   look_twice          (const ggml_compute_params * params, ggml_tensor * dst);
size_t look_twice_work_size(const ggml_tensor * dst, int n_threads);

} // namespace scan
} // namespace sfi
