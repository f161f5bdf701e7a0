// SUPPORT_EVIDENCE on the CPU.
//
// Rows are the used queries times the heads of a group. As many KV heads at once as the work buffer allows:
//
//   pass 1  logits of all rows for a block of cells; each row's maximum m and sum of exp(x - m); exp(x - m)^alpha
//   pass 2  each row's log-sum-exp over all blocks, and from it the weight of each of its blocks
//   pass 3  evidence of a cell: the weighted sum over the rows, which is the mean of p^alpha
//
// Blocks are shared out between the threads; a barrier separates the passes.

#include "sfi-ops.h"

#include "attn-tile.h"
#include "ggml-cpu-impl.h"
#include "sfi-params.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int     block_cells = 64;       // K of a block, transposed to F32, stays in L2
constexpr int64_t work_floats = 8 << 20;  // of passes over several KV heads at once

struct task {
    const ggml_tensor * dst, * q, * k;
    const int32_t * cells, * plan;
    int64_t n_list, n_embd, n_head_kv, group;
    int64_t n_queries;            // used ones
    int64_t rows, max_rows;       // used queries * group; what the buffers are sized for
    int64_t n_blocks, heads_at_once;
    int64_t j0, j1, n_visible;    // candidates; cells that any row sees
    int32_t query[64];            // the used queries
    sfi::tile_ops ops;
    float scale, softcap, alpha;
    bool  candidates_only;

    // slot i: the i-th of the KV heads at work
    float * powers;               // [heads_at_once, n_blocks, max_rows, block_cells]  exp(x - m)^alpha
    float * row_max, * row_sum;   // [heads_at_once, max_rows, n_blocks]; pass 2 turns row_sum into the weight
    float * scratch;              // of this thread

    float * block(int64_t slot, int64_t b) const { return powers + (slot*n_blocks + b)*max_rows*block_cells; }
    float * max_of(int64_t slot, int64_t r) const { return row_max + (slot*max_rows + r)*n_blocks; }
    float * sum_of(int64_t slot, int64_t r) const { return row_sum + (slot*max_rows + r)*n_blocks; }

    static int64_t head_floats(int64_t max_rows, int64_t n_blocks) { return max_rows*n_blocks*(block_cells + 2); }
    static int64_t heads_per_pass(int64_t n_head_kv, int64_t max_rows, int64_t n_blocks) {
        return std::clamp<int64_t>(work_floats/std::max<int64_t>(head_floats(max_rows, n_blocks), 1), 1, n_head_kv);
    }

    task(const ggml_compute_params * params, ggml_tensor * dst) :
            dst(dst), q(dst->src[0]), k(dst->src[1]),
            cells((const int32_t *) dst->src[2]->data), plan((const int32_t *) dst->src[3]->data),
            ops(sfi::tile_ops_for(k->type, k->type, params->use_ref)) {
        n_list    = dst->ne[0];
        n_embd    = q->ne[0];
        n_head_kv = k->ne[2];
        group     = q->ne[1]/n_head_kv;
        n_blocks  = (n_list + block_cells - 1)/block_cells;
        max_rows  = group*q->ne[2];
        heads_at_once = heads_per_pass(n_head_kv, max_rows, n_blocks);

        const auto params_of_op = sfi::params_of<sfi_evidence_params>(dst);
        scale   = params_of_op.scale;
        softcap = params_of_op.softcap;
        alpha   = params_of_op.alpha;
        candidates_only = params_of_op.over == GGML_SUPPORT_SOFTMAX_CANDIDATES;

        j0 = std::clamp<int64_t>(plan[0], 0, n_list);
        j1 = std::clamp<int64_t>(plan[1], j0, n_list);
        n_queries = n_visible = 0;
        for (int i = 0; i < q->ne[2]; ++i) {
            if (plan[2 + i] > 0) {
                query[n_queries++] = i;
                n_visible = std::max<int64_t>(n_visible, plan[2 + i]);
            }
        }
        n_visible = std::min(n_visible, n_list);
        rows = n_queries*group;

        float * p = (float *) params->wdata;
        powers  = p; p += heads_at_once*max_rows*n_blocks*block_cells;
        row_max = p; p += heads_at_once*max_rows*n_blocks;
        row_sum = p; p += heads_at_once*max_rows*n_blocks;
        scratch = p + params->ith*scratch_size(n_embd, max_rows, n_blocks);
    }

