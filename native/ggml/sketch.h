// What backends keep ready of a sketch: its fields of planes, and the parts of a basis.

#pragma once

#include "sfi-params.h"

#include <cstdint>

namespace sfi {

constexpr int sketch_max_components = 256;  // of K, and of V
constexpr int sketch_mean_cells     = 8192; // a second look needs a share that is measured by the mean share of so many at most

// four components of K: some bits of every byte of a plane
struct sketch_field {
    int plane, shift, mask;
};

struct sketch_layout {
    ggml_sketch_format format;
    int n_k, n_v;
    int k_planes, first_planes;
    int record_bytes;
    int n_k_fields, n_v_groups;
    sketch_field k[sketch_max_components/4];
    int k_first[sketch_max_components/8 + 1]; // of a plane of K: its first field; its fields are those before the next one's
    int k_kind[sketch_max_components/8];      // of a plane of K: how many of its fields have 4 and 2 bits

    explicit sketch_layout(const ggml_tensor * dst) : format(format_of(dst)) {
        n_k = sketch_n_k(format);
        n_v = sketch_n_v(format);
        k_planes     = sketch_k_planes(format);
        first_planes = format.n_first;
        record_bytes = sketch_record_bytes(format);
        n_k_fields   = n_k/4;
        n_v_groups   = n_v/16;
        for (int i = 0; i < k_planes; ++i) {
            k_kind[i] = 0;
        }
        for (int i = 0; i < n_k_fields; ++i) {
            const int bit = sketch_bit_of_k(format, 4*i), bits = sketch_bits_k(format, 4*i);
            k[i] = { bit/8, bit % 8, (1 << bits) - 1 };
            if (bit % 8 == 0) {
                k_first[bit/8] = i;
            }
            k_kind[bit/8] += bits == 4 ? kind(1, 0) : bits == 2 ? kind(0, 1) : 0;
        }
        k_first[k_planes] = n_k_fields;
    }

    static constexpr int kind(int n4, int n2) { return 8*n4 + n2; }
    int64_t block_bytes() const { return sketch_block_bytes(format); }
    int     k_mask(int j) const { return k[j/4].mask; }
    int     v_mask(int j) const { return (1 << sketch_bits_v(format, j)) - 1; }
    int     record_k(int plane) const { return sketch_record_k(format, plane); }
    int     record_v(int j)     const { return sketch_record_v(format) + sketch_bit_of_v(format, j)/8; } // where the byte of component j is

    static bool supported(const ggml_tensor * dst) {
        const ggml_sketch_format f = format_of(dst);
        return sketch_n_k(f) <= sketch_max_components && sketch_n_v(f) <= sketch_max_components;
    }
};

// mean, then the rows of enc and dec, [n, n_embd] each
struct sketch_basis {
    const float       * mean, * enc;
    const ggml_fp16_t * dec;

    // of K at the beginning of a head's basis, of V at its end
    static sketch_basis of_k(const ggml_tensor * basis, int64_t h, int64_t n, int64_t n_embd) {
        return at((const float *) basis->data + h*basis->ne[0], n, n_embd);
    }
    static sketch_basis of_v(const ggml_tensor * basis, int64_t h, int64_t n, int64_t n_embd) {
        return at((const float *) basis->data + (h + 1)*basis->ne[0] - sketch_half_size(n, n_embd), n, n_embd);
    }
    static sketch_basis at(const float * p, int64_t n, int64_t n_embd) {
        return { p, p + sketch_enc_at(n_embd), (const ggml_fp16_t *) (p + sketch_dec_at(n, n_embd)) };
    }
};

} // namespace sfi
