// The host's side of the operations on Metal: which kernels run with what. Of Metal it needs a few functions of
// ggml-metal-device.h, for which the tests have others (native/tests/gpu-shim).

#pragma once

#include "ggml-metal-device.h"
#include "gpu/fill.h"
#include "gpu/operations.h"
#include "kernels.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>

namespace sfi_metal {

using namespace sfi_gpu;

// Memory of a tensor, or of the operation's scratch if there is no tensor.
struct place {
    const ggml_tensor * tensor;
    size_t              offset; // bytes
};

struct groups { // of threads; their number in each direction
    int x, y = 1, z = 1;
};

// Encodes the kernels of one node.
class encoder {
public:
    encoder(ggml_metal_library_t library, ggml_metal_encoder_t enc, const ggml_tensor * dst) : library(library), enc(enc), dst(dst) {}

    // args are buffer 0 of the kernel, buffers those from 1; an empty grid runs nothing
    template <class Args>
    void run(const std::string & kernel, const Args & args, std::initializer_list<place> buffers, groups grid, int n_threads) {
        run(kernel.c_str(), &args, sizeof(args), buffers, grid, n_threads);
    }
    // what was run before is done, and visible, before what is run after begins
    void barrier();

private:
    const ggml_metal_library_t library;
    const ggml_metal_encoder_t enc;
    const ggml_tensor * const  dst;

    void run(const char * kernel, const void * args, size_t size, std::initializer_list<place> buffers, groups grid, int n_threads);
    ggml_metal_buffer_id buffer_of(const place & p) const;
};

SFI_GPU_OPERATIONS(encoder)

// ---- small things that several operations need -----------------------------------------------------------------------------

// a kernel's name with what it is made for
template <class... Args>
std::string name_of(const char * format, Args... args) {
    char name[64];
    snprintf(name, sizeof(name), format, args...);
    return name;
}

inline place whole(const ggml_tensor * t) { return { t, 0 }; }

// a kernel's buffer must be some memory even if it never looks there
inline place whole_or(const ggml_tensor * t, const ggml_tensor * other) { return { t ? t : other, 0 }; }

// the parts of an operation's scratch
class scratch_parts {
public:
    place take(int64_t n, size_t element) {
        const place p = { nullptr, used };
        used += (n*element + 15)/16*16;
        return p;
    }
    size_t size() const { return used; }

private:
    size_t used = 0;
};

// in the names of kernels, of those of is_kv_type()
inline const char * kv_type_name(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return "f16";
        case GGML_TYPE_BF16: return "bf16";
        case GGML_TYPE_Q8_0: return "q8_0";
        default:             return "q4_0";
    }
}

} // namespace sfi_metal
