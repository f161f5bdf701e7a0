#include "ggml-sfi-metal.h"

#include "ggml-backend-impl.h"
#include "host.h"
#include "sfi-metal-text.h" // the kernels, as CMake puts them together

#include <map>
#include <mutex>

using namespace sfi_metal;

// Compiled from the text at first use and kept: it belongs to the device, which lives as long. Null: this system cannot.
static ggml_metal_library_t library_of(ggml_metal_device_t dev) {
    static std::mutex mutex;
    static std::map<ggml_metal_device_t, ggml_metal_library_t> all;

    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = all.find(dev);
    if (found != all.end()) {
        return found->second;
    }
    return all[dev] = ggml_metal_library_init_from_source(dev, sfi_metal_text, /* verbose = */ true);
}

static size_t padded_bytes(const ggml_tensor * dst) {
    return (ggml_nbytes(dst) + 31)/32*32;
}

// The operation writes a tensor that the node has among its sources. ggml-metal takes it for one that is only read, and keeps
// it from no one.
static bool writes_a_source(const ggml_tensor * dst) {
    const enum ggml_sfi_op op = ggml_get_sfi_op(dst);
    return op == GGML_SFI_OP_SKETCH_SCAN || (op == GGML_SFI_OP_SPARSE_ATTN && mass_of(dst));
}

void encoder::barrier() {
    ggml_metal_encoder_memory_barrier(enc);
}

ggml_metal_buffer_id encoder::buffer_of(const place & p) const {
    const ggml_tensor * t = p.tensor ? p.tensor : dst;
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    ggml_metal_buffer_id id = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
    id.offs += p.offset + (p.tensor ? 0 : padded_bytes(dst));
    return id;
}

void encoder::run(const char * kernel, const void * args, size_t size, std::initializer_list<place> buffers, groups grid, int n_threads) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return;
    }
    ggml_metal_encoder_set_pipeline(enc, ggml_metal_library_compile_pipeline(library, kernel, kernel, nullptr));
    ggml_metal_encoder_set_bytes(enc, const_cast<void *>(args), size, 0);
    int i = 1;
    for (const place & p : buffers) {
        ggml_metal_encoder_set_buffer(enc, buffer_of(p), i++);
    }
    ggml_metal_encoder_dispatch_threadgroups(enc, grid.x, grid.y, grid.z, n_threads, 1, 1);
}

bool ggml_metal_sfi_supported(ggml_metal_device_t dev, const ggml_tensor * dst) {
    const operation * op = operation_of(dst);
    // of the others not all have simdgroups of 32
    const bool is_apple_gpu = ggml_metal_device_get_props(dev)->supports_gpu_family_apple7;
    return op && is_apple_gpu && op->supported(dst) && library_of(dev);
}

size_t ggml_metal_sfi_extra(const ggml_tensor * dst) {
    const operation * op = operation_of(dst);
    // asked for every node, also for those that another backend will compute
    const size_t scratch = op && op->supported(dst) ? op->scratch(dst, 0) : 0;
    return scratch > 0 ? padded_bytes(dst) - ggml_nbytes(dst) + scratch : 0;
}

bool ggml_metal_sfi_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * dst) {
    const operation * op = operation_of(dst);
    if (!op) {
        return false;
    }
    encoder e(library_of(dev), enc, dst);
    if (writes_a_source(dst)) {
        e.barrier();
    }
    op->compute(e, dst);
    if (writes_a_source(dst)) {
        e.barrier();
    }
    return true;
}
