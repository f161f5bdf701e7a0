// GGML_OP_SKETCH_ENCODE on the CPU.
//
// A block of codes belongs to one thread, because cells share bytes; the owner changes with the head, so that a single
// cell, as every decoded token brings one, is work for all threads.
//
//   pass 1  gather the rows of up to 16 listed cells, as floats, the mean subtracted
//   pass 2  project
//   pass 3  round, and put each code into its bits

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sketch.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int tile_cells = sfi::sketch_cells;

struct task {
    const ggml_tensor * basis, * k, * v, * cells;
    char   * codes;
    int64_t  head_bytes, n_blocks;
    sfi::sketch_layout l;
    sfi::tile_ops      ops;
    float * rows;       // of this thread: [tile_cells, n_embd]
    float * projected;  // [components, tile_cells]

    task(const ggml_compute_params * params, ggml_tensor * dst) :
            basis(dst->src[1]), k(dst->src[2]), v(dst->src[3]), cells(dst->src[4]), codes((char *) dst->data),
            head_bytes(dst->ne[0]*dst->ne[1]), n_blocks(dst->ne[1]), l(dst),
            ops(sfi::tile_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, params->use_ref)) {
        rows      = (float *) params->wdata + params->ith*scratch(dst);
        projected = rows + tile_cells*std::max(k->ne[0], v->ne[0]);
    }

    static int64_t scratch(const ggml_tensor * dst) {
        return tile_cells*(std::max(dst->src[2]->ne[0], dst->src[3]->ne[0]) + sfi::sketch_max_components) + 16;
    }
};

// pass 1
void centred_row(const ggml_tensor * t, int64_t h, int64_t cell, const float * mean, float * to) {
    const char * from = (const char *) t->data + h*t->nb[2] + cell*t->nb[1];
    const auto to_float = ggml_get_type_traits(t->type)->to_float;
    if (to_float) {
        to_float(from, to, t->ne[0]);
    } else {
        memcpy(to, from, t->ne[0]*sizeof(float));
    }
    for (int64_t i = 0; i < t->ne[0]; ++i) {
        to[i] -= mean[i];
    }
}

// passes 1 and 2: a.projected[j, c] = enc_j . (x_c - mean)
void project(const task & a, const ggml_tensor * t, const sfi::sketch_basis & b, int n_components, int64_t h,
             const int32_t * cells, int n) {
    const int n_embd = (int) t->ne[0];
    const char * start[tile_cells];
    for (int c = 0; c < n; ++c) {
        float * row = a.rows + c*n_embd;
        centred_row(t, h, cells[c], b.mean, row);
        start[c] = (const char *) row;
    }
    a.ops.dot(b.enc, n_components, n_embd, { start, 0, n, nullptr, 0, 0, 0 }, a.projected, tile_cells);
}

int code_of(float x, int largest) {
    x += 0.5f*(float) largest;
    return (int) lrintf(x > 0.0f ? x < (float) largest ? x : (float) largest : 0.0f); // NaN: 0
}

void put(char * at, int shift, int mask, int code) {
    uint8_t * p = (uint8_t *) at;
    *p = (uint8_t) ((*p & ~(mask << shift)) | code << shift);
}

// the codes of one cell
struct place {
    const sfi::sketch_layout & l;
    char * block, * record;
    int    i; // in the block

    void put_k(int j, int code) const {
        const sfi::sketch_field & f = l.k[j/4];
        put(f.plane < l.first_planes ? block + f.plane*sfi::sketch_plane + 4*i + j % 4 : record + l.record_k(f.plane) + j % 4, f.shift, f.mask, code);
    }
    void put_v(int j, int code) const {
        const int d = j % 16;
        const sfi::sketch_field & f = l.v[j/16][i/4];
        if (l.looks_twice()) {
            put(record + l.record_v(j/16) + d*f.bits()/8, d*f.bits() % 8, f.mask, code);
        } else {
            put(block + f.plane*sfi::sketch_plane + 4*d + i % 4, f.shift, f.mask, code);
        }
    }
};

void encode_tile(const task & a, int64_t h, const int32_t * cells, int n) {
    char * const head = a.codes + h*a.head_bytes, * const records = head + a.n_blocks*a.l.block_bytes();
    const auto place_of = [&](int c) {
        return place { a.l, head + cells[c]/sfi::sketch_cells*a.l.block_bytes(), records + (int64_t) cells[c]*a.l.record_bytes, cells[c] % sfi::sketch_cells };
    };

    project(a, a.k, sfi::sketch_basis::of_k(a.basis, h, a.l.n_k, a.k->ne[0]), a.l.n_k, h, cells, n);
    for (int c = 0; c < n; ++c) {
        const place to = place_of(c);
        for (int j = 0; j < a.l.n_k; ++j) {
            to.put_k(j, code_of(a.projected[j*tile_cells + c], a.l.k_mask(j)));
        }
    }
    if (a.l.n_v == 0) {
        return;
    }
    project(a, a.v, sfi::sketch_basis::of_v(a.basis, h, a.l.n_v, a.v->ne[0]), a.l.n_v, h, cells, n);
    for (int c = 0; c < n; ++c) {
        const place to = place_of(c);
        for (int j = 0; j < a.l.n_v; ++j) {
            to.put_v(j, code_of(a.projected[j*tile_cells + c], a.l.v[j/16][0].mask));
        }
    }
}

} // namespace

void sfi::sketch_encode(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const int32_t * list = (const int32_t *) a.cells->data;

    for (int64_t h = 0; h < dst->ne[2]; ++h) {
        int32_t tile[tile_cells];
        int n = 0;
        for (int64_t i = 0; i < a.cells->ne[0]; ++i) {
            const bool is_cell = (uint64_t) list[i] < (uint64_t) a.k->ne[1]; // negative cells are huge
            if (is_cell && (list[i]/sketch_cells + h) % params->nth == params->ith) {
                tile[n++] = list[i];
            }
            if (n == tile_cells) {
                encode_tile(a, h, tile, n);
                n = 0;
            }
        }
        if (n > 0) {
            encode_tile(a, h, tile, n);
        }
    }
}

size_t sfi::sketch_encode_work_size(const ggml_tensor * dst, int n_threads) {
    return n_threads*task::scratch(dst)*sizeof(float);
}

bool sfi::sketch_encode_supported(const ggml_tensor * dst) {
    const auto is_row = [](const ggml_tensor * t) {
        return t->ne[0] % 16 == 0 && t->ne[0] % ggml_blck_size(t->type) == 0
            && (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float);
    };
    return is_row(dst->src[2]) && is_row(dst->src[3]) && sketch_layout::supported(dst);
}
