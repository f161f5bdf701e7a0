// The kernels of native/ggml/metal and the host's side of them, with the CPU in the place of the GPU: here are those functions
// of ggml-metal-device.h that our glue calls.

#include "ggml-sfi-metal.h"
#include "shim-backend.h"

#include "metal-shim.h"

#include "sfi-kernels.metal" // all of them, put together as they ship

#undef kernel
#undef constant
#undef device
#undef threadgroup
#undef thread

const char * const shim_name = "METAL-shim";

// ---- encoder -----------------------------------------------------------------------------------------------------------

struct ggml_metal_encoder {
    const sfi_shim::metal_kernel * kernel;
    std::vector<char>   args;
    std::vector<void *> buffers;
    std::vector<std::function<void()>> waiting;
};

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, ggml_metal_pipeline_with_params pipeline) {
    if (!pipeline.pipeline) {
        sfi_shim::fail("no such kernel");
    }
    e->kernel = (const sfi_shim::metal_kernel *) pipeline.pipeline;
    e->args.clear();
    e->buffers.clear();
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int idx) {
    if (idx != 0 || size != e->kernel->args_size || size > 4096) {
        sfi_shim::fail("not the arguments of the kernel, or more than Metal takes");
    }
    e->args.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, ggml_metal_buffer_id buffer, int idx) {
    if (!buffer.metal || idx != (int) e->buffers.size() + 1) {
        sfi_shim::fail("buffers: one is missing");
    }
    e->buffers.push_back((char *) buffer.metal + buffer.offs);
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t e, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    if (e->args.empty() || e->buffers.size() != e->kernel->n_buffers) {
        sfi_shim::fail("a kernel without its buffers");
    }
    e->waiting.push_back([kernel = e->kernel, args = e->args, buffers = e->buffers, grid = dim3(tg0, tg1, tg2), block = dim3(tptg0, tptg1, tptg2)] {
        sfi_shim::launch(grid, block, [&] { kernel->run(args.data(), buffers.data()); });
    });
}

// Metal may run what no barrier keeps apart in any order; here it is the one that is wrong if a barrier is missing
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t e) {
    for (; !e->waiting.empty(); e->waiting.pop_back()) {
        e->waiting.back()();
    }
}

// ---- device ------------------------------------------------------------------------------------------------------------

struct ggml_metal_device {
    ggml_metal_device_props props;
};

static ggml_metal_device_t shim_device() {
    static ggml_metal_device device = {};
    device.props.supports_gpu_family_apple7 = true;
    return &device;
}

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) {
    return &dev->props;
}

ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char *, bool) {
    static char compiled; // with this file
    return (ggml_metal_library_t) &compiled;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t, const char * base, const char *, ggml_metal_cv_t) {
    const auto found = sfi_shim::metal_kernels().find(base);
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = found == sfi_shim::metal_kernels().end() ? nullptr : (ggml_metal_pipeline_t) &found->second;
    return res;
}

// ---- the node at work ----------------------------------------------------------------------------------------------------

// Its result and what follows it: an allocation of their own, so that a sanitizer sees its end, and full of what nobody
// should read.
static const ggml_tensor * result;
static std::vector<uint32_t> result_memory;

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    static char nothing[1]; // the memory of an empty tensor
    return { t == result ? result_memory.data() : ggml_is_empty(t) ? nothing : t->data, 0 };
}

bool shim_supported(const ggml_tensor * op) {
    return ggml_metal_sfi_supported(shim_device(), op);
}

void shim_compute(ggml_tensor * op) {
    ggml_metal_encoder e = {};
    const size_t extra = ggml_metal_sfi_extra(op);
    result = extra > 0 ? op : nullptr; // without, it may lie in one of its sources
    result_memory.assign((ggml_nbytes(op) + extra + sizeof(uint32_t) - 1)/sizeof(uint32_t), 0x7fbadbadu);
    result_memory.shrink_to_fit();
    if (!ggml_metal_sfi_encode(shim_device(), &e, op)) {
        sfi_shim::fail("not one of ours");
    }
    ggml_metal_encoder_memory_barrier(&e);
    if (result) {
        memcpy(op->data, result_memory.data(), ggml_nbytes(op));
    }
}
