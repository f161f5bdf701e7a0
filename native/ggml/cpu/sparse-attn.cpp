// GGML_OP_SPARSE_ATTN on the CPU.
//
// The support is cut into blocks of cells. A block of `always` serves every head, so its rows are read once and in
// full, a few cells at a time, in the order of memory: that is what hardware prefetching is good at. A block of
// `selected` serves one KV head; its rows lie anywhere, and are fetched one phase before their use. Each block yields, per query head, a partial output with its
// softmax maximum and sum; the partials are merged in block order, so the result does not depend on the number of
// threads or on which thread took which block.
//
// Tokens that see different lengths of one list (`visible`) visit a block together, a chunk of its rows at a time. What
// is computed for each is the same, in the same order, as for it alone.
//
//   pass 1  gather the rows of a tile of cells
//   pass 2  logits of the whole GQA group, each K row read once
//   pass 3  online softmax
//   pass 4  accumulate V
//   pass 5  merge the partials, the tail and the learned sink

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int tile_cells  = 64;             // logits of a group and the rows' addresses stay in L1
constexpr int block_cells = 4*tile_cells;   // the unit of work that a thread takes
constexpr int chunk_cells = 16;             // rows of `always` that all heads and tokens visit before anyone goes on
constexpr int64_t batch_floats = 1 << 16;   // scratch of the tokens that visit a block together: stays in L2

int64_t n_blocks(int64_t n) {
    return (n + block_cells - 1)/block_cells;
}

// A partial: output [n_embd_v], maximum, sum.
struct layout {
    int64_t n_tokens, n_head, n_head_kv, group, n_stream;
    int64_t n_embd_k, n_embd_v;
    int64_t n_always, n_selected;
    int64_t always_blocks, selected_blocks; // per token; per token and KV head
    int64_t partial;                        // floats of one partial
    int64_t per_head;                       // partials of one query head
    int64_t batch;                          // tokens that visit a block together

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
        partial  = n_embd_v + 2;
        per_head = always_blocks + selected_blocks;
        batch    = dst->src[8] ? std::clamp<int64_t>(batch_floats/token_scratch(), 1, n_tokens) : 1;
    }

    int64_t n_partials() const { return n_stream*n_tokens*n_head*per_head; }
    int64_t n_batches()  const { return (n_tokens + batch - 1)/batch; }
    int64_t n_items()    const { return n_stream*n_batches()*(always_blocks + n_head_kv*selected_blocks); }
    // logits of one tile and scaled queries of one token, for all heads
    int64_t token_scratch() const { return n_head*(tile_cells + n_embd_k); }
    int64_t scratch()       const { return batch*token_scratch() + 16; }
};

struct task {
    const ggml_tensor * dst, * q, * k, * v, * always, * selected, * tail, * sinks, * visible;
    layout        l;
    sfi::tile_ops ops;
    float         scale, softcap;
    size_t        k_row_size, v_row_size; // bytes of one head
    float       * partials;

    explicit task(const ggml_compute_params * params, ggml_tensor * dst) :
        dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), always(dst->src[3]), selected(dst->src[4]),
        tail(dst->src[5]), sinks(dst->src[6]), visible(dst->src[8]), l(dst),
        ops(sfi::tile_ops_for(k->type, v->type, params->use_ref)),
        scale(ggml_get_op_params_f32(dst, 0)), softcap(ggml_get_op_params_f32(dst, 1)),
        k_row_size(ggml_row_size(k->type, l.n_embd_k)), v_row_size(ggml_row_size(v->type, l.n_embd_v)),
        partials((float *) params->wdata) {}

    float * partial(int64_t s, int64_t t, int64_t h, int64_t block) const {
        return partials + (((s*l.n_tokens + t)*l.n_head + h)*l.per_head + block)*l.partial;
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
    int          n = 0;
    int          upto[tile_cells + 1]; // of the first i entries of the list, those that are no pads

    // pass 1: drop the pads
    void gather(const task & a, int64_t s, const int32_t * list, int64_t n_list) {
        const char * k0 = (const char *) a.k->data + s*a.k->nb[3];
        const char * v0 = (const char *) a.v->data + s*a.v->nb[3];
        n = 0;
        for (int64_t i = 0; i < n_list; ++i) {
            upto[i] = n;
            if ((uint64_t) list[i] < (uint64_t) a.k->ne[1]) { // negative cells are huge
                k[n] = k0 + list[i]*a.k->nb[1];
                v[n] = v0 + list[i]*a.v->nb[1];
                ++n;
            }
        }
        std::fill(upto + n_list, upto + tile_cells + 1, n);
    }
};

