#include "shim-backend.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

static bool computes_nothing(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_VIEW || op->op == GGML_OP_PERMUTE
        || op->op == GGML_OP_TRANSPOSE;
}

// ---- backend -----------------------------------------------------------------------------------------------------------

static const char * backend_name(ggml_backend_t) { return shim_name; }
static void backend_free(ggml_backend_t backend) { delete backend; }

static ggml_status graph_compute(ggml_backend_t, ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (!computes_nothing(graph->nodes[i]) && !ggml_is_empty(graph->nodes[i])) {
            shim_compute(graph->nodes[i]);
        }
    }
    return GGML_STATUS_SUCCESS;
}

static ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x5f, 0x1c, 0x26, 0x03, 0x12, 0x03, 0x80, 0x01, 0x73, 0x68, 0x69, 0x6d, 0x67, 0x70, 0x75, 0x01 };
    return &guid;
}

// ---- device ------------------------------------------------------------------------------------------------------------

static const char * device_name(ggml_backend_dev_t) { return shim_name; }
static const char * device_description(ggml_backend_dev_t) { return "kernels of a GPU, run on the CPU by the tests"; }
static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = shim_name;
    props->description = device_description(dev);
    props->type        = device_type(dev);
    props->caps.buffer_from_host_ptr = true;
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_backend_i functions = {};
    functions.get_name      = backend_name;
    functions.free          = backend_free;
    functions.graph_compute = graph_compute;
    return new ggml_backend { backend_guid(), functions, dev, nullptr };
}

static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }
static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) { return computes_nothing(op) || shim_supported(op); }
static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return ggml_backend_buft_is_host(buft); }

// ---- registration --------------------------------------------------------------------------------------------------------

static const char * reg_name(ggml_backend_reg_t) { return shim_name; }
static size_t reg_count(ggml_backend_reg_t) { return 1; }

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    static ggml_backend_device device = {};
    device.iface.get_name        = device_name;
    device.iface.get_description = device_description;
    device.iface.get_memory      = device_memory;
    device.iface.get_type        = device_type;
    device.iface.get_props       = device_props;
    device.iface.init_backend    = device_init;
    device.iface.get_buffer_type = device_buft;
    device.iface.supports_op     = device_supports_op;
    device.iface.supports_buft   = device_supports_buft;
    device.reg = reg;
    return &device;
}

static ggml_backend_reg_t shim_reg() {
    static ggml_backend_reg reg = {};
    reg.api_version            = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = reg_name;
    reg.iface.get_device_count = reg_count;
    reg.iface.get_device       = reg_device;
    return &reg;
}

GGML_BACKEND_DL_IMPL(shim_reg)
