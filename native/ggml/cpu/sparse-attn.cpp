// SPARSE_ATTN on the CPU.
//
// The support is cut into blocks of cells. A block of `always` serves every head, so its rows are read once and in
// full, a few cells at a time, in the order of memory: that is what hardware prefetching is good at. A block of
// `selected` serves one KV head; its rows lie anywhere. Either way the rows that a thread needs next are fetched while it
// computes, across tiles and blocks. Each block yields, per query head, a partial output with its softmax maximum and
// sum; the partials are merged in block order, so the result does not depend on the number of threads or on which
// thread took which block.
//
// Tokens that see different lengths of one list (`visible`) share a block: each row of K is read once for all of them, and V
// while it is in the nearest cache. What is computed for each is the same, in the same order, as for it alone.
//
//   pass 1  gather the rows of a tile of cells
//   pass 2  logits of the whole GQA group, each K row read once
//   pass 3  online softmax
//   pass 4  accumulate V
//   pass 5  merge the partials, the tail and the learned sink

#include "sfi-ops.h"

#include "arena.h"
#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sfi-params.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int tile_cells  = 64;             // logits of a group and the rows' addresses stay in L1
constexpr int block_cells = 4*tile_cells;   // the unit of work that a thread takes
constexpr int line_floats = 16;             // of a cache line
constexpr int enough_blocks = 8;            // from which on threads have enough to share although tokens go together
constexpr size_t max_evidence = 512 << 20;  // bytes; a longer list is better served by SUPPORT_EVIDENCE, head by head
constexpr int chunk_bytes = 32 << 10;       // rows of `always` that all heads visit before anyone goes on: a part of L1

int64_t n_blocks(int64_t n) {
    return (n + block_cells - 1)/block_cells;
}

// A partial: output [n_embd_v], maximum, sum. Those of one block lie together, and no two blocks share a cache line: the
// threads that work on them would take it from each other at every tile.
struct layout {
    int64_t n_tokens, n_head, n_head_kv, group, n_stream;
    int64_t n_embd_k, n_embd_v;
    int64_t n_always, n_selected;
    int64_t always_blocks, selected_blocks; // per token; per token and KV head
    int64_t item_tokens;                    // that are attended for together
    int64_t partial;                        // floats of one partial
    int64_t per_head;                       // partials of one query head

    explicit layout(const ggml_tensor * dst) {
        const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
        const ggml_tensor * always = dst->src[3], * selected = dst->src[4];
        n_embd_k  = q->ne[0];
        n_tokens  = q->ne[1];
        n_head    = q->ne[2];
        n_stream  = q->ne[3];
        n_head_kv = k->ne[2];
        n_embd_v  = v->ne[0];
        group     = n_head/n_head_kv;
        n_always   = always   ? always->ne[0]   : 0;
        n_selected = selected ? selected->ne[0] : 0;
        always_blocks   = n_blocks(n_always);
        selected_blocks = n_blocks(n_selected);
        partial  = GGML_PAD(n_embd_v + 2, line_floats);
        per_head = always_blocks + selected_blocks;
        item_tokens = has_visible(dst) && !n_selected && always_blocks >= enough_blocks ? n_tokens : 1;
    }

    static bool has_visible(const ggml_tensor * dst) { return dst->src[7] && dst->src[7]->type == GGML_TYPE_I32; }

    int64_t n_partials() const { return n_stream*n_tokens*n_head*per_head; }
    int64_t n_items()    const { return n_stream*(n_tokens/item_tokens)*(always_blocks + n_head_kv*selected_blocks); }
    // a thread's logits of one tile and its scaled queries, for all heads and the tokens that go together
    int64_t scratch()    const { return GGML_PAD(item_tokens*n_head*(tile_cells + n_embd_k), line_floats) + line_floats; }
};

// Evidence on the way, ggml_sparse_attn_evidence(): the weights of each tile are kept, with the maximum they were taken against, and
// weighted when the sum over all tiles is known.
struct evidence_pass {
    const int32_t * cells;
    int64_t n_cells, n_list, n_tiles, tiles_padded, n_head, group;
    int64_t j0, j1;         // candidates
    float * weights;        // [n_tiles, n_head, tile_cells]
    float * tile_max;       // [n_head, tiles_padded]; finish() turns it into the weights of the tiles
    float * result;         // [n_head_kv, n_list]

