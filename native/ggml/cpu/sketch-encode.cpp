// SKETCH_ENCODE on the CPU.
//
// A block of codes belongs to one thread, because cells share bytes; the owner changes with the head, so that a single
// cell, as every decoded token brings one, is work for all threads.
//
//   pass 1  gather the rows of up to 64 listed cells, as columns of floats, the mean subtracted
//   pass 2  project
//   pass 3  round, and put each code into its bits

#include "sfi-ops.h"

#include "arena.h"
#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sketch.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int tile_cells = 64;

// of one thread
struct own_rows {
    float * columns;    // [n_embd, tile_cells]
    float * projected;  // [components, tile_cells]
    float * few_rows;   // [max_vector, n_embd]

    own_rows(const ggml_tensor * dst, sfi::arena & from) {
        const sfi::sketch_layout l(dst);
        const int64_t n_embd = std::max(dst->src[2]->ne[0], dst->src[3]->ne[0]);
        from.take(columns,   tile_cells*n_embd);
        from.take(projected, tile_cells*std::max(l.n_k, l.n_v));
        from.take(few_rows,  sfi::max_vector*n_embd);
    }
};

struct task {
    const ggml_tensor * basis, * k, * v, * cells;
    char   * codes;
    int64_t  head_bytes, n_blocks;
    sfi::sketch_layout l;
    sfi::tile_ops of_k, of_v;
    const own_rows & own;

    task(const ggml_compute_params * params, ggml_tensor * dst, const own_rows & own) :
            basis(dst->src[1]), k(dst->src[2]), v(dst->src[3]), cells(dst->src[4]), codes((char *) dst->data),
            head_bytes(dst->ne[0]*dst->ne[1]), n_blocks(dst->ne[1]), l(dst),
            of_k(sfi::tile_ops_for(k->type, GGML_TYPE_F32, params->use_ref)), of_v(sfi::tile_ops_for(v->type, GGML_TYPE_F32, params->use_ref)), own(own) {}
};

// passes 1 and 2: projected[j, c] = enc_j . (x_c - mean)
void project(const task & a, const ggml_tensor * t, const sfi::tile_ops & ops, const sfi::sketch_basis & b, int n_components, int64_t h,
             const int32_t * cells, int n) {
    const int n_embd = (int) t->ne[0];
    const char * start[tile_cells];
    for (int c = 0; c < n; ++c) {
        start[c] = (const char *) t->data + h*t->nb[2] + cells[c]*t->nb[1];
    }
    ops.transpose(n_embd, { start, 0, n, nullptr, 0, 0, 0 }, a.own.columns, tile_cells, a.own.few_rows);
    for (int i = 0; i < n_embd; ++i) {
        for (int c = 0; c < tile_cells; ++c) {
            a.own.columns[i*tile_cells + c] -= b.mean[i];
        }
    }
    ops.gemm(b.enc, n_components, n_embd, a.own.columns, tile_cells, n, a.own.projected, tile_cells);
}

// NaN: 0
uint32_t code_of(float x, int largest) {
    x += 0.5f*(float) largest + 0.5f;
    x = x > 0.0f ? x : 0.0f;
    x = x < (float) largest ? x : (float) largest;
    return (uint32_t) (int) x;
}

// 32 bits of each cell of a tile: components from one of them on, at their places
struct tile_words {
    uint32_t of[tile_cells] = {};

    void add(const float * projected, int largest, int shift) {
        for (int c = 0; c < tile_cells; ++c) {
            of[c] |= code_of(projected[c], largest) << shift;
        }
    }
    void store(int c, char * to) const {
        for (int i = 0; i < 4; ++i) {
            to[i] = (char) (of[c] >> 8*i);
        }
    }
};

// where the codes of a cell are
struct place {
    char * block, * record;
    int    i; // in the block
};

struct tile {
    const task  & a;
    const place * at;
    int           n;

    void put_k() const;
    void put_v() const;
};

// byte r of a cell's four has component 4*g + r
void tile::put_k() const {
    for (int plane = 0, field = 0; plane < a.l.k_planes; ++plane) {
        tile_words words;
        for (; field < a.l.k_first[plane + 1]; ++field) {
            for (int r = 0; r < 4; ++r) {
                words.add(a.own.projected + (4*field + r)*tile_cells, a.l.k[field].mask, 8*r + a.l.k[field].shift);
            }
        }
        for (int c = 0; c < n; ++c) {
            words.store(c, plane < a.l.first_planes ? at[c].block + plane*sketch_plane + 4*at[c].i : at[c].record + a.l.record_k(plane));
        }
    }
}

void tile::put_v() const {
    for (int j = 0, next; j < a.l.n_v; j = next) {
        const int bits = sketch_bits_v(a.l.format, j);
        next = j + 32/bits;
        tile_words words;
        for (int i = j; i < next; ++i) {
            words.add(a.own.projected + i*tile_cells, a.l.v_mask(j), (i - j)*bits);
        }
        for (int c = 0; c < n; ++c) {
            words.store(c, at[c].record + a.l.record_v(j));
        }
    }
}

void encode_tile(const task & a, int64_t h, const int32_t * cells, int n) {
    char * const head = a.codes + h*a.head_bytes;
    place at[tile_cells];
    for (int c = 0; c < n; ++c) {
        at[c] = { head + sketch_block_at(a.l.format, cells[c]), head + sketch_record_at(a.l.format, a.n_blocks, cells[c]), cells[c] % sketch_cells };
    }
    const tile t = { a, at, n };
    project(a, a.k, a.of_k, sfi::sketch_basis::of_k(a.basis, h, a.l.n_k, a.k->ne[0]), a.l.n_k, h, cells, n);
    t.put_k();
    if (a.l.n_v == 0) {
        return;
    }
    project(a, a.v, a.of_v, sfi::sketch_basis::of_v(a.basis, h, a.l.n_v, a.v->ne[0]), a.l.n_v, h, cells, n);
    t.put_v();
}

} // namespace

void sfi::sketch_encode(const ggml_compute_params * params, ggml_tensor * dst) {
    arena from = arena(params->wdata).behind(params->ith*size_of<own_rows>(dst));
    const own_rows own(dst, from);
    const task a(params, dst, own);
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
    return n_threads*size_of<own_rows>(dst) + arena::line;
}

bool sfi::sketch_encode_supported(const ggml_tensor * dst) {
    const auto is_row = [](const ggml_tensor * t) {
        return t->ne[0] % max_vector == 0 && t->ne[0] % ggml_blck_size(t->type) == 0 && tile_ops_supported(t->type);
    };
    return is_row(dst->src[2]) && is_row(dst->src[3]) && sketch_layout::supported(dst);
}