    // queries [rows, n_embd]; then keys [n_embd, block_cells] and keys before transposing, or pass 2's row of blocks
    static int64_t scratch_size(int64_t n_embd, int64_t max_rows, int64_t n_blocks) {
        return max_rows*n_embd + std::max(n_embd*(block_cells + sfi::max_vector), n_blocks + sfi::max_vector) + 16;
    }

    int64_t visible(int64_t row) const { return std::min<int64_t>(plan[2 + query[row/group]], n_list); }
};

void load_queries(const task & a, int64_t h_kv, float * to) {
    const float scale = a.softcap > 0.0f ? a.scale/a.softcap : a.scale;
    for (int64_t r = 0; r < a.rows; ++r) {
        const float * from = (const float *) ((const char *) a.q->data
                + (h_kv*a.group + r % a.group)*a.q->nb[1] + a.query[r/a.group]*a.q->nb[2]);
        for (int64_t i = 0; i < a.n_embd; ++i) {
            to[r*a.n_embd + i] = scale*from[i];
        }
    }
}

// pass 1, one row of a block: logits x[0 .. n) become powers. What the row does not see, or does not count, gets 0.
void row_powers(const task & a, int64_t slot, int64_t r, int64_t block, const bool * is_pad, int n, float * x) {
    const int64_t begin = block*block_cells;
    const int64_t first = a.candidates_only ? a.j0 : 0;
    const int64_t last  = std::min(a.visible(r), a.candidates_only ? a.j1 : a.n_list);
    const int b = (int) std::clamp<int64_t>(first - begin, 0, n);
    const int e = (int) std::clamp<int64_t>(last  - begin, b, n);

    for (int i = 0; i < n && a.softcap > 0.0f; ++i) {
        x[i] = a.softcap*tanhf(x[i]);
    }
    for (int i = 0; i < n && is_pad; ++i) {
        x[i] = is_pad[i] ? -INFINITY : x[i];
    }
    std::fill(x, x + b, -INFINITY);
    std::fill(x + e, x + block_cells, -INFINITY);

    const float max = a.ops.max(x, block_cells);
    float sum = 0.0f;
    if (max == -INFINITY) {
        std::fill(x, x + block_cells, 0.0f);
    } else if (a.alpha == 1.0f) {
        sum = a.ops.exp(x, block_cells, max);
    } else {
        float y[block_cells];
        std::copy(x, x + block_cells, y);
        sum = a.ops.exp(y, block_cells, max);
        for (int i = 0; i < block_cells; ++i) {
            x[i] = a.alpha*(x[i] - max);
        }
        a.ops.exp(x, block_cells, 0.0f);
    }
    a.max_of(slot, r)[block] = max;
    a.sum_of(slot, r)[block] = sum;
}

// pass 1
void block_powers(const task & a, int64_t slot, int64_t h_kv, int64_t block, const float * q) {
    const int64_t begin = block*block_cells;
    const int     n     = (int) std::min<int64_t>(block_cells, a.n_list - begin);

    float * kt  = a.scratch + a.max_rows*a.n_embd;
    float * tmp = kt + a.n_embd*block_cells;

    const char * rows[block_cells];
    bool is_pad[block_cells], any_pad = false;
    for (int i = 0; i < n; ++i) {
        const int32_t cell = a.cells[begin + i];
        is_pad[i] = (uint64_t) cell >= (uint64_t) a.k->ne[1]; // negative cells are huge
        any_pad   = any_pad || is_pad[i];
        rows[i]   = (const char *) a.k->data + h_kv*a.k->nb[2] + (is_pad[i] ? 0 : cell)*a.k->nb[1];
    }

    float * out = a.block(slot, block);
    const int n_ahead = std::max(0, n - sfi::max_vector);
    a.ops.transpose((int) a.n_embd, { rows, 0, n, rows + n - n_ahead, 0, ggml_row_size(a.k->type, a.n_embd), n_ahead }, kt, block_cells, tmp);
    a.ops.gemm(q, (int) a.rows, (int) a.n_embd, kt, block_cells, (int) GGML_PAD(n, sfi::max_vector), out, block_cells);

    for (int64_t r = 0; r < a.rows; ++r) {
        row_powers(a, slot, r, block, any_pad ? is_pad : nullptr, n, out + r*block_cells);
    }
}