    evidence_pass(const ggml_tensor * dst, sfi::arena & from) {
        n_cells = dst->src[1]->ne[1];
        n_list  = dst->src[3]->ne[0];
        n_head  = dst->src[0]->ne[2];
        group   = n_head/dst->src[1]->ne[2];
        n_tiles = (n_list + tile_cells - 1)/tile_cells;
        tiles_padded = GGML_PAD(n_tiles, sfi::max_vector);
        from.take(weights,  n_tiles*n_head*tile_cells);
        from.take(tile_max, n_head*tiles_padded);
    }
    void look_at(const ggml_tensor * dst) {
        const int32_t * plan = (const int32_t *) dst->src[8]->data;
        cells  = (const int32_t *) dst->src[3]->data;
        result = (float *) dst->data + dst->src[2]->ne[0]*n_head; // behind the attention
        j0 = std::clamp<int64_t>(plan[0], 0, n_list);
        j1 = std::clamp<int64_t>(plan[1], j0, n_list);
    }
    bool    is_cell(int64_t j) const { return (uint64_t) cells[j] < (uint64_t) n_cells; } // negative cells are huge
    float * weights_of(int64_t tile) const { return weights + tile*n_head*tile_cells; }
    void    keep_max(int64_t tile, int64_t h, float max) const { tile_max[h*tiles_padded + tile] = max; }

    void finish(int64_t h, float max, float sum, sfi::exp_fn exp) const; // sum of exp(x - max) over all cells
    void write_tile(int64_t tile) const;
};

void evidence_pass::finish(int64_t h, float max, float sum, sfi::exp_fn exp) const {
    float * weight = tile_max + h*tiles_padded;
    std::fill(weight + n_tiles, weight + tiles_padded, -INFINITY);
    if (max == -INFINITY) {
        std::fill(weight, weight + n_tiles, 0.0f);
        return;
    }
    exp(weight, (int) tiles_padded, max);
    for (int64_t i = 0; i < n_tiles; ++i) {
        weight[i] *= 1.0f/(float) group/sum;
    }
}

void evidence_pass::write_tile(int64_t tile) const {
    const int64_t begin = tile*tile_cells, end = std::min(begin + tile_cells, n_list);
    int n = 0; // without pads
    for (int64_t j = begin; j < end; ++j) {
        n += is_cell(j);
    }
    for (int64_t h_kv = 0; h_kv < n_head/group; ++h_kv) {
        float evidence[tile_cells] = {};
        for (int64_t h = h_kv*group; h < (h_kv + 1)*group && begin < j1 && end > j0; ++h) {
            const float   weight = tile_max[h*tiles_padded + tile];
            const float * x = weights_of(tile) + h*tile_cells;
            for (int i = 0; i < n; ++i) {
                evidence[i] += weight*x[i];
            }
        }
        for (int64_t j = begin, i = 0; j < end; ++j) {
            result[h_kv*n_list + j] = is_cell(j) && j >= j0 && j < j1 ? evidence[i] : 0.0f;
            i += is_cell(j);
        }
    }
}

struct task {
    const ggml_tensor * dst, * q, * k, * v, * always, * selected, * tail, * sinks;
    const ggml_tensor * visible, * mass; // one place for both
    layout        l;
    sfi::tile_ops ops;
    float         scale, softcap;
    size_t        k_row_size, v_row_size; // bytes of one head
    float       * partials;
    const evidence_pass * evidence = nullptr;

    explicit task(const ggml_compute_params * params, ggml_tensor * dst) :
        dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), always(dst->src[3]), selected(dst->src[4]),
        tail(dst->src[5]), sinks(dst->src[6]),
        visible(layout::has_visible(dst) ? dst->src[7] : nullptr),
        mass   (dst->src[7] && dst->src[7]->type == GGML_TYPE_F32 ? dst->src[7] : nullptr), l(dst),
        ops(sfi::tile_ops_for(k->type, v->type, params->use_ref)),
        scale(sfi::params_of<sfi_attn_params>(dst).scale), softcap(sfi::params_of<sfi_attn_params>(dst).softcap),
        k_row_size(ggml_row_size(k->type, l.n_embd_k)), v_row_size(ggml_row_size(v->type, l.n_embd_v)),
        partials((float *) GGML_PAD((uintptr_t) params->wdata, line_floats*sizeof(float))) {}

    float * partial(int64_t s, int64_t t, int64_t h, int64_t block) const {
        return partials + (((s*l.n_tokens + t)*l.per_head + block)*l.n_head + h)*l.partial;
    }

    // how many entries of a list of n token t sees
    int64_t seen(int64_t s, int64_t t, int64_t n) const {
        return visible ? std::clamp<int64_t>(((const int32_t *) ((const char *) visible->data + s*visible->nb[1]))[t], 0, n) : n;
    }
};

