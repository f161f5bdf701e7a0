// GGML_OP_SPARSE_ATTN on the CPU.
//
// The support is cut into blocks of cells. A block of `always` serves every head, so its rows are read once and in
// full, a few cells at a time, in the order of memory: that is what hardware prefetching is good at. A block of
// `selected` serves one KV head; its rows lie anywhere, and are fetched one phase before their use. Each block yields, per query head, a partial output with its
// softmax maximum and sum; the partials are merged in block order, so the result does not depend on the number of
// threads or on which thread took which block.
//
//   pass 1  gather the rows of a tile of cells
//   pass 2  logits of the whole GQA group, each K row read once
//   pass 3  online softmax
//   pass 4  accumulate V
//   pass 5  merge the partials, the tail and the learned sink

#include "sfi-ops.h"

#include "attn-tile.h"
#include "evidence-pass.h"
#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>

namespace {

using sfi::tile_cells;
constexpr int block_cells = 4*tile_cells;   // the unit of work that a thread takes
constexpr int chunk_cells = 16;             // rows of `always` that all heads visit before anyone goes on

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
    }

    int64_t n_output()   const { return n_embd_v*n_head*n_tokens*n_stream; }
    int64_t n_partials() const { return n_stream*n_tokens*n_head*per_head; }
    int64_t n_items()    const { return n_stream*n_tokens*(always_blocks + n_head_kv*selected_blocks); }
    // a thread's logits of one tile and its scaled queries, for all heads
    int64_t scratch()    const { return n_head*(tile_cells + n_embd_k) + 16; }
};

struct task {
    const ggml_tensor * dst, * q, * k, * v, * always, * selected, * tail, * sinks;
    layout        l;
    sfi::tile_ops ops;
    float         scale, softcap;
    size_t        k_row_size, v_row_size; // bytes of one head
    float       * partials;
    const sfi::evidence_pass * evidence = nullptr;

    explicit task(const ggml_compute_params * params, ggml_tensor * dst) :
        dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), always(dst->src[3]), selected(dst->src[4]),
        tail(dst->src[5]), sinks(dst->src[6]), l(dst),
        ops(sfi::tile_ops_for(k->type, v->type, params->use_ref)),
        scale(ggml_get_op_params_f32(dst, 0)), softcap(ggml_get_op_params_f32(dst, 1)),
        k_row_size(ggml_row_size(k->type, l.n_embd_k)), v_row_size(ggml_row_size(v->type, l.n_embd_v)),
        partials((float *) params->wdata) {}

    float * partial(int64_t s, int64_t t, int64_t h, int64_t block) const {
        return partials + (((s*l.n_tokens + t)*l.n_head + h)*l.per_head + block)*l.partial;
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
    uint8_t      place[tile_cells]; // in the part of the list
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
                place[n] = (uint8_t) i;
                ++n;
            }
        }
    }
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

// Passes 2 to 4 for one tile and the KV heads [h0, h1). o: the partial of the first head, `stride` floats before the
// next one's. `next` is the tile after this one, null at the end of a block. number: of the tile in the list.
void attend(const task & a, const tile & t, const tile * next, int64_t h0, int64_t h1, const float * q, float * logits,
            float * o, int64_t stride, int64_t number) {
    const int  group  = (int) a.l.group, d_k = (int) a.l.n_embd_k, d_v = (int) a.l.n_embd_v;
    const bool shared = h1 - h0 > 1;
    const int  chunk  = shared ? chunk_cells : tile_cells;

    // pass 2
    for (int c = 0; c < t.n; c += chunk) {
        const int n = std::min(chunk, t.n - c);
        for (int64_t h = h0; h < h1; ++h) {
            const sfi::row_set rows = { t.k + c, h*a.k->nb[2], n, t.v + c, h*a.v->nb[2], a.v_row_size, n };
            a.ops.dot(q + (h - h0)*group*d_k, group, d_k, rows, logits + (h - h0)*group*tile_cells + c, tile_cells);
            if (a.evidence) {
                a.evidence->add_keys(number, h, rows, c);
            }
        }
    }
    for (int64_t h = h0; h < h1 && a.evidence; ++h) {
        a.evidence->finish_tile(number, h, t.place, t.n);
    }
    for (int64_t g = 0; g < (h1 - h0)*group && t.n > 0; ++g) {
        softmax(a, logits + g*tile_cells, t.n, o + g*stride);
    }
    // pass 4
    for (int c = 0; c < t.n; c += chunk) {
        const int n = std::min(chunk, t.n - c);
        for (int64_t h = h0; h < h1; ++h) {
            const int n_next = next ? std::clamp(next->n - c, 0, chunk) : 0;
            const sfi::row_set rows = { t.v + c, h*a.v->nb[2], n, next ? next->k + c : nullptr, h*a.k->nb[2], a.k_row_size, n_next };
            a.ops.mad(logits + (h - h0)*group*tile_cells + c, tile_cells, group, d_v, rows, o + (h - h0)*group*stride, stride);
        }
    }
}

