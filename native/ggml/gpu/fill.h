// The nodes of our operations as the hosts of CUDA and of Metal look at them: arguments of kernels, and what both lack.

#pragma once

#include "gpu/args.h"
#include "sfi-params.h"
#include "sketch.h"

#include <algorithm>
#include <cstdint>

namespace sfi_gpu {

inline int64_t n_chunks(int64_t n, int64_t size) { return (n + size - 1)/size; }

inline int64_t length(const ggml_tensor * list) { return list ? list->ne[0] : 0; }

// rows can be read by the kernels' loads of eight values
inline bool has_aligned_rows(const ggml_tensor * t) {
    const size_t n = t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0 ? 2 : 16;
    return t->nb[1] % n == 0 && t->nb[2] % n == 0 && t->nb[3] % n == 0 && t->view_offs % n == 0;
}

inline bool is_kv_type(ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

// K or V whose rows kernels load
inline bool is_kv(const ggml_tensor * t) {
    return is_kv_type(t->type) && t->ne[0] % 16 == 0 && t->ne[0] % ggml_blck_size(t->type) == 0 && has_aligned_rows(t) && t->ne[2] <= 65535;
}

// ---- sparse_attn -------------------------------------------------------------------------------------------------------

// src[7] is one of two
inline const ggml_tensor * visible_of(const ggml_tensor * dst) { return dst->src[7] && dst->src[7]->type == GGML_TYPE_I32 ? dst->src[7] : nullptr; }
inline const ggml_tensor * mass_of   (const ggml_tensor * dst) { return dst->src[7] && dst->src[7]->type == GGML_TYPE_F32 ? dst->src[7] : nullptr; }

inline bool attn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    const int64_t d = k->ne[0];
    return !ggml_sparse_attn_in_blocks(dst) && k->type == v->type && d == v->ne[0] && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256)
        && is_kv(k) && is_kv(v) && has_aligned_rows(q) && q->ne[1]*q->ne[3] <= 65535;
}

inline void fill_lists(attn_args & a, const ggml_tensor * dst) {
    if (const ggml_tensor * always = dst->src[3]) {
        a.always_t = always->ne[1] == 1 ? 0 : always->nb[1]/sizeof(int32_t);
        a.always_s = always->nb[3]/sizeof(int32_t);
    }
    if (const ggml_tensor * selected = dst->src[4]) {
        a.selected_h = selected->nb[1]/sizeof(int32_t);
        a.selected_t = selected->ne[2] == 1 ? 0 : selected->nb[2]/sizeof(int32_t);
        a.selected_s = selected->nb[3]/sizeof(int32_t);
    }
    if (const ggml_tensor * tail = dst->src[5]) {
        a.tail_h = tail->nb[1]/sizeof(float);
        a.tail_t = tail->nb[2]/sizeof(float);
        a.tail_s = tail->nb[3]/sizeof(float);
    }
    if (const ggml_tensor * visible = visible_of(dst)) {
        a.visible_s = visible->nb[1]/sizeof(int32_t);
    }
    a.n_always     = (int) length(dst->src[3]);
    a.n_selected   = (int) length(dst->src[4]);
    a.has_tail     = dst->src[5] != nullptr;
    a.has_sinks    = dst->src[6] != nullptr;
    a.has_visible  = visible_of(dst) != nullptr;
    a.has_mass     = mass_of(dst) != nullptr;
    a.has_evidence = ggml_sparse_attn_has_evidence(dst);
}

inline attn_args attn_args_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2];
    const auto params = sfi::params_of<sfi_attn_params>(dst);
    attn_args a = {};
    a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2]; a.q_nb3 = q->nb[3];
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2]; a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2]; a.v_nb3 = v->nb[3];
    a.n_cells   = (int) k->ne[1];
    a.n_tokens  = (int) q->ne[1];
    a.n_head    = (int) q->ne[2];
    a.n_head_kv = (int) k->ne[2];
    a.head_size = (int) k->ne[0];
    a.group     = a.n_head/a.n_head_kv;
    a.scale     = params.scale;
    a.softcap   = params.softcap;
    fill_lists(a, dst);
    return a;
}

// ---- evidence, select, stability -----------------------------------------------------------------------------------------

constexpr int evidence_max_rows      = 512; // of a KV head: each a query of a head of its group
constexpr int evidence_max_head_size = 256;

inline int64_t evidence_rows(const ggml_tensor * dst) {
    return dst->src[0]->ne[1]/dst->src[1]->ne[2]*dst->src[0]->ne[2];
}

inline bool evidence_supported_by_both(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    return is_kv(k) && k->ne[0] <= evidence_max_head_size && has_aligned_rows(q) && evidence_rows(dst) <= evidence_max_rows;
}

inline evidence_args evidence_args_of(const ggml_tensor * dst, int chunk_cells) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1];
    const auto params = sfi::params_of<sfi_evidence_params>(dst);
    evidence_args a = {};
    a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2];
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.d         = (int) k->ne[0];
    a.n_cells   = (int) k->ne[1];
    a.group     = (int) (q->ne[1]/k->ne[2]);
    a.n_queries = (int) q->ne[2];
    a.n_rows    = (int) evidence_rows(dst);
    a.n_list    = (int) dst->ne[0];
    a.n_chunks  = (int) n_chunks(a.n_list, chunk_cells);
    a.scale     = params.scale;
    a.softcap   = params.softcap;
    a.alpha     = params.alpha;
    a.candidates_only = params.over == GGML_SUPPORT_SOFTMAX_CANDIDATES;
    return a;
}