const int32_t * list_of(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (const int32_t *) ((const char *) t->data
            + (t->ne[1] == 1 ? 0 : i1)*t->nb[1] + (t->ne[2] == 1 ? 0 : i2)*t->nb[2] + i3*t->nb[3]);
}

// the queries of the KV heads [h0, h1), scaled
void load_queries(const task & a, int64_t s, int64_t t, int64_t h0, int64_t h1, float * q) {
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
    for (int64_t h = h0*a.l.group; h < h1*a.l.group; ++h) {
        const float * from = (const float *) ((const char *) a.q->data + t*a.q->nb[1] + h*a.q->nb[2] + s*a.q->nb[3]);
        for (int64_t i = 0; i < a.l.n_embd_k; ++i) {
            *q++ = scale*from[i];
        }
    }
}

// The rows of up to tile_cells cells; head h of a row is h*nb[2] bytes further.
struct tile {
    const char * k[tile_cells];
    const char * v[tile_cells];
    int          place[tile_cells]; // in the list, from the first of the tile
    int          n = 0;

    // pass 1: drop the pads
    void gather(const task & a, int64_t s, const int32_t * list, int64_t n_list) {
        const char * k0 = (const char *) a.k->data + s*a.k->nb[3];
        const char * v0 = (const char *) a.v->data + s*a.v->nb[3];
        n = 0;
        for (int64_t i = 0; i < n_list; ++i) {
            if ((uint64_t) list[i] < (uint64_t) a.k->ne[1]) { // negative cells are huge
                k[n] = k0 + list[i]*a.k->nb[1];
                v[n] = v0 + list[i]*a.v->nb[1];
                place[n++] = (int) i;
            }
        }
    }

    // of the first n_list entries
    int n_of(int64_t n_list) const { return (int) (std::lower_bound(place, place + n, n_list) - place); }
};

// pass 3: logits x of one head become weights of its partial o
void softmax(const task & a, float * x, int n, float * o) {
    const int n_pad = (int) GGML_PAD(n, sfi::max_vector);
    float & max = o[a.l.n_embd_v], & sum = o[a.l.n_embd_v + 1];

    for (int c = 0; c < n && a.softcap > 0.0f; ++c) {
        x[c] = a.softcap*tanhf(x[c]);
    }
    std::fill(x + n, x + n_pad, -INFINITY);

    const float tile_max = a.ops.max(x, n_pad);
    if (tile_max > max) {
        const float shrink = expf(max - tile_max);
        sum *= shrink;
        for (int64_t i = 0; i < a.l.n_embd_v; ++i) {
            o[i] *= shrink;
        }
        max = tile_max;
    }
    sum += max == -INFINITY ? 0.0f : a.ops.exp(x, n_pad, max);
}

// A block of a list, and the tokens [t0, t1) and KV heads [h0, h1) that share it.
struct block {
    int64_t s, t0, t1, h0, h1;
    int64_t slot;         // of the partials
    int64_t number;       // of its first tile in the list
    const int32_t * list;
    int64_t n;            // cells; 0: there is no such block

    int64_t n_heads()  const { return h1 - h0; }
    int64_t n_tokens() const { return t1 - t0; }
};

