// SPARSE_ATTN on the CPU for many tokens of one text, as in prefill: ggml_sparse_attn_set_blocks().
//
// The unit of work is a block of tokens and one KV head, about block_rows query rows: enough that converting and packing a
// tile of K and V, which is done once per block and tile, is a small part of its products. A thread keeps the block's scaled
// queries and running outputs and goes through the cells from the first to the last that the block's last token sees.
// Within a tile, strips of strip_rows rows take turns, so that their logits and outputs stay in the nearest cache.
//
//   pass 1  gather the rows of a tile, pack K and V
//   pass 2  logits of a strip
//   pass 3  hide what a token does not see, weights with a running maximum
//   pass 4  accumulate V
//   pass 5  divide by the sum, learned sink included
//
// Where tiles may be skipped (ggml_sparse_attn_skip_tiles()) each query head wants others. So it is a unit of its own, with more tokens:
// it first chooses its tiles (tile-choice.h). Before that the threads share the copies of keys that choices look at.
//
// Logits are kept in base 2. Which thread takes which block changes nothing in the result.

#include "sfi-ops.h"

#include "arena.h"
#include "attn-block.h"
#include "ggml-cpu-impl.h"
#include "sfi-params.h"
#include "tile-choice.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int   most_cells = 128; // of a tile
constexpr int   strip_rows = 48;
constexpr int   block_rows = 192;
constexpr int   choice_tokens = 60; // that choose together
constexpr float log2e = 1.44269504f;

int64_t padded(int64_t n) {
    return GGML_PAD(n, sfi::max_panel);
}

struct task {
    const ggml_tensor * dst, * q, * k, * v, * cells, * visible, * sinks;
    sfi::block_ops ops, f32; // of rows of K and V, and of F32
    float   scale, softcap, least;
    int64_t d_k, d_v, n_tokens, n_head, n_head_kv, group, n_stream, n_list;
    bool    chooses;
    int     tile_cells;
    int64_t heads;         // query heads of a block
    int64_t block_tokens, n_blocks;

    explicit task(const ggml_tensor * dst, bool reference = false) :
        dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), cells(dst->src[3]), visible(dst->src[7]), sinks(dst->src[6]),
        ops(sfi::block_ops_for(k->type, v->type, reference)), f32(sfi::block_ops_for(GGML_TYPE_F32, GGML_TYPE_F32, reference)),
        scale(sfi::params_of<sfi_attn_params>(dst).scale), softcap(sfi::params_of<sfi_attn_params>(dst).softcap),
        least(sfi::params_of<sfi_attn_params>(dst).least),
        d_k(q->ne[0]), d_v(v->ne[0]), n_tokens(q->ne[1]), n_head(q->ne[2]), n_head_kv(k->ne[2]), group(n_head/n_head_kv),
        n_stream(q->ne[3]), n_list(cells->ne[0]),
        chooses(least > 0.0f && softcap == 0.0f), tile_cells(chooses ? sfi::choice_tile : most_cells), heads(chooses ? 1 : group),
        block_tokens(std::clamp<int64_t>(chooses ? choice_tokens : block_rows/group, 1, n_tokens)),
        n_blocks((n_tokens + block_tokens - 1)/block_tokens) {}

    int64_t rows()    const { return block_tokens*heads; }
    int64_t n_tiles() const { return (n_list + tile_cells - 1)/tile_cells; }

    bool is_cell(int32_t cell) const { return (uint64_t) cell < (uint64_t) k->ne[1]; } // else a pad: negative ones are huge

    // of K or V, where the row of its first head begins
    static const char * row(const ggml_tensor * t, int64_t s, int32_t cell) { return (const char *) t->data + s*t->nb[3] + cell*t->nb[1]; }

    const int32_t * cells_of(int64_t s) const { return (const int32_t *) ((const char *) cells->data + s*cells->nb[3]); }

    int64_t seen(int64_t s, int64_t t) const {
        return std::clamp<int64_t>(((const int32_t *) ((const char *) visible->data + s*visible->nb[1]))[t], 0, n_list);
    }
};

struct scratch {
    float * q, * o, * max, * sum;     // of the rows of a block
    float * k, * v, * transposed;     // of a tile
    float * x, * keep;                // of a strip
    sfi::arena choice;                // of a fit, then of choices
    const char * k_rows[most_cells], * v_rows[most_cells];
    int     place[most_cells];        // in the list

    scratch(const task & a, sfi::arena & from) {
        from.take(q, a.rows()*a.d_k);
        from.take(o, a.rows()*padded(a.d_v));
        from.take(max, a.rows());
        from.take(sum, a.rows());
        from.take(k, a.tile_cells*a.d_k);
        from.take(v, a.tile_cells*padded(a.d_v));
        from.take(transposed, sfi::max_vector*a.d_k);
        from.take(x, strip_rows*a.tile_cells);
        from.take(keep, strip_rows);
        choice = from.behind(0);
    }
};