// What visits a block: the KV heads [h0, h1) of the tokens [t0, t1) of stream s. Rows of scratch are of all heads of
// the first token, then of the second ...
struct visit {
    int64_t s, t0, t1, h0, h1;

    int64_t n_kv() const { return h1 - h0; }
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

// Passes 2 to 4 for one tile, which begins at entry `first` of a list of n_list. `next` is the tile after this one, null
// at the end of a block. slot: the partials' place.
void attend(const task & a, const visit & w, const tile & t, const tile * next, int64_t first, int64_t n_list,
            const float * q, float * logits, int64_t slot) {
    const int     group  = (int) a.l.group, d_k = (int) a.l.n_embd_k, d_v = (int) a.l.n_embd_v;
    const int64_t stride = a.l.per_head*a.l.partial;
    const int64_t rows_of_token = w.n_kv()*group;
    const int     n_tokens = (int) (w.t1 - w.t0);
    const int     chunk    = w.n_kv() > 1 || n_tokens > 1 ? chunk_cells : tile_cells;

    const auto row = [&](int64_t h, int i) { return i*rows_of_token + (h - w.h0)*group; };
    const auto n_of = [&](int i) { // cells of the tile that the i-th token sees
        return t.upto[std::clamp<int64_t>(a.seen(w.s, w.t0 + i, n_list) - first, 0, tile_cells)];
    };

    // pass 2
    for (int c = 0; c < t.n; c += chunk) {
        for (int64_t h = w.h0; h < w.h1; ++h) {
            for (int i = 0; i < n_tokens; ++i) {
                const int n = std::min(chunk, n_of(i) - c);
                if (n > 0) {
                    const int n_next = i == 0 ? n : 0;
                    const sfi::row_set rows = { t.k + c, h*a.k->nb[2], n, t.v + c, h*a.v->nb[2], a.v_row_size, n_next };
                    a.ops.dot(q + row(h, i)*d_k, group, d_k, rows, logits + row(h, i)*tile_cells + c, tile_cells);
                }
            }
        }
    }
    for (int i = 0; i < n_tokens; ++i) {
        for (int64_t g = 0; g < rows_of_token && n_of(i) > 0; ++g) {
            softmax(a, logits + (i*rows_of_token + g)*tile_cells, n_of(i), a.partial(w.s, w.t0 + i, w.h0*group + g, slot));
        }
    }
    // pass 4
    for (int c = 0; c < t.n; c += chunk) {
        for (int64_t h = w.h0; h < w.h1; ++h) {
            for (int i = 0; i < n_tokens; ++i) {
                const int n = std::min(chunk, n_of(i) - c);
                if (n > 0) {
                    const int n_next = next && i == 0 ? std::clamp(next->n - c, 0, chunk) : 0;
                    const sfi::row_set rows = { t.v + c, h*a.v->nb[2], n, next ? next->k + c : nullptr, h*a.k->nb[2], a.k_row_size, n_next };
                    a.ops.mad(logits + row(h, i)*tile_cells + c, tile_cells, group, d_v, rows,
                            a.partial(w.s, w.t0 + i, h*group, slot), stride);
                }
            }
        }
    }
}

void clear(const task & a, float * partial) {
    std::fill(partial, partial + a.l.n_embd_v, 0.0f);
    partial[a.l.n_embd_v]     = -INFINITY;
    partial[a.l.n_embd_v + 1] = 0.0f;
}

// Passes 1 to 4 for one block of a list.
void attend_block(const task & a, const visit & w, const int32_t * list, int64_t n_list, int64_t block, int64_t slot,
                  float * scratch) {
    const int64_t begin = block*block_cells;
    const int64_t group = a.l.group;
    int64_t       end   = begin; // of what any of the tokens sees

    float * logits = scratch;
    float * q      = scratch + a.l.batch*a.l.n_head*tile_cells;

    for (int64_t t = w.t0; t < w.t1; ++t) {
        for (int64_t h = w.h0*group; h < w.h1*group; ++h) {
            clear(a, a.partial(w.s, t, h, slot));
        }
        load_queries(a, w.s, t, w.h0, w.h1, q + (t - w.t0)*w.n_kv()*group*a.l.n_embd_k);
        end = std::max(end, std::min(begin + block_cells, a.seen(w.s, t, n_list)));
    }

    tile tiles[2]; // this one and the next
    const auto gather = [&](int64_t i) {
        tile & to = tiles[i/tile_cells % 2];
        to.gather(a, w.s, list + i, std::min<int64_t>(tile_cells, end - i));
        return &to;
    };
    const tile * cur = begin < end ? gather(begin) : nullptr;
    for (int64_t i = begin; i < end; i += tile_cells) {
        const tile * next = i + tile_cells < end ? gather(i + tile_cells) : nullptr;
        if (cur->n > 0) {
            attend(a, w, *cur, next, i, n_list, q, logits, slot);
        }
        cur = next;
    }
}

// Item i of a batch of tokens: first the blocks of `always`, then those of each KV head's `selected`.
void attend_item(const task & a, int64_t i, float * scratch) {
    const layout & l = a.l;
    const int64_t per_batch = l.always_blocks + l.n_head_kv*l.selected_blocks;
    const int64_t s = i/(per_batch*l.n_batches());
    const int64_t t = i/per_batch % l.n_batches()*l.batch;
    int64_t       b = i % per_batch;

    if (b < l.always_blocks) {
        const visit w = { s, t, std::min(t + l.batch, l.n_tokens), 0, l.n_head_kv };
        attend_block(a, w, list_of(a.always, t, 0, s), l.n_always, b, b, scratch);
        return;
    }
    b -= l.always_blocks;
    const int64_t h = b/l.selected_blocks;
    b %= l.selected_blocks;
    attend_block(a, { s, t, t + 1, h, h + 1 }, list_of(a.selected, h, t, s), l.n_selected, b, l.always_blocks + b, scratch);
}

// pass 5, one query head of one token
void merge(const task & a, int64_t s, int64_t t, int64_t h) {
    const layout & l = a.l;
    const int64_t n = l.n_embd_v;
    float * out = (float *) ((char *) a.dst->data + h*a.dst->nb[1] + t*a.dst->nb[2] + s*a.dst->nb[3]);

    const float * tail = a.tail
        ? (const float *) ((const char *) a.tail->data + h*a.tail->nb[1] + t*a.tail->nb[2] + s*a.tail->nb[3])
        : nullptr;
    const float sink = a.sinks ? ((const float *) a.sinks->data)[h] : -INFINITY;

    float max = std::max(sink, tail ? tail[n] : -INFINITY);
    for (int64_t b = 0; b < l.per_head; ++b) {
        max = std::max(max, a.partial(s, t, h, b)[n]);
    }

    std::fill(out, out + n, 0.0f);
    float * mass = a.dst->src[7] ? (float *) ((char *) a.dst->src[7]->data + h*a.dst->src[7]->nb[1]) : nullptr;
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

void sfi::sparse_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const layout & l = a.l;

    // blocks go to whichever thread is free: cores are rarely equally fast or equally idle
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    float * scratch = a.partials + l.n_partials()*l.partial + params->ith*l.scratch();
    for (int64_t i = params->ith; i < l.n_items(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        attend_item(a, i, scratch);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_rows = l.n_stream*l.n_tokens*l.n_head;
    for (int64_t i = params->ith; i < n_rows; i += params->nth) {
        merge(a, i/(l.n_head*l.n_tokens), i/l.n_head % l.n_tokens, i % l.n_head);
    }
}

size_t sfi::sparse_attn_work_size(const ggml_tensor * dst, int n_threads) {
    const layout l(dst);
    return (l.n_partials()*l.partial + n_threads*l.scratch())*sizeof(float);
}

bool sfi::sparse_attn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    return q->ne[0] % 16 == 0 && q->ne[0] <= 512 && v->ne[0] % 16 == 0 && v->ne[0] <= 512
        && k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0
        && tile_ops_supported(k->type) && tile_ops_supported(v->type);
}
