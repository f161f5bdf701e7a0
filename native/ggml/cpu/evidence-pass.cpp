#include "evidence-pass.h"

#include "ggml-cpu-impl.h"

#include <cmath>

namespace sfi {

static int64_t max_rows(const ggml_tensor * dst) {
    const ggml_tensor * queries = dst->src[8];
    return queries ? GGML_PAD(queries->ne[1]/dst->src[1]->ne[2]*queries->ne[2], max_vector) : 0;
}

static int64_t tiles_of(int64_t n_list) {
    return (n_list + tile_cells - 1)/tile_cells;
}

constexpr int     rows_limit = 4096;      // of a KV head
constexpr int64_t work_limit = 512 << 20; // bytes; a longer list is better served by SUPPORT_EVIDENCE, head by head

bool evidence_pass::supported(const ggml_tensor * dst) {
    return max_rows(dst) <= rows_limit && (int64_t) work_size(dst, 1) <= work_limit;
}

template <class T> static T * take(char * & work, size_t n) {
    T * p = (T *) work;
    work += GGML_PAD(n*sizeof(T), evidence_pass::padding);
    return p;
}

evidence_pass::evidence_pass(const ggml_compute_params * params, const ggml_tensor * dst, char * work, int64_t n_output) :
        queries(dst->src[8]), k(dst->src[1]), cells((const int32_t *) dst->src[3]->data), plan((const int32_t *) dst->src[9]->data) {
    n_list    = dst->src[3]->ne[0];
    n_tiles   = tiles_of(n_list);
    n_head_kv = k->ne[2];
    n_head    = dst->src[0]->ne[2];
    tiles_padded = GGML_PAD(n_tiles, max_vector);
    n_embd    = (int) k->ne[0];
    group     = n_head/n_head_kv;
    scale     = ggml_get_op_params_f32(dst, 0);
    softcap   = ggml_get_op_params_f32(dst, 1);
    result    = (float *) dst->data + n_output;

    j0 = std::clamp<int64_t>(plan[0], 0, n_list);
    j1 = std::clamp<int64_t>(plan[1], j0, n_list);
    all_see = n_list;
    for (int i = 0; queries && i < queries->ne[2]; ++i) {
        if (plan[2 + i] > 0) {
            query[n_used++] = i;
            all_see = std::min<int64_t>(all_see, plan[2 + i]);
        }
    }
    rows = n_used*(int) group;
    ops  = lanes_ops_for(k->type, rows, params->use_ref);
    rows_padded = (int) GGML_PAD(rows, ops.width);
    query_bytes = GGML_PAD(ops.query_bytes(rows_padded, n_embd), padding);
    key_bytes   = ops.key_bytes(n_embd);

    work   = (char *) GGML_PAD((uintptr_t) work, (uintptr_t) padding);
    own     = take<float>(work, n_tiles*n_head*tile_cells);
    own_max = take<float>(work, n_head*tiles_padded);
    powers  = take<float>(work, n_tiles*n_head_kv*tile_cells*rows_padded);
    max     = take<float>(work, n_tiles*n_head_kv*rows_padded);
    sum     = take<float>(work, n_tiles*n_head_kv*rows_padded);
    packed  = take<char>(work, n_head_kv*query_bytes);
    keys    = work + params->ith*GGML_PAD(std::max<size_t>(tile_cells, max_rows(dst))*n_embd*sizeof(float), padding);
}

size_t evidence_pass::work_size(const ggml_tensor * dst, int n_threads) {
    const int64_t rows = max_rows(dst), n_head_kv = dst->src[1]->ne[2], n_embd = dst->src[1]->ne[0];
    const int64_t n_tiles = tiles_of(dst->src[3]->ne[0]), n = n_tiles*n_head_kv*rows, n_head = dst->src[0]->ne[2];
    const int64_t n_floats = n_head*(n_tiles*tile_cells + n_tiles + max_vector) + n*(tile_cells + 2) + n_head_kv*rows*n_embd
        + n_threads*std::max<int64_t>(tile_cells, rows)*n_embd;
    return n_floats*sizeof(float) + (8 + n_threads + n_head_kv)*padding;
}

void evidence_pass::prepare(int ith, int nth) {
    const float factor = ops.query_scale*(softcap > 0.0f ? scale/softcap : scale*log2e);
    float * q = (float *) keys;
    for (int64_t h = ith; h < n_head_kv; h += nth) {
        for (int r = 0; r < rows; ++r) {
            const float * from = (const float *) ((const char *) queries->data
                    + (h*group + r % group)*queries->nb[1] + query[r/group]*queries->nb[2]);
            for (int i = 0; i < n_embd; ++i) {
                q[r*n_embd + i] = factor*from[i];
            }
        }
        ops.pack(q, rows, n_embd, packed + h*query_bytes);
    }
}

// rows: cells number `at` and following of the tile
void evidence_pass::add_keys(int64_t tile, int64_t h, const row_set & rows, int at) const {
    ops.stage(rows, n_embd, keys);
    ops.dot(packed + h*query_bytes, rows_padded, n_embd, keys, rows.n, powers_of(tile, h) + at*rows_padded);
}

// place: where in the tile's part of the list each of its n cells stands, ascending
void evidence_pass::finish_tile(int64_t tile, int64_t h, const uint8_t * place, int n) const {
    const int64_t begin = tile*tile_cells;
    float * x = powers_of(tile, h);
    for (int i = 0; i < n*rows_padded && softcap > 0.0f; ++i) {
        x[i] = log2e*softcap*tanhf(x[i]);
    }
    if (all_see >= std::min(begin + tile_cells, n_list)) {
        ops.powers(x, n, rows_padded, nullptr, nullptr, max_of(tile, h), sum_of(tile, h));
        return;
    }
    float visible[rows_limit]; // of each row, counted from the tile's begin
    for (int r = 0; r < rows_padded; ++r) {
        visible[r] = r < rows ? (float) std::clamp<int64_t>(plan[2 + query[r/group]] - begin, 0, tile_cells) : 0.0f;
    }
    ops.powers(x, n, rows_padded, place, visible, max_of(tile, h), sum_of(tile, h));
}

void evidence_pass::finish_head(int64_t h) const {
    float share[rows_limit] = {};
    std::fill(share, share + rows, this->share());
    ops.weights(max_of(0, h), sum_of(0, h), (int) n_tiles, n_head_kv*rows_padded, rows_padded, share);
}

void evidence_pass::finish_own(int64_t head, float max, float sum, exp_fn exp) const {
    float * weight = own_max + head*tiles_padded;
    std::fill(weight + n_tiles, weight + tiles_padded, -INFINITY);
    if (max == -INFINITY) {
        std::fill(weight, weight + n_tiles, 0.0f);
        return;
    }
    exp(weight, (int) tiles_padded, max);
    for (int64_t i = 0; i < n_tiles; ++i) {
        weight[i] *= share()/sum;
    }
}

void evidence_pass::write_tile(int64_t tile) const {
    const int64_t begin = tile*tile_cells, end = std::min(begin + tile_cells, n_list);
    int n = 0;
    for (int64_t j = begin; j < end; ++j) {
        n += (uint64_t) cells[j] < (uint64_t) k->ne[1]; // negative cells are huge
    }
    const bool any = begin < j1 && end > j0;
    const bool all = begin >= j0 && end <= j1 && n == tile_cells;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        float * out = result + h*n_list;
        float evidence[tile_cells] = {};
        if (any && has_rows()) {
            ops.weigh(powers_of(tile, h), n, rows_padded, max_of(tile, h), evidence);
        }
        for (int64_t g = h*group; g < (h + 1)*group && any; ++g) {
            const float   weight = own_max[g*tiles_padded + tile];
            const float * x = own_of(tile) + g*tile_cells;
            for (int i = 0; i < n; ++i) {
                evidence[i] += weight*x[i];
            }
        }
        if (all) {
            std::copy(evidence, evidence + tile_cells, out + begin);
            continue;
        }
        for (int64_t j = begin, i = 0; j < end; ++j) {
            const bool is_cell = (uint64_t) cells[j] < (uint64_t) k->ne[1];
            out[j] = any && is_cell && j >= j0 && j < j1 ? evidence[i] : 0.0f;
            i += is_cell;
        }
    }
}

} // namespace sfi