// Block i of the operation: of the tokens that go together first those of `always`, then those of each KV head's `selected`.
block block_of(const task & a, int64_t i) {
    const layout & l = a.l;
    if (i >= l.n_items()) {
        return {};
    }
    const int64_t per_item = l.always_blocks + l.n_head_kv*l.selected_blocks, n_turns = l.n_tokens/l.item_tokens;
    const int64_t s = i/(per_item*n_turns), of_stream = i % (per_item*n_turns);
    const int64_t t = (a.visible ? of_stream % n_turns : of_stream/per_item)*l.item_tokens;
    const int64_t b = a.visible ? of_stream/n_turns    : of_stream % per_item;
    const auto part = [&](int64_t h0, int64_t h1, int64_t slot, const int32_t * list, int64_t n_list, int64_t number) {
        const int64_t begin = number*block_cells, t1 = t + l.item_tokens;
        if (begin >= n_list) { // these tokens see nothing of it
            static const int32_t pad = -1;
            return block { s, t, t1, h0, h1, slot, begin/tile_cells, &pad, 1 };
        }
        return block { s, t, t1, h0, h1, slot, begin/tile_cells, list + begin, std::min<int64_t>(block_cells, n_list - begin) };
    };
    if (b < l.always_blocks) {
        int64_t most = 0;
        for (int64_t i_t = t; i_t < t + l.item_tokens; ++i_t) {
            most = std::max(most, a.seen(s, i_t, l.n_always));
        }
        return part(0, l.n_head_kv, b, list_of(a.always, t, 0, s), most, b);
    }
    // heads in turn: they often choose neighbours, whose rows share lines that the hardware has fetched already
    const int64_t h = (b - l.always_blocks) % l.n_head_kv, number = (b - l.always_blocks)/l.n_head_kv;
    return part(h, h + 1, l.always_blocks + number, list_of(a.selected, h, t, s), l.n_selected, number);
}

// Cells of a chunk: all heads visit its rows before anyone goes on, and while they do, the next chunk is fetched.
int chunk_of(const task & a, const block & b) {
    if (b.n_heads() == 1) {
        return tile_cells;
    }
    const int64_t n = chunk_bytes/(int64_t) std::max<size_t>(b.n_heads()*std::max(a.k_row_size, a.v_row_size), 1);
    return (int) std::clamp<int64_t>(n & ~3, 8, tile_cells);
}

// Passes 2 to 4 for a tile of a block. What follows is `next`, a tile of the block `after`; n = 0: nothing.
// Queries and logits lie by KV head, then token, then head of the group.
void attend(const task & a, const block & b, const tile & t, const block & after, const tile & next, const float * q, float * logits) {
    const int group = (int) a.l.group, d_k = (int) a.l.n_embd_k, d_v = (int) a.l.n_embd_v, chunk = chunk_of(a, b);
    const int64_t stride = a.l.partial, n_tokens = b.n_tokens();
    // heads of `after` in the place of ours
    const int64_t ahead = after.h0 - b.h0;
    const int     n_next = after.n_heads() == b.n_heads() ? std::min(chunk, next.n) : 0;
    const auto row_of = [&](int64_t h, int64_t i) { return ((h - b.h0)*n_tokens + i)*group; };
    // rows of the chunk from c on that token i sees
    const auto seen = [&](int64_t i, int c, int n) {
        const int of_tile = n_tokens == 1 ? t.n : t.n_of(a.seen(b.s, b.t0 + i, a.l.n_always) - b.number*tile_cells);
        return std::clamp(of_tile - c, 0, n);
    };

    if (a.evidence) {
        logits = a.evidence->weights_of(b.number); // which keeps them
    }

    // pass 2
    for (int c = 0; c < t.n; c += chunk) {
        const int  n    = std::min(chunk, t.n - c), more = std::min(chunk, t.n - c - n);
        const bool last = more == 0;
        int64_t n_whole = n_tokens; // the last of the tokens, which see all of the chunk
        while (n_whole > 0 && seen(n_tokens - n_whole, c, n) < n) {
            --n_whole;
        }
        for (int64_t h = b.h0; h < b.h1; ++h) {
            sfi::row_set rows = last
                ? sfi::row_set { t.k + c, h*a.k->nb[2], n, t.v,         h*a.v->nb[2], a.v_row_size, std::min(chunk, t.n) }
                : sfi::row_set { t.k + c, h*a.k->nb[2], n, t.k + c + n, h*a.k->nb[2], a.k_row_size, more };
            for (int64_t i = 0; i < n_tokens; ) {
                const bool whole = i >= n_tokens - n_whole;
                const int64_t together = whole ? n_whole : 1;
                rows.n = whole ? n : seen(i, c, n);
                a.ops.dot(q + row_of(h, i)*d_k, (int) together*group, d_k, rows, logits + row_of(h, i)*tile_cells + c, tile_cells);
                rows.n_next = 0;
                i += together;
            }
        }
    }
    for (int64_t h = b.h0; h < b.h1; ++h) {
        for (int64_t i = 0; i < n_tokens; ++i) {
            const int n = seen(i, 0, t.n);
            for (int g = 0; g < group; ++g) {
                float * o = a.partial(b.s, b.t0 + i, h*group + g, b.slot);
                if (n > 0) {
                    softmax(a, logits + (row_of(h, i) + g)*tile_cells, n, o);
                }
                if (a.evidence) {
                    a.evidence->keep_max(b.number, h*group + g, n > 0 ? o[d_v] : -INFINITY);
                }
            }
        }
    }
    // pass 4
    for (int c = 0; c < t.n; c += chunk) {
        const int  n    = std::min(chunk, t.n - c), more = std::min(chunk, t.n - c - n);
        const bool last = more == 0;
        for (int64_t h = b.h0; h < b.h1; ++h) {
            sfi::row_set rows = last
                ? sfi::row_set { t.v + c, h*a.v->nb[2], n, next.k,      (h + ahead)*a.k->nb[2], a.k_row_size, n_next }
                : sfi::row_set { t.v + c, h*a.v->nb[2], n, t.v + c + n, h*a.v->nb[2],           a.v_row_size, more };
            for (int64_t i = 0; i < n_tokens; ++i) {
                rows.n = seen(i, c, n);
                a.ops.mad(logits + row_of(h, i)*tile_cells + c, tile_cells, group, d_v, rows,
                        a.partial(b.s, b.t0 + i, h*group, b.slot), stride);
                rows.n_next = 0;
            }
        }
    }
}

