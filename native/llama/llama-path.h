// Which operations compute the support of a layer: ours, ggml's own, or none that its device has.

#pragma once

#include "policy.h"

// What the operations of a layer depend on.
struct llama_path_shape {
    int64_t   n_head, n_head_kv, n_embd_head_k, n_embd_head_v;
    ggml_type type_k, type_v;
    bool      sinks = false;   // learned ones
    bool      softcap = false; // of the logits
    int64_t   n_cells = 256;   // of a sequence
};

llama_path_shape llama_path_shape_of(const llama_model & model, const llama_kv_cache & kv, int32_t il);

// The path of a layer on this device. NONE: *lacks, if it is not null, names the operations that the preferred path
// misses there ("" where no operations could help). SFI_PORTABLE_PATH=1 in the environment: never native.
llama_support_path llama_path_choose(ggml_backend_dev_t dev, const llama_path_shape & shape, const llama_support_params & params,
                                     std::string * lacks = nullptr);

// The operations of ours that a device computes, by name, each on a small instance of the default policy.
std::vector<std::string> llama_path_native(ggml_backend_dev_t dev);

// The device that computes on a buffer; null if there is none.
ggml_backend_dev_t llama_path_device(ggml_backend_buffer_t buffer);

// The CPU's backend was built for this feature, "AVX2" say, and runs on it.
bool llama_path_cpu_has(const char * feature);

// The chosen format of a layer's sketch, or the default one. With soft-capped logits the first look is at all of K, and where no format
// was chosen, so is that without a tolerance.
ggml_sketch_format llama_path_format(const llama_path_shape & shape, const llama_support_params & params);
