// What a host tells the kernels of an operation, as plain numbers: one text for CUDA, for Metal and for both hosts.

#ifndef SFI_GPU_ARGS_H // no pragma: to Metal's kernels it comes as a part of their text
#define SFI_GPU_ARGS_H

#include "sketch-layout.h"

#ifdef __METAL_VERSION__
#define SFI_CONSTANT static constant constexpr const
#else
#define SFI_CONSTANT static constexpr
#endif

namespace sfi_gpu {

// strides are in bytes if they are called nb, else in elements

struct attn_args {
    int64_t q_nb1, q_nb2, q_nb3, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3;
    int64_t always_t, always_s, selected_h, selected_t, selected_s, tail_h, tail_t, tail_s, visible_s;
    int32_t n_cells, n_always, n_selected, n_tokens, n_head, n_head_kv, head_size, group;
    int32_t n_group_parts, n_split, per_split; // as the backend shares them out
    int32_t has_visible, has_tail, has_sinks, has_mass, has_evidence;
    float   scale, softcap;
};

struct evidence_args {
    int64_t q_nb1, q_nb2, k_nb1, k_nb2;
    int32_t d, group, n_queries, n_rows, n_list, n_chunks, n_cells, candidates_only;
    float   scale, softcap, alpha;
};

struct select_args {
    int64_t evidence_ld, selected_ld;
    int32_t n_list, n_selected, behind, ahead;
};

struct stability_args {
    int64_t evidence_ld, selected_ld, previous_ld;
    int32_t n_list, n_selected, n_previous;
};

SFI_CONSTANT int encode_cells     = 16;  // of a block of threads
SFI_CONSTANT int encode_head_size = 256; // at most

struct encode_args {
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, head_bytes;
    int32_t d_k, d_v, n_listed, n_cells, n_blocks, basis_size;
    ggml_sketch_format format;
};

SFI_CONSTANT int max_group    = 8;
SFI_CONSTANT int max_k_fields = 64;
SFI_CONSTANT int max_v_groups = 8;
SFI_CONSTANT int max_chunks   = 2048;
SFI_CONSTANT int mean_cells   = 8192; // a second look needs a share that is measured by the mean share of so many at most
SFI_CONSTANT float least_unseen     = 1.0f/(1 << 19); // below: nothing but rounding errors
SFI_CONSTANT float least_tail_share = 1.0f/(1 << 20); // of a tail that counts

// four components of K: some bits of every byte of a plane
struct scan_field {
    uint8_t plane, shift, bits;
};

struct scan_args {
    int64_t q_nb1, head_bytes, records_at, selected_ld;
    int32_t d_k, d_v, n_k, n_v, n_skip, n_list, n_selected, n_head, group, n_chunks, chunk, basis_size, block_bytes, record_bytes;
    int32_t k_planes, first_planes, n_k_fields, n_first_fields, has_least;
    float   scale, softcap, second_look;
    ggml_sketch_format format;
    scan_field k[max_k_fields];
};

// Of a head. Weights of cells that were looked at again are relative to exp(top), those of all others to exp(top_first).
struct head_sums {
    float top_first, others, top, weight, lse;
};

} // namespace sfi_gpu

#endif