// pass 2: the weight of block b in row r is (exp(m_b - lse))^alpha / rows
void row_weights(const task & a, int64_t slot, int64_t r, int64_t n_blocks, float * tmp) {
    const float * max = a.max_of(slot, r);
    float       * sum = a.sum_of(slot, r);
    const float top = *std::max_element(max, max + n_blocks);
    if (top == -INFINITY) {
        std::fill(sum, sum + n_blocks, 0.0f); // the row sees nothing
        return;
    }
    const int n_pad = (int) GGML_PAD(n_blocks, sfi::max_vector);
    std::copy(max, max + n_blocks, tmp);
    std::fill(tmp + n_blocks, tmp + n_pad, -INFINITY);
    a.ops.exp(tmp, n_pad, top);
    double total = 0.0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        total += (double) sum[b]*tmp[b];
    }
    const float lse = top + (float) std::log(total);
    for (int64_t b = 0; b < n_blocks; ++b) {
        tmp[b] = a.alpha*(max[b] - lse);
    }
    std::fill(tmp + n_blocks, tmp + n_pad, -INFINITY);
    a.ops.exp(tmp, n_pad, 0.0f);
    for (int64_t b = 0; b < n_blocks; ++b) {
        sum[b] = tmp[b]/a.rows;
    }
}

// pass 3
void block_evidence(const task & a, int64_t slot, int64_t h_kv, int64_t block) {
    const int64_t begin = block*block_cells;
    float evidence[block_cells] = {};
    for (int64_t r = 0; r < a.rows; ++r) {
        const float   weight = a.sum_of(slot, r)[block];
        const float * from   = a.block(slot, block) + r*block_cells;
        for (int i = 0; i < block_cells; ++i) {
            evidence[i] += weight*from[i];
        }
    }
    float * out = (float *) ((char *) a.dst->data + h_kv*a.dst->nb[1]);
    for (int64_t j = begin; j < std::min(begin + block_cells, a.n_list); ++j) {
        out[j] = j >= a.j0 && j < a.j1 ? evidence[j - begin] : 0.0f;
    }
}

} // namespace

void sfi::evidence(const ggml_compute_params * params, ggml_tensor * dst) {
    const task a(params, dst);
    const int ith = params->ith, nth = params->nth;
    const int64_t n_seen = (a.n_visible + block_cells - 1)/block_cells;

    for (int64_t h0 = 0; h0 < a.n_head_kv; h0 += a.heads_at_once) {
        const int64_t n_heads = std::min(a.heads_at_once, a.n_head_kv - h0);
        float * q = a.scratch;

        // items in the order of heads, shared out in runs, so that a thread seldom changes its queries
        const int64_t n_items = n_heads*n_seen, first = n_items*ith/nth, last = n_items*(ith + 1)/nth;
        for (int64_t i = first; i < last; ++i) {
            if (i == first || i % n_seen == 0) {
                load_queries(a, h0 + i/n_seen, q);
            }
            block_powers(a, i/n_seen, h0 + i/n_seen, i % n_seen, q);
        }
        ggml_barrier(params->threadpool);

        for (int64_t i = ith; i < n_heads*a.rows; i += nth) {
            row_weights(a, i/a.rows, i % a.rows, n_seen, q + a.max_rows*a.n_embd);
        }
        ggml_barrier(params->threadpool);

        for (int64_t i = first; i < last; ++i) {
            block_evidence(a, i/n_seen, h0 + i/n_seen, i % n_seen);
        }
        for (int64_t h = h0 + ith; h < h0 + n_heads; h += nth) {
            float * out = (float *) ((char *) dst->data + h*dst->nb[1]);
            std::fill(out + std::min(n_seen*block_cells, a.n_list), out + a.n_list, 0.0f);
        }
        if (h0 + n_heads < a.n_head_kv) {
            ggml_barrier(params->threadpool); // the buffers are used again
        }
    }
}

size_t sfi::evidence_work_size(const ggml_tensor * dst, int n_threads) {
    const ggml_tensor * q = dst->src[0];
    const int64_t max_rows = q->ne[1]/dst->ne[1]*q->ne[2];
    const int64_t n_blocks = (dst->ne[0] + block_cells - 1)/block_cells;
    const int64_t n_heads  = task::heads_per_pass(dst->ne[1], max_rows, n_blocks);
    return (n_heads*task::head_floats(max_rows, n_blocks) + n_threads*task::scratch_size(q->ne[0], max_rows, n_blocks))*sizeof(float);
}

bool sfi::evidence_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    return k->ne[0] % 16 == 0 && k->ne[0] <= 512 && k->ne[0] % ggml_blck_size(k->type) == 0 && tile_ops_supported(k->type);
}