// Bytes of one thread.
size_t scratch_size(const task & a) {
    return sfi::size_of<scratch>(a) + (!a.chooses ? 0
        : std::max(sfi::size_of<sfi::fit_room>(a.d_k), sfi::size_of<sfi::choice_room>(a.rows(), a.n_tiles())));
}

// Bytes of the copy of one KV head's keys.
size_t copy_size(const task & a) {
    return a.chooses ? sfi::size_of<sfi::key_copy>(a.d_k, a.n_tiles()) : 0;
}

size_t copies_size(const task & a) {
    return a.n_stream*a.n_head_kv*copy_size(a);
}

// The rows of some heads of one KV head for tokens [t0, t1): row r is query head h0 + r%heads of token t0 + r/heads.
struct block {
    int64_t s, h, h0, t0, t1;
};

const float * query(const task & a, int64_t s, int64_t h, int64_t t) {
    return (const float *) ((const char *) a.q->data + t*a.q->nb[1] + h*a.q->nb[2] + s*a.q->nb[3]);
}

void begin(const task & a, const block & b, const scratch & w) {
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale*log2e;
    const int64_t n = (b.t1 - b.t0)*a.heads;
    float * to = w.q;
    for (int64_t r = 0; r < n; ++r) {
        const float * from = query(a, b.s, b.h0 + r % a.heads, b.t0 + r/a.heads);
        for (int64_t i = 0; i < a.d_k; ++i) {
            *to++ = scale*from[i];
        }
    }
    std::fill(w.o,   w.o + n*padded(a.d_v), 0.0f);
    std::fill(w.max, w.max + n, -INFINITY);
    std::fill(w.sum, w.sum + n, 0.0f);
}

// pass 1: the cells of list [c0, c1), pads dropped; returns their number
int pack(const task & a, const block & b, scratch & w, int64_t c0, int64_t c1) {
    const int32_t * list = a.cells_of(b.s);
    int n = 0;
    for (int64_t i = c0; i < c1; ++i) {
        if (a.is_cell(list[i])) {
            w.k_rows[n] = a.row(a.k, b.s, list[i]);
            w.v_rows[n] = a.row(a.v, b.s, list[i]);
            w.place[n++] = (int) (i - c0);
        }
    }
    a.ops.pack_k((int) a.d_k, { w.k_rows, b.h*a.k->nb[2], n, nullptr, 0, 0, 0 }, w.k, w.transposed);
    a.ops.pack_v((int) a.d_v, { w.v_rows, b.h*a.v->nb[2], n, nullptr, 0, 0, 0 }, w.v);
    return n;
}

// the rows of a tile that will be needed next
void fetch(const task & a, const block & b, int64_t c0, int64_t c1) {
    const int32_t * list = a.cells_of(b.s);
    const size_t k_bytes = ggml_row_size(a.k->type, a.d_k), v_bytes = ggml_row_size(a.v->type, a.d_v);
    const auto lines = [](const char * row, size_t n_bytes) {
        for (size_t i = 0; i < n_bytes; i += 64) {
            sfi::prefetch(row + i);
        }
    };
    for (int64_t i = c0; i < c1; ++i) {
        if (a.is_cell(list[i])) {
            lines(a.row(a.k, b.s, list[i]) + b.h*a.k->nb[2], k_bytes);
            lines(a.row(a.v, b.s, list[i]) + b.h*a.v->nb[2], v_bytes);
        }
    }
}

// pass 3 for one row: the first n logits count
void weigh(const task & a, const scratch & w, float * x, int n, int64_t row, float * keep) {
    for (int c = 0; c < n && a.softcap > 0.0f; ++c) {
        x[c] = a.softcap*log2e*tanhf(x[c]);
    }
    const int n_pad = GGML_PAD(n, sfi::max_vector);
    std::fill(x + n, x + n_pad, -INFINITY);
    *keep = n > 0 ? a.ops.weigh(x, n_pad, w.max + row, w.sum + row) : 1.0f;
}

// Passes 2 to 4 for rows [r0, r0 + n_rows) and the first n of the n_tile cells of the tile.
void attend(const task & a, const scratch & w, int64_t r0, int n_rows, int n_tile, int n) {
    if (n == 0) {
        return;
    }
    a.ops.dot(w.q + r0*a.d_k, n_rows, (int) a.d_k, w.k, n, w.x, a.tile_cells);
    for (int r = 0; r < n_rows; ++r) {
        weigh(a, w, w.x + r*a.tile_cells, n, r0 + r, w.keep + r);
    }
    a.ops.mad(w.x, a.tile_cells, n_rows, n, w.v, n_tile, (int) a.d_v, w.keep, w.o + r0*padded(a.d_v), padded(a.d_v));
}