void clear(const task & a, float * partial) {
    std::fill(partial, partial + a.l.n_embd_v, 0.0f);
    partial[a.l.n_embd_v]     = -INFINITY;
    partial[a.l.n_embd_v + 1] = 0.0f;
}

void begin_block(const task & a, const block & b, float * q) {
    for (int64_t h = b.h0; h < b.h1; ++h) {
        for (int64_t t = b.t0; t < b.t1; ++t) {
            for (int64_t g = 0; g < a.l.group; ++g) {
                clear(a, a.partial(b.s, t, h*a.l.group + g, b.slot));
            }
            load_queries(a, b.s, t, h, h + 1, q);
            q += a.l.group*a.l.n_embd_k;
        }
    }
}

// Passes 1 to 4 for the blocks that this thread gets: the first is its own number, the others come from take_next().
template <class F>
void attend_blocks(const task & a, int64_t first, F take_next, float * scratch) {
    float * logits = scratch;
    float * q      = scratch + a.l.item_tokens*a.l.n_head*tile_cells;
    tile tiles[2];     // the one at work, and what follows it
    int  at = 0;

    // moves on by one tile, into the next block where this one ends
    const auto gather = [&](block & b, tile & to) {
        const int64_t n = std::min<int64_t>(tile_cells, b.n);
        to.gather(a, b.s, b.list, n);
    };
    block cur = block_of(a, first);
    gather(cur, tiles[at]);
    while (cur.n > 0) {
        const block next_block = block_of(a, take_next());
        begin_block(a, cur, q);
        while (cur.n > 0) {
            block rest = cur;
            rest.list += tile_cells;
            rest.n    -= tile_cells;
            rest.number++;
            block after = rest.n > 0 ? rest : next_block;
            gather(after, tiles[1 - at]);
            if (tiles[at].n > 0 || a.evidence) {
                attend(a, cur, tiles[at], after, tiles[1 - at], q, logits);
            }
            at  = 1 - at;
            cur = rest;
        }
        cur = next_block;
    }
}

// the sum of exp(x - max) over all cells of a query head
float cells_sum(const task & a, int64_t s, int64_t t, int64_t h, float max) {
    const int64_t n = a.l.n_embd_v;
    float sum = 0.0f;
    for (int64_t b = 0; b < a.l.per_head && max > -INFINITY; ++b) {
        const float * p = a.partial(s, t, h, b);
        sum += expf(p[n] - max)*p[n + 1];
    }
    return sum;
}

