// How a sketch lies in memory: one text for C, C++, CUDA and Metal. What a sketch is: ggml-sfi.h.
//
// Components are ordered by their bits, the 4-bit ones first. Of the codes of a KV head the first planes of K come first, for blocks
// of 16 cells: a plane has 64 bytes, 4*i to 4*i + 3 being those of cell i. Components are taken four at a time, and each four get
// `bits` bits of a byte, from the lowest bit upwards; a byte that is full ends the plane. Component 4g + r lies in byte 4*i + r.
// Behind the blocks each cell has a record: its four bytes of each further plane of K, then its codes of V, one after the other from
// the lowest bits upwards.
//
// The basis of a KV head, F32 but for dec, which every step reads: F16, two values in the place of one
//   mean_k [n_embd_k], enc_k [n_k, n_embd_k], dec_k [n_k, n_embd_k], then the same of V

#ifndef SFI_SKETCH_LAYOUT_H // no pragma: to Metal's kernels this comes as a part of their text
#define SFI_SKETCH_LAYOUT_H

#ifdef __METAL_VERSION__
#pragma clang diagnostic ignored "-Weverything" // ggml-metal takes a warning for an error when it compiles a text
#include <metal_stdlib>
#else
#include <stdint.h>
#endif
#ifdef __CUDACC__
#define SFI_LAYOUT static __host__ __device__ inline
#else
#define SFI_LAYOUT static inline
#endif

struct ggml_sketch_format {
    int32_t n_k4, n_k2, n_k1; // components of K with 4, 2 and 1 bits; multiples of 4; 4*n_k4 + 2*n_k2 + n_k1 is one of 32
    int32_t n_v4, n_v2;       // components of V with 4 and 2 bits; multiples of 16
    int32_t n_first;          // planes of K in the first look, at least one
};

enum {
    sketch_cells = 16, // of a block
    sketch_plane = 64, // bytes
};

SFI_LAYOUT int32_t sketch_n_k(struct ggml_sketch_format f) { return f.n_k4 + f.n_k2 + f.n_k1; }
SFI_LAYOUT int32_t sketch_n_v(struct ggml_sketch_format f) { return f.n_v4 + f.n_v2; }
SFI_LAYOUT int32_t sketch_k_planes(struct ggml_sketch_format f) { return (4*f.n_k4 + 2*f.n_k2 + f.n_k1)/32; }

// bits of component j
SFI_LAYOUT int32_t sketch_bits(int64_t j, int64_t n4, int64_t n2) { return j < n4 ? 4 : j < n4 + n2 ? 2 : 1; }
SFI_LAYOUT int32_t sketch_bits_k(struct ggml_sketch_format f, int32_t j) { return sketch_bits(j, f.n_k4, f.n_k2); }
SFI_LAYOUT int32_t sketch_bits_v(struct ggml_sketch_format f, int32_t j) { return sketch_bits(j, f.n_v4, f.n_v2); }

// Where its lowest bit lies: of K in each of the four bytes of a cell, counted through all planes; of V counted from its first code.
SFI_LAYOUT int32_t sketch_bit_of_k(struct ggml_sketch_format f, int32_t j) {
    const int32_t g = j/4, g4 = f.n_k4/4, g2 = f.n_k2/4;
    return g < g4 ? 4*g : g < g4 + g2 ? 4*g4 + 2*(g - g4) : 4*g4 + 2*g2 + (g - g4 - g2);
}
SFI_LAYOUT int32_t sketch_bit_of_v(struct ggml_sketch_format f, int32_t j) {
    return j < f.n_v4 ? 4*j : 4*f.n_v4 + 2*(j - f.n_v4);
}

// bytes of a block; of a record, and of those before the plane of K or V in it
SFI_LAYOUT int32_t sketch_block_bytes(struct ggml_sketch_format f) { return sketch_plane*f.n_first; }
SFI_LAYOUT int32_t sketch_record_k(struct ggml_sketch_format f, int32_t plane) { return 4*(plane - f.n_first); }
SFI_LAYOUT int32_t sketch_record_v(struct ggml_sketch_format f) { return sketch_record_k(f, sketch_k_planes(f)); }
SFI_LAYOUT int32_t sketch_record_bytes(struct ggml_sketch_format f) { return sketch_record_v(f) + (4*f.n_v4 + 2*f.n_v2)/8; }

// where blocks and records begin among the codes of a KV head
SFI_LAYOUT int64_t sketch_block_at(struct ggml_sketch_format f, int64_t cell) { return cell/sketch_cells*sketch_block_bytes(f); }
SFI_LAYOUT int64_t sketch_record_at(struct ggml_sketch_format f, int64_t n_blocks, int64_t cell) {
    return n_blocks*sketch_block_bytes(f) + cell*sketch_record_bytes(f);
}

// the byte that has a code, and its lowest bit in that
struct sketch_place {
    int64_t byte;
    int32_t shift;
};

SFI_LAYOUT struct sketch_place sketch_place_k(struct ggml_sketch_format f, int64_t n_blocks, int64_t cell, int32_t j) {
    const int32_t bit = sketch_bit_of_k(f, j), plane = bit/8;
    struct sketch_place p;
    p.byte  = j % 4 + (plane < f.n_first ? sketch_block_at(f, cell) + sketch_plane*plane + 4*(cell % sketch_cells)
                                         : sketch_record_at(f, n_blocks, cell) + sketch_record_k(f, plane));
    p.shift = bit % 8;
    return p;
}

SFI_LAYOUT struct sketch_place sketch_place_v(struct ggml_sketch_format f, int64_t n_blocks, int64_t cell, int32_t j) {
    const int32_t bit = sketch_bit_of_v(f, j);
    struct sketch_place p;
    p.byte  = sketch_record_at(f, n_blocks, cell) + sketch_record_v(f) + bit/8;
    p.shift = bit % 8;
    return p;
}

// a half of a basis, that of K or of V with n components: its size, and where enc and dec begin; in floats
SFI_LAYOUT int64_t sketch_enc_at(int64_t n_embd) { return n_embd; }
SFI_LAYOUT int64_t sketch_dec_at(int64_t n, int64_t n_embd) { return n_embd*(1 + n); }
SFI_LAYOUT int64_t sketch_half_size(int64_t n, int64_t n_embd) { return n_embd*(1 + n + n/2); }

#endif