void attend_tile(const task & a, const block & b, const scratch & w, int64_t c0, int n_tile) {
    const auto strips = [&](int64_t t0, int64_t t1, int n) {
        const int64_t r1 = (t1 - b.t0)*a.heads;
        for (int64_t r = (t0 - b.t0)*a.heads; r < r1; r += strip_rows) {
            attend(a, w, r, (int) std::min<int64_t>(strip_rows, r1 - r), n_tile, n);
        }
    };
    int64_t whole = b.t0; // the tokens [whole, t) see all of the tile
    for (int64_t t = b.t0; t < b.t1; ++t) {
        const int64_t seen = a.seen(b.s, t);
        if (seen < std::min(c0 + a.tile_cells, a.n_list)) { // what a token does not see must not touch it, not even times 0
            strips(whole, t, n_tile);
            strips(t, t + 1, (int) (std::lower_bound(w.place, w.place + n_tile, seen - c0) - w.place));
            whole = t + 1;
        }
    }
    strips(whole, b.t1, n_tile);
}

// pass 5
void finish(const task & a, const block & b, const scratch & w) {
    for (int64_t r = 0; r < (b.t1 - b.t0)*a.heads; ++r) {
        const int64_t t = b.t0 + r/a.heads, h = b.h0 + r % a.heads;
        float * out = (float *) a.dst->data + ((b.s*a.n_tokens + t)*a.n_head + h)*a.d_v;
        float max = w.max[r], sum = w.sum[r], keep = 1.0f;
        if (a.sinks) {
            const float sink = ((const float *) a.sinks->data)[h]*log2e;
            const float most = std::max(max, sink);
            keep = std::exp2(max - most);
            sum  = sum*keep + std::exp2(sink - most);
        }
        const float factor = sum > 0.0f ? keep/sum : 0.0f; // nothing to attend to: zeros
        for (int64_t i = 0; i < a.d_v; ++i) {
            out[i] = w.o[r*padded(a.d_v) + i]*factor;
        }
    }
}

// ---- skipped tiles -------------------------------------------------------------------------------------------------------

sfi::key_copy copy_of(const task & a, const sfi::arena & copies, int64_t s, int64_t h) {
    sfi::arena mine = copies.behind((s*a.n_head_kv + h)*copy_size(a));
    return { a.d_k, a.n_tiles(), mine };
}

// What the last of tokens [t0, t1) sees.
int64_t last_seen(const task & a, int64_t s, int64_t t0, int64_t t1) {
    int64_t last = 0;
    for (int64_t t = t0; t < t1; ++t) {
        last = std::max(last, a.seen(s, t));
    }
    return last;
}

// Keys evenly spread over what is seen, queries over tokens and heads.
void fit(const task & a, int64_t s, int64_t h, const scratch & w, const sfi::key_copy & copy) {
    sfi::arena from = w.choice;
    const sfi::fit_room room(a.d_k, from);
    const auto to_float = ggml_get_type_traits(a.k->type)->to_float;
    const int32_t * list = a.cells_of(s);
    const int64_t n_seen = last_seen(a, s, 0, a.n_tokens), n_queries = a.n_tokens*a.group;
    const auto every = [](int64_t n) { return std::max<int64_t>(1, (n + sfi::choice_rows - 1)/sfi::choice_rows); };
    int n = 0;
    for (int64_t i = 0; i < n_seen; i += every(n_seen)) {
        if (a.is_cell(list[i])) {
            const char * row = a.row(a.k, s, list[i]) + h*a.k->nb[2];
            float * to = room.rows + a.d_k*n++;
            if (to_float) {
                to_float(row, to, a.d_k);
            } else {
                std::copy_n((const float *) row, a.d_k, to);
            }
        }
    }
    sfi::moments(a.f32, room, n, (int) a.d_k, true, room.keys);
    n = 0;
    for (int64_t i = 0; i < n_queries; i += every(n_queries)) {
        std::copy_n(query(a, s, h*a.group + i % a.group, i/a.group), a.d_k, room.rows + a.d_k*n++);
    }
    sfi::moments(a.f32, room, n, (int) a.d_k, false, room.queries);
    sfi::fit_copy(a.f32, room, (int) a.d_k, copy);
}

