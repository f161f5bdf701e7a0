#include "policy.h"

#include "llama-model.h"

float llama_support_core::softcap() const {
    return model.hparams.attn_soft_cap ? model.hparams.f_attn_logit_softcapping : 0.0f;
}

int64_t llama_support_core::row_bytes(int32_t il, bool keys_only) const {
    return ggml_row_size(kv.type_k(), model.hparams.n_embd_k_gqa(il)) + (keys_only ? 0 : ggml_row_size(kv.type_v(), model.hparams.n_embd_v_gqa(il)));
}

int64_t llama_support_core::cell_bytes(bool keys_only) const {
    int64_t size = 0;
    for (int32_t il = 0; il < (int32_t) layers.size(); ++il) {
        size += layers[il].why.empty() ? row_bytes(il, keys_only) : 0;
    }
    return size;
}

ggml_tensor * llama_layer_graph::done(ggml_tensor * cur, const char * name) const {
    g.cb(cur, name, il);
    cur = ggml_reshape_2d(g.ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

ggml_tensor * llama_attend_densely(const llama_layer_graph & a) {
    const auto & part = a.in.part;
    if (!a.layer.on_host() && (part.kind == LLAMA_SUPPORT_PREFILL || part.kind == LLAMA_SUPPORT_SHORT)) {
        return nullptr;
    }
    if (part.kind == LLAMA_SUPPORT_PREFILL && !part.listed) {
        return nullptr;
    }
    ggml_tensor * cur = ggml_sparse_attn(a.g.ctx0, a.q_rows(), a.k, a.v, a.in.cells, nullptr, nullptr, a.sinks, a.kq_scale, a.softcap);
    if (a.in.visible) {
        ggml_sparse_attn_set_visible(cur, a.in.visible);
    }
    if (part.blocks) {
        ggml_sparse_attn_set_blocks(cur);
    }
    if (part.least > 0.0f) {
        ggml_sparse_attn_skip_tiles(cur, part.least);
    }
    return a.done(cur, "sparse_attn");
}

ggml_tensor * llama_kept_queries(const llama_layer_graph & a) {
    ggml_tensor * ring = llama_stream_of(a.g.ctx0, a.layer.queries, a.in.part.stream);
    return ggml_reshape_3d(a.g.ctx0, ring, a.q->ne[0], a.q->ne[1], ring->ne[1]);
}

ggml_tensor * llama_all_cells(ggml_context * ctx, ggml_tensor * cache, int64_t n_embd, int64_t n_head_kv, uint32_t stream) {
    ggml_tensor * all = ggml_view_3d(ctx, cache, n_embd, n_head_kv, cache->ne[1], ggml_row_size(cache->type, n_embd), cache->nb[1], stream*cache->nb[2]);
    return ggml_permute(ctx, all, 0, 2, 1, 3);
}

ggml_tensor * llama_stream_of(ggml_context * ctx, ggml_tensor * t, uint32_t stream) {
    return ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], stream*t->nb[2]);
}

ggml_tensor * llama_heads_of(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n_head_kv, uint32_t stream) {
    return dim == 2
        ? ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n_head_kv, t->nb[1], t->nb[2], stream*n_head_kv*t->nb[2])
        : ggml_view_2d(ctx, t, t->ne[0], n_head_kv, t->nb[1], stream*n_head_kv*t->nb[1]);
}

ggml_tensor * llama_new_input(ggml_context * ctx, ggml_type type, std::array<int64_t, 4> ne, const char * name) {
    ggml_tensor * t = ggml_new_tensor(ctx, type, 4, ne.data());
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

void llama_set_list(ggml_tensor * dst, std::vector<int32_t> list) {
    GGML_ASSERT((int64_t) list.size() <= dst->ne[0]);
    list.resize(dst->ne[0], -1);
    ggml_backend_tensor_set(dst, list.data(), 0, ggml_nbytes(dst));
}

int64_t llama_list_size(const llama_support_core & core, uint32_t stream) {
    constexpr int64_t pad = 1024;
    return std::min<int64_t>(GGML_PAD((int64_t) core.streams[stream].mirror.size(), pad), core.kv.get_size());
}

std::vector<int32_t> llama_read_cells(const ggml_tensor * t, uint32_t stream, int32_t head_kv) {
    std::vector<int32_t> list(t->ne[0]);
    ggml_backend_tensor_get(t, list.data(), stream*t->nb[2] + head_kv*t->nb[1], t->nb[1]);
    list.erase(std::remove_if(list.begin(), list.end(), [](int32_t cell) { return cell < 0; }), list.end());
    return list;
}