// pass 5, one query head of one token
void merge(const task & a, int64_t s, int64_t t, int64_t h) {
    const layout & l = a.l;
    const int64_t n = l.n_embd_v;
    float * out = (float *) a.dst->data + ((s*l.n_tokens + t)*l.n_head + h)*n;

    const float * tail = a.tail
        ? (const float *) ((const char *) a.tail->data + h*a.tail->nb[1] + t*a.tail->nb[2] + s*a.tail->nb[3])
        : nullptr;
    const float sink = a.sinks ? ((const float *) a.sinks->data)[h] : -INFINITY;

    float cells_max = -INFINITY;
    for (int64_t b = 0; b < l.per_head; ++b) {
        cells_max = std::max(cells_max, a.partial(s, t, h, b)[n]);
    }
    if (a.evidence) {
        a.evidence->finish(h, cells_max, cells_sum(a, s, t, h, cells_max), a.ops.exp);
    }
    const float max = std::max(cells_max, std::max(sink, tail ? tail[n] : -INFINITY));

    std::fill(out, out + n, 0.0f);
    float * mass = a.mass ? (float *) ((char *) a.mass->data + h*a.mass->nb[1]) : nullptr;
    if (max == -INFINITY) {
        if (mass) {
            mass[0] = -INFINITY;
            mass[1] = 0.0f;
        }
        return; // nothing to attend to
    }

    float sum = expf(sink - max);
    for (int64_t b = 0; b < l.per_head; ++b) {
        const float * p = a.partial(s, t, h, b);
        const float weight = expf(p[n] - max);
        sum += weight*p[n + 1];
        for (int64_t i = 0; i < n && weight > 0.0f; ++i) {
            out[i] += weight*p[i];
        }
    }
    if (tail) {
        const float weight = expf(tail[n] - max);
        sum += weight;
        for (int64_t i = 0; i < n && weight > 0.0f; ++i) {
            out[i] += weight*tail[i];
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        out[i] /= sum;
    }
    if (mass) {
        mass[0] = max + logf(sum);
        mass[1] = tail ? expf(tail[n] - max)/sum : 0.0f;
    }
}

} // namespace

namespace {

void attend_all(const ggml_compute_params * params, const task & a, float * scratch) {
    attend_blocks(a, params->ith, [params] { return ggml_threadpool_chunk_add(params->threadpool, 1); }, scratch);
}

void merge_all(const ggml_compute_params * params, const task & a) {
    const layout & l = a.l;
    const int64_t n_rows = l.n_stream*l.n_tokens*l.n_head;
    for (int64_t i = params->ith; i < n_rows; i += params->nth) {
        merge(a, i/(l.n_head*l.n_tokens), i/l.n_head % l.n_tokens, i % l.n_head);
    }
}

int64_t attn_floats(const layout & l, int n_threads) {
    return l.n_partials()*l.partial + n_threads*l.scratch() + line_floats;
}

} // namespace

void sfi::sparse_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (ggml_sparse_attn_in_blocks(dst)) {
        return sparse_attn_blocks(params, dst);
    }
    task a(params, dst);
    const int ith = params->ith, nth = params->nth;
    float * scratch = a.partials + a.l.n_partials()*a.l.partial + ith*a.l.scratch();

    // blocks go to whichever thread is free: cores are rarely equally fast or equally idle
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    if (!ggml_sparse_attn_has_evidence(dst)) {
        ggml_barrier(params->threadpool);
        attend_all(params, a, scratch);
        ggml_barrier(params->threadpool);
        merge_all(params, a);
        return;
    }

    arena work(a.partials + attn_floats(a.l, nth));
    evidence_pass evidence(dst, work);
    evidence.look_at(dst);
    a.evidence = &evidence;
    ggml_barrier(params->threadpool);
    attend_all(params, a, scratch);
    ggml_barrier(params->threadpool);
    merge_all(params, a);
    ggml_barrier(params->threadpool);
    for (int64_t i = ith; i < evidence.n_tiles; i += nth) {
        evidence.write_tile(i);
    }
}

static size_t evidence_bytes(const ggml_tensor * dst) {
    return ggml_sparse_attn_has_evidence(dst) ? sfi::size_of<evidence_pass>(dst) + sfi::arena::line : 0;
}

size_t sfi::sparse_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (ggml_sparse_attn_in_blocks(dst)) {
        return sparse_attn_blocks_work_size(dst, n_threads);
    }
    return attn_floats(layout(dst), n_threads)*sizeof(float) + evidence_bytes(dst);
}

bool sfi::sparse_attn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    if (evidence_bytes(dst) > max_evidence) {
        return false;
    }
    return q->ne[0] % 16 == 0 && q->ne[0] <= 512 && v->ne[0] % 16 == 0 && v->ne[0] <= 512
        && k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0
        && tile_ops_supported(k->type) && tile_ops_supported(v->type);
}
