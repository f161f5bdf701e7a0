#include "side-graph.h"

#include <vector>

static ggml_backend_sched_t new_sched(ggml_backend_sched_t model, size_t n_tensors) {
    std::vector<ggml_backend_t> backends;
    std::vector<ggml_backend_buffer_type_t> types;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(model); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(model, i));
        types.push_back(ggml_backend_sched_get_buffer_type(model, backends.back()));
    }
    // it counts the tensors that are not the graph's own as well, such as K and V
    return ggml_backend_sched_new(backends.data(), types.data(), (int) backends.size(), 2*n_tensors, false, false);
}

bool llama_side_graph::compute(ggml_backend_sched_t model, size_t n_tensors, const build_fn & build, const std::function<void()> & set_inputs) {
    status = GGML_STATUS_ALLOC_FAILED;
    if (n_tensors > room) {
        sched.reset(new_sched(model, n_tensors));
        room = n_tensors;
    }
    ctx.reset(ggml_init({ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false), nullptr, true }));
    if (!ctx) {
        return false;
    }
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), n_tensors, false);
    build(ctx.get(), graph);
    ggml_backend_sched_reset(sched.get());
    if (!ggml_backend_sched_alloc_graph(sched.get(), graph)) {
        return false;
    }
    set_inputs();
    status = ggml_backend_sched_graph_compute(sched.get(), graph);
    return status == GGML_STATUS_SUCCESS;
}

size_t llama_side_graph::memory() const {
    size_t size = 0;
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        size += ggml_backend_sched_get_buffer_size(sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    return size;
}