// A pad stands for its neighbour: it counts in no result, and in the estimate for less than its tile.
void encode(const task & a, int64_t s, int64_t h, int64_t tile, scratch & w, const sfi::key_copy & copy) {
    const int32_t * list = a.cells_of(s) + tile*a.tile_cells;
    const int n = (int) std::min<int64_t>(a.tile_cells, a.n_list - tile*a.tile_cells);
    const char * some = nullptr;
    for (int i = 0; i < n && !some; ++i) {
        some = a.is_cell(list[i]) ? a.row(a.k, s, list[i]) : nullptr;
    }
    for (int i = 0; i < n && some; ++i) {
        w.k_rows[i] = some = a.is_cell(list[i]) ? a.row(a.k, s, list[i]) : some;
    }
    a.ops.pack_k((int) a.d_k, { w.k_rows, h*a.k->nb[2], some ? n : 0, nullptr, 0, 0, 0 }, w.k, w.transposed);
    sfi::encode_tile(a.ops, w.k, (int) a.d_k, copy, tile);
}

// All threads together.
void make_copies(const ggml_compute_params * params, const task & a, const sfi::arena & copies, scratch & w) {
    for (int64_t i = params->ith; i < a.n_stream*a.n_head_kv; i += params->nth) {
        fit(a, i/a.n_head_kv, i % a.n_head_kv, w, copy_of(a, copies, i/a.n_head_kv, i % a.n_head_kv));
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = 0; i < a.n_stream*a.n_head_kv; ++i) {
        const int64_t s = i/a.n_head_kv, h = i % a.n_head_kv, n = (last_seen(a, s, 0, a.n_tokens) + a.tile_cells - 1)/a.tile_cells;
        const auto copy = copy_of(a, copies, s, h);
        for (int64_t tile = params->ith; tile < n && *copy.usable; tile += params->nth) {
            encode(a, s, h, tile, w, copy);
        }
    }
}

// ---- a block -------------------------------------------------------------------------------------------------------------

// The next tile from `tile` on that is wanted, or n.
int64_t next_wanted(const uint8_t * wanted, int64_t tile, int64_t n) {
    while (tile < n && wanted && !wanted[tile]) {
        ++tile;
    }
    return tile;
}

// wanted: a flag for each tile; null: all are
const uint8_t * choose(const task & a, const block & b, const scratch & w, const sfi::arena & copies, int64_t n_tiles) {
    if (!a.chooses) {
        return nullptr;
    }
    int64_t seen[choice_tokens];
    for (int64_t t = b.t0; t < b.t1; ++t) {
        seen[t - b.t0] = a.seen(b.s, t);
    }
    sfi::arena from = w.choice;
    const sfi::choice_room room(a.rows(), a.n_tiles(), from);
    sfi::choose_tiles(a.ops, copy_of(a, copies, b.s, b.h), w.q, seen, (int) (b.t1 - b.t0), (int) a.d_k, n_tiles, a.least, room);
    return room.wanted;
}

void attend_block(const task & a, const block & b, scratch & w, const sfi::arena & copies) {
    const int64_t last = last_seen(a, b.s, b.t0, b.t1);
    const int64_t n_tiles = (last + a.tile_cells - 1)/a.tile_cells;
    const auto end_of = [&](int64_t tile) { return std::min<int64_t>((tile + 1)*a.tile_cells, last); };
    begin(a, b, w);
    const uint8_t * wanted = n_tiles > 0 ? choose(a, b, w, copies, n_tiles) : nullptr;
    for (int64_t tile = next_wanted(wanted, 0, n_tiles); tile < n_tiles; ) {
        const int64_t c0 = tile*a.tile_cells, next = next_wanted(wanted, tile + 1, n_tiles);
        const int n = pack(a, b, w, c0, end_of(tile));
        if (next < n_tiles) {
            fetch(a, b, next*a.tile_cells, end_of(next));
        }
        attend_tile(a, b, w, c0, n);
        tile = next;
    }
    finish(a, b, w);
}

} // namespace

// Blocks of late tokens see most: they go first, so that the threads end together.
void sfi::sparse_attn_blocks(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(dst, params->use_ref);
    const arena copies(params->wdata);
    arena mine = copies.behind(copies_size(a) + params->ith*scratch_size(a));
    scratch w(a, mine);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    if (a.chooses) {
        make_copies(params, a, copies, w);
    }
    ggml_barrier(params->threadpool);
    const int64_t n_units = a.n_head/a.heads, n = a.n_stream*n_units*a.n_blocks;
    for (int64_t i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t t0 = (a.n_blocks - 1 - i/(n_units*a.n_stream))*a.block_tokens, h0 = i % n_units*a.heads;
        attend_block(a, { i/n_units % a.n_stream, h0/a.group, h0, t0, std::min(t0 + a.block_tokens, a.n_tokens) }, w, copies);
    }
}

size_t sfi::sparse_attn_blocks_work_size(const ggml_tensor * dst, int n_threads) {
    const task a(dst);
    return copies_size(a) + n_threads*scratch_size(a) + arena::line;
}
