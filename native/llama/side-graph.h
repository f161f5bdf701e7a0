// A small graph of our own, computed on the devices of a model between its steps.
//
// It has a scheduler of its own, for a scheduler holds one allocated graph, and that of the model is to stay.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <functional>

class llama_side_graph {
public:
    using build_fn = std::function<void(ggml_context * ctx, ggml_cgraph * graph)>;

    // Makes a graph of up to n_tensors tensors with `build`, allocates it on the devices of `model`, has `set_inputs` fill its
    // inputs, computes it and waits. Its tensors live until the next call. False: there is no memory, or computing failed.
    bool compute(ggml_backend_sched_t model, size_t n_tensors, const build_fn & build, const std::function<void()> & set_inputs);

    bool   was_stopped() const { return status == GGML_STATUS_ABORTED; } // the last one, by the abort callback
    size_t memory() const; // bytes on all devices

private:
    ggml_backend_sched_ptr sched;
    size_t                 room = 0; // tensors that it can hold
    ggml_context_ptr       ctx;
    ggml_status            status = GGML_STATUS_SUCCESS;
};
