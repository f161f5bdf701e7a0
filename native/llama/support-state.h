// What fast steps need of a sequence, as bytes: for another context of the same model, whose cells may be more or fewer.
//
//     head, positions of the kept queries [n_queries]
//     of each layer that keeps queries:
//         queries [n_embd_q, n_queries]
//         frozen: selected [n_selected, n_head_kv], stability [4, n_head_kv]
//         sketch: scale, basis, least and errors of [n_head_kv], then of each KV head the blocks and the records of its first j1 cells
//
// How long it is follows from the head alone, and is compared before anything is taken. Cell i must hold token i: codes of 16 cells lie
// together.

#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <cstring>

// Passes over the bytes of a state: counts them, or moves them out of tensors, or into them.
class llama_state_cursor {
public:
    enum direction { COUNT, OUT, IN };

    explicit llama_state_cursor(direction what, char * bytes = nullptr, size_t at = 0) : at(at), what(what), bytes(bytes) {}

    void host(void * p, size_t n);
    void tensor(ggml_tensor * t, size_t offset, size_t n);
    void skip(size_t n) { at += n; }

    size_t at;

private:
    direction what;
    char    * bytes;
};

// Whether all of n values at bytes of any alignment are as they should be.
template <class T, class F> bool llama_all_at(const char * bytes, size_t n, F && good) {
    for (size_t i = 0; i < n; ++i) {
        T x;
        memcpy(&x, bytes + i*sizeof(T), sizeof(T));
        if (!good(x)) {
            return false;
        }
    }
    return true;
}

// Whether n values are cells below a number, or pads.
inline bool llama_cells_at(const char * bytes, size_t n, int32_t below) {
    return llama_all_at<int32_t>(bytes, n, [=](int32_t x) { return x >= -1 && x < below; });
}