void clear(const task & a, float * partial) {
    std::fill(partial, partial + a.l.n_embd_v, 0.0f);
    partial[a.l.n_embd_v]     = -INFINITY;
    partial[a.l.n_embd_v + 1] = 0.0f;
}

// Passes 1 to 4 for one block of a list, for the KV heads [h0, h1) that share it.
void attend_block(const task & a, int64_t s, int64_t t, int64_t h0, int64_t h1,
                  const int32_t * list, int64_t n_list, int64_t block, int64_t slot, float * scratch) {
    const int64_t stride = a.l.per_head*a.l.partial;
    const int64_t begin  = block*block_cells;
    const int64_t end    = std::min(begin + block_cells, n_list);

    float * logits = scratch;
    float * q      = scratch + a.l.n_head*tile_cells;

    for (int64_t h = h0*a.l.group; h < h1*a.l.group; ++h) {
        clear(a, a.partial(s, t, h, slot));
    }
    load_queries(a, s, t, h0, h1, q);

    tile tiles[2]; // this one and the next
    const auto gather = [&](int64_t i) {
        tile & to = tiles[i/tile_cells % 2];
        to.gather(a, s, list + i, std::min<int64_t>(tile_cells, end - i));
        return &to;
    };
    const tile * cur = gather(begin);
    for (int64_t i = begin; i < end; i += tile_cells) {
        const tile * next = i + tile_cells < end ? gather(i + tile_cells) : nullptr;
        if (cur->n > 0 || a.evidence) {
            attend(a, *cur, next, h0, h1, q, logits, a.partial(s, t, h0*a.l.group, slot), stride, i/tile_cells);
        }
        cur = next;
    }
}

// Item i of a token: first the blocks of `always`, then those of each KV head's `selected`.
void attend_item(const task & a, int64_t i, float * scratch) {
    const layout & l = a.l;
    const int64_t per_token = l.always_blocks + l.n_head_kv*l.selected_blocks;
    const int64_t s = i/(per_token*l.n_tokens);
    const int64_t t = i/per_token % l.n_tokens;
    int64_t       b = i % per_token;

    if (b < l.always_blocks) {
        attend_block(a, s, t, 0, l.n_head_kv, list_of(a.always, t, 0, s), l.n_always, b, b, scratch);
        return;
    }
    b -= l.always_blocks;
    const int64_t h = b/l.selected_blocks;
    b %= l.selected_blocks;
    attend_block(a, s, t, h, h + 1, list_of(a.selected, h, t, s), l.n_selected, b, l.always_blocks + b, scratch);
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

    float max = std::max(sink, tail ? tail[n] : -INFINITY);
    for (int64_t b = 0; b < l.per_head; ++b) {
        max = std::max(max, a.partial(s, t, h, b)[n]);
    }

    std::fill(out, out + n, 0.0f);
    if (max == -INFINITY) {
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
}

} // namespace

namespace {

void attend_all(const ggml_compute_params * params, const task & a, float * scratch) {
    for (int64_t i = params->ith; i < a.l.n_items(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        attend_item(a, i, scratch);
    }
}

void merge_all(const ggml_compute_params * params, const task & a) {
    const layout & l = a.l;
    const int64_t n_rows = l.n_stream*l.n_tokens*l.n_head;
    for (int64_t i = params->ith; i < n_rows; i += params->nth) {
        merge(a, i/(l.n_head*l.n_tokens), i/l.n_head % l.n_tokens, i % l.n_head);
    }
}

int64_t attn_floats(const layout & l, int n_threads) {
    return l.n_partials()*l.partial + n_threads*l.scratch();
}

} // namespace

void sfi::sparse_attn(const ggml_compute_params * params, ggml_tensor * dst) {
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

    evidence_pass evidence(params, dst, (char *) (a.partials + attn_floats(a.l, nth)), a.l.n_output());
    evidence.prepare(ith, nth);
    a.evidence = &evidence;
    ggml_barrier(params->threadpool);
    attend_all(params, a, scratch);
    ggml_barrier(params->threadpool);
    merge_all(params, a);
    for (int64_t h = nth - 1 - ith; h < evidence.n_head_kv; h += nth) {
        evidence.finish_head(h);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = ith; i < evidence.n_tiles; i += nth) {
        evidence.write_tile(i);
    }
}

size_t sfi::sparse_attn_work_size(const ggml_tensor * dst, int n_threads) {
    return attn_floats(layout(dst), n_threads)*sizeof(float)
        + (ggml_sparse_attn_has_evidence(dst) ? evidence_pass::work_size(dst, n_threads) : 0);
}

bool sfi::sparse_attn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    if (ggml_sparse_attn_has_evidence(dst) && !evidence_pass::supported(dst)) {
        return false;
    }
    return q->ne[0] % 16 == 0 && q->ne[0] <= 512 && v->ne[0] % 16 == 0 && v->ne[0] <= 512
        && k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0
        && tile_ops_supported(k->type) && tile_ops_supported(v->type);
}
