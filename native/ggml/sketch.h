// What the sketch operations share: the format of ggml-sfi.h as fields of planes, and the parts of a basis.

#pragma once

#include "ggml-sfi.h"

#include <cstdint>
#include <cstring>

namespace sfi {

constexpr int sketch_cells          = 16;  // of a block
constexpr int sketch_plane          = 64;  // bytes
constexpr int sketch_max_components = 256; // of K, and of V
constexpr int sketch_mean_cells     = 8192; // a second look needs a share that is measured by the mean share of so many at most

// bits of component j, of which the first n4 have 4, the next n2 have 2 and the rest 1
inline int sketch_bits(int64_t j, int64_t n4, int64_t n2) { return j < n4 ? 4 : j < n4 + n2 ? 2 : 1; }

// Some bits of every byte of one plane. K: byte 4*i + r has component 4*g + r of cell i, for the g-th field.
// V: byte 4*d + r has component 16*g + d of cell 4*s + r, for the fields [g][s].
struct sketch_field {
    int plane, shift, mask;

    int bits() const { return mask == 15 ? 4 : mask == 3 ? 2 : 1; }
};

struct sketch_layout {
    int n_k, n_v;
    int k_planes, v_planes;
    int first_planes; // of K, that lie in blocks: all, if there is one look
    int record_bytes; // of a cell: what lies behind the blocks; 0 if there is one look
    int n_k_fields, n_v_groups;
    sketch_field k[sketch_max_components/4];
    int k_first[sketch_max_components/8 + 1]; // of a plane of K: its first field; its fields are those before the next one's
    int k_kind[sketch_max_components/8];      // of a plane of K: how many of its fields have 4 and 2 bits
    sketch_field v[sketch_max_components/16][4];

    explicit sketch_layout(const ggml_tensor * dst) {
        const ggml_sketch_format f = format_of(dst);
        n_k = f.n_k4 + f.n_k2 + f.n_k1;
        n_v = f.n_v4 + f.n_v2;

        int bit = 0; // of the four bytes of a cell, each byte's
        n_k_fields = 0;
        for (int j = 0; j < n_k; j += 4) {
            const int bits = sketch_bits(j, f.n_k4, f.n_k2);
            if (bit % 8 == 0) {
                k_first[bit/8] = n_k_fields;
            }
            k[n_k_fields++] = { bit/8, bit % 8, (1 << bits) - 1 };
            bit += bits;
        }
        k_planes = bit/8;
        for (int i = 0; i < k_planes; ++i) {
            int n4 = 0, n2 = 0;
            for (int j = 0; j < n_k_fields; ++j) {
                n4 += k[j].plane == i && k[j].mask == 15;
                n2 += k[j].plane == i && k[j].mask == 3;
            }
            k_kind[i] = kind(n4, n2);
        }
        k_first[k_planes] = n_k_fields;

        int plane = k_planes;
        n_v_groups = 0;
        for (int j = 0; j < n_v; j += 16) {
            const int bits = j < f.n_v4 ? 4 : 2;
            for (int s = 0; s < 4; ++s) {
                v[n_v_groups][s] = { plane + s*bits/8, s*bits % 8, (1 << bits) - 1 };
            }
            plane += bits/2;
            ++n_v_groups;
        }
        v_planes = plane - k_planes;
        first_planes = f.n_first > 0 ? f.n_first : k_planes;
        record_bytes = f.n_first > 0 ? 4*(k_planes - first_planes + v_planes) : 0;
    }

    static constexpr int kind(int n4, int n2) { return 8*n4 + n2; }
    bool    looks_twice() const { return record_bytes > 0; }
    int64_t block_bytes() const { return (looks_twice() ? first_planes : k_planes + v_planes)*sketch_plane; }
    int     k_mask(int j) const { return k[j/4].mask; }

    // in a record: where the four bytes of a further plane of K are, and the codes of V of a group
    int record_k(int plane) const { return 4*(plane - first_planes); }
    int record_v(int group) const { return 4*(v[group][0].plane - first_planes); }

    static ggml_sketch_format format_of(const ggml_tensor * dst) { // op_params: scale, softcap, format, n_list, second_look
        ggml_sketch_format f;
        memcpy(&f, (const char *) dst->op_params + 2*sizeof(float), sizeof(f));
        return f;
    }
    static bool supported(const ggml_tensor * dst) {
        const ggml_sketch_format f = format_of(dst);
        return f.n_k4 + f.n_k2 + f.n_k1 <= sketch_max_components && f.n_v4 + f.n_v2 <= sketch_max_components;
    }
};

// the cells that a scan may look at
inline int64_t sketch_n_list(const ggml_tensor * scan) {
    int32_t n;
    memcpy(&n, (const char *) scan->op_params + 2*sizeof(float) + sizeof(ggml_sketch_format), sizeof(n));
    return n;
}

// shares of 1/n_used that a cell needs to be looked at again
inline float sketch_second_look(const ggml_tensor * scan) {
    float x;
    memcpy(&x, (const char *) scan->op_params + 2*sizeof(float) + sizeof(ggml_sketch_format) + sizeof(int32_t), sizeof(x));
    return x;
}

// mean, then the rows of enc and dec, [n, n_embd] each
struct sketch_basis {
    const float       * mean, * enc;
    const ggml_fp16_t * dec;

    // of K at the beginning of a head's basis, of V at its end
    static sketch_basis of_k(const ggml_tensor * basis, int64_t h, int64_t n, int64_t n_embd) {
        return at((const float *) basis->data + h*basis->ne[0], n, n_embd);
    }
    static sketch_basis of_v(const ggml_tensor * basis, int64_t h, int64_t n, int64_t n_embd) {
        return at((const float *) basis->data + (h + 1)*basis->ne[0] - size(n, n_embd), n, n_embd);
    }
    static sketch_basis at(const float * p, int64_t n, int64_t n_embd) {
        return { p, p + n_embd, (const ggml_fp16_t *) (p + (1 + n)*n_embd) };
    }
    static int64_t size(int64_t n, int64_t n_embd) { return (1 + n + n/2)*n_embd; } // in floats
};

} // namespace sfi
