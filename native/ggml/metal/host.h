// The host's side of the operations on Metal: which kernels run with what. Of Metal it needs a few functions of
// ggml-metal-device.h, for which the tests have others (native/tests/gpu-shim).

#pragma once

#include "args.h"
#include "ggml-metal-device.h"
#include "gpu-host.h"

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace sfi_metal {

using sfi::evidence_rows;
using sfi::float_param;
using sfi::has_aligned_rows;
using sfi::n_chunks;
using sfi::selector_of;

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
    void run(const char * kernel, const Args & args, std::initializer_list<place> buffers, groups grid, int n_threads) {
        run(kernel, &args, sizeof(args), buffers, grid, n_threads);
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

// The operations. *_supported(): there are kernels for what the constructor of the node accepted. *_scratch(): bytes that the
// operation needs beside its result.
bool   sparse_attn_supported      (const ggml_tensor * dst);
size_t sparse_attn_scratch        (const ggml_tensor * dst);
void   sparse_attn                (encoder & e, const ggml_tensor * dst);
bool   support_evidence_supported (const ggml_tensor * dst);
size_t support_evidence_scratch   (const ggml_tensor * dst);
void   support_evidence           (encoder & e, const ggml_tensor * dst);
bool   support_select_supported   (const ggml_tensor * dst);
size_t support_select_scratch     (const ggml_tensor * dst);
void   support_select             (encoder & e, const ggml_tensor * dst);
bool   support_stability_supported(const ggml_tensor * dst);
size_t support_stability_scratch  (const ggml_tensor * dst);
void   support_stability          (encoder & e, const ggml_tensor * dst);
bool   sketch_encode_supported    (const ggml_tensor * dst);
size_t sketch_encode_scratch      (const ggml_tensor * dst);
void   sketch_encode              (encoder & e, const ggml_tensor * dst);
bool   sketch_scan_supported      (const ggml_tensor * dst);
size_t sketch_scan_scratch        (const ggml_tensor * dst);
void   sketch_scan                (encoder & e, const ggml_tensor * dst);

struct operation {
    bool   (*supported)(const ggml_tensor * dst);
    size_t (*scratch)  (const ggml_tensor * dst);
    void   (*encode)   (encoder & e, const ggml_tensor * dst);
};

// null: not one of ours
inline const operation * operation_of(const ggml_tensor * dst) {
    static const operation attn      = { sparse_attn_supported,       sparse_attn_scratch,       sparse_attn       };
    static const operation evidence  = { support_evidence_supported,  support_evidence_scratch,  support_evidence  };
    static const operation select    = { support_select_supported,    support_select_scratch,    support_select    };
    static const operation stability = { support_stability_supported, support_stability_scratch, support_stability };
    static const operation encode    = { sketch_encode_supported,     sketch_encode_scratch,     sketch_encode     };
    static const operation scan      = { sketch_scan_supported,       sketch_scan_scratch,       sketch_scan       };
    switch (dst->op) {
        case GGML_OP_SPARSE_ATTN:       return &attn;
        case GGML_OP_SUPPORT_EVIDENCE:  return &evidence;
        case GGML_OP_SUPPORT_SELECT:    return &select;
        case GGML_OP_SUPPORT_STABILITY: return &stability;
        case GGML_OP_SKETCH_ENCODE:     return &encode;
        case GGML_OP_SKETCH_SCAN:       return &scan;
        default:                        return nullptr;
    }
}

// ---- small things that several operations need -----------------------------------------------------------------------------

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

// in the names of kernels; null: there are none for this type of K and V
inline const char * kv_type_name(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return "f16";
        case GGML_TYPE_BF16: return "bf16";
        case GGML_TYPE_Q8_0: return "q8_0";
        case GGML_TYPE_Q4_0: return "q4_0";
        default:             return nullptr;
    }
}

} // namespace sfi_metal