// the paper's selector is for the CPU
inline bool select_supported_by_both(const ggml_tensor * dst) {
    return sfi::params_of<sfi_select_params>(dst).selector.kind == GGML_SUPPORT_SELECTOR_TOPK && dst->ne[1] <= 65535;
}

inline select_args select_args_of(const ggml_tensor * dst) {
    const auto selector = sfi::params_of<sfi_select_params>(dst).selector;
    select_args a = {};
    a.evidence_ld = dst->src[0]->nb[1]/sizeof(float);
    a.selected_ld = dst->nb[1]/sizeof(int32_t);
    a.n_list      = (int) dst->src[0]->ne[0];
    a.n_selected  = (int) dst->ne[0];
    a.behind      = selector.pool_after;
    a.ahead       = selector.pool_before;
    return a;
}

inline stability_args stability_args_of(const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    stability_args a = {};
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.previous_ld = previous->nb[1]/sizeof(int32_t);
    a.n_list      = (int) evidence->ne[0];
    a.n_selected  = (int) selected->ne[0];
    a.n_previous  = (int) previous->ne[0];
    return a;
}

// ---- the sketch ------------------------------------------------------------------------------------------------------------

inline bool encode_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[2], * v = dst->src[3];
    return k->type == v->type && is_kv(k) && is_kv(v) && k->ne[0] <= encode_head_size && v->ne[0] <= encode_head_size;
}

inline encode_args encode_args_of(const ggml_tensor * dst) {
    const ggml_tensor * codes = dst->src[0], * basis = dst->src[1], * k = dst->src[2], * v = dst->src[3], * cells = dst->src[4];
    encode_args a = {};
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2];
    a.head_bytes = codes->nb[2];
    a.d_k        = (int) k->ne[0];
    a.d_v        = (int) v->ne[0];
    a.n_listed   = (int) cells->ne[0];
    a.n_cells    = (int) k->ne[1];
    a.n_blocks   = (int) codes->ne[1];
    a.basis_size = (int) basis->ne[0];
    a.format     = sfi::format_of(dst);
    return a;
}

inline int64_t scan_list(const ggml_tensor * dst) { return sfi::params_of<sfi_scan_params>(dst).n_list; }

// chunk: cells of one
inline bool scan_supported(const ggml_tensor * dst, int chunk) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1];
    const ggml_sketch_format f = sfi::format_of(dst);
    return q->ne[1]/codes->ne[2] <= max_group && sketch_n_k(f) <= 4*max_k_fields && sketch_n_v(f) <= 16*max_v_groups
        && n_chunks(scan_list(dst), chunk) <= max_chunks && q->ne[0] % 16 == 0 && has_aligned_rows(q) && codes->ne[2] <= 65535;
}

inline scan_args scan_args_of(const ggml_tensor * dst, int chunk) {
    const ggml_tensor * q = dst->src[0], * codes = dst->src[1], * basis = dst->src[2], * skip = dst->src[3], * selected = dst->src[6];
    const sfi::sketch_layout layout(dst);
    const auto params = sfi::params_of<sfi_scan_params>(dst);
    scan_args a = {};
    a.q_nb1       = q->nb[1];
    a.head_bytes  = codes->nb[2];
    a.records_at  = sketch_record_at(layout.format, codes->ne[1], 0);
    a.selected_ld = selected->nb[1]/sizeof(int32_t);
    a.d_k         = (int) q->ne[0];
    a.d_v         = (int) dst->ne[0] - 1;
    a.n_k         = layout.n_k;
    a.n_v         = layout.n_v;
    a.n_skip      = (int) skip->ne[0];
    a.n_list      = params.n_list;
    a.n_selected  = (int) selected->ne[0];
    a.n_head      = (int) q->ne[1];
    a.group       = (int) (q->ne[1]/codes->ne[2]);
    a.chunk       = chunk;
    a.n_chunks    = (int) n_chunks(a.n_list, chunk);
    a.basis_size  = (int) basis->ne[0];
    a.block_bytes  = (int) layout.block_bytes();
    a.record_bytes = layout.record_bytes;
    a.k_planes     = layout.k_planes;
    a.first_planes = layout.first_planes;
    a.n_k_fields   = layout.n_k_fields;
    a.n_first_fields = layout.k_first[layout.first_planes];
    a.has_least   = dst->src[5] != nullptr;
    a.scale       = params.scale;
    a.softcap     = params.softcap;
    a.second_look = params.second_look;
    a.format      = layout.format;
    for (int i = 0; i < a.n_k_fields; ++i) {
        a.k[i] = { (uint8_t) layout.k[i].plane, (uint8_t) layout.k[i].shift, (uint8_t) sketch_bits_k(layout.format, 4*i) };
    }
    return a;
}

} // namespace sfi_gpu
