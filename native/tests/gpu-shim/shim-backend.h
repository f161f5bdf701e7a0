// A ggml backend that computes our operations with the kernels of a GPU, on the CPU, in the CPU's memory: test-backend-ops
// loads it by GGML_BACKEND_PATH and compares it like that of a real device. Nothing but our operations is supported.

#pragma once

#include "ggml.h"

// what a shim of a GPU's kernels provides
extern const char * const shim_name;
bool shim_supported(const ggml_tensor * op);
void shim_compute  (ggml_tensor * op);
