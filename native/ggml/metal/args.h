// What the host tells the kernels of this folder: one text for both, so that they cannot disagree.

#ifndef SFI_METAL_ARGS_H // no pragma: to the kernels it comes as a part of their text
#define SFI_METAL_ARGS_H

#ifdef __METAL_VERSION__
#pragma clang diagnostic ignored "-Weverything" // ggml-metal takes a warning for an error when it compiles a text
#include <metal_stdlib>
#define SFI_CONSTANT static constant constexpr const
#else
#include <cstdint>
#define SFI_CONSTANT static constexpr
#endif

namespace sfi_metal {

SFI_CONSTANT int simd_size = 32;

// ---- GGML_OP_SPARSE_ATTN ---------------------------------------------------------------------------------------------

SFI_CONSTANT int attn_simds   = 4;
SFI_CONSTANT int attn_threads = attn_simds*simd_size;
SFI_CONSTANT int attn_flight  = 2;  // rows under way in a lane: more would not fit its registers
SFI_CONSTANT int max_splits   = 64;

struct attn_args {
    int64_t q_nb1, q_nb2, q_nb3, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3;                                        // bytes
    int64_t always_t, always_s, selected_h, selected_t, selected_s, tail_h, tail_t, tail_s, visible_s; // elements
    int32_t n_cells, n_always, n_selected, n_tokens, n_head, head_size, group, n_group_parts, n_split;
    int32_t has_visible, has_tail, has_sinks, has_mass, has_evidence;
    float   scale, softcap;
};

struct own_evidence_args {
    int32_t n_list, group;
};

// ---- GGML_OP_SUPPORT_EVIDENCE ------------------------------------------------------------------------------------------

SFI_CONSTANT int evidence_simds   = 4;
SFI_CONSTANT int evidence_threads = evidence_simds*simd_size;
SFI_CONSTANT int tile_cells       = 16;
SFI_CONSTANT int chunk_tiles      = 16;
SFI_CONSTANT int chunk_cells      = chunk_tiles*tile_cells;
SFI_CONSTANT int max_rows         = 512; // of a KV head
SFI_CONSTANT int rows_at_once     = 4;   // of half a simdgroup
SFI_CONSTANT int lse_threads      = 64;

struct evidence_args {
    int64_t q_nb1, q_nb2, k_nb1, k_nb2;
    int32_t d, group, n_queries, n_rows, n_list, n_chunks, n_cells, candidates_only;
    float   scale, softcap, alpha;
};

// ---- GGML_OP_SUPPORT_SELECT and GGML_OP_SUPPORT_STABILITY ----------------------------------------------------------------

SFI_CONSTANT int list_threads   = 256; // where a thread has a cell of a list
SFI_CONSTANT int select_threads = 512;
SFI_CONSTANT int select_simds   = select_threads/simd_size;

struct select_args {
    int64_t evidence_ld, out_ld; // elements
    int32_t n_list, n_selected, behind, ahead;
};

SFI_CONSTANT int set_slots = 7168; // of a hash set in threadgroup memory
SFI_CONSTANT int set_cells = 4096; // that it takes at a time

struct stability_args {
    int64_t evidence_ld, selected_ld, previous_ld; // elements
    int32_t n_list, n_selected, n_previous;
};

// ---- GGML_OP_SKETCH_ENCODE -----------------------------------------------------------------------------------------------

SFI_CONSTANT int encode_threads   = 128;
SFI_CONSTANT int encode_cells     = 16;  // of a threadgroup
SFI_CONSTANT int encode_head_size = 256; // at most

struct encode_args {
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, head_bytes, records_at;
    int32_t d_k, d_v, n_k, n_v, n_k4, n_k2, n_v4, n_listed, n_cells, basis_size, k_planes, first_planes, block_bytes, record_bytes;
};

// ---- GGML_OP_SKETCH_SCAN -------------------------------------------------------------------------------------------------

SFI_CONSTANT int scan_threads = 256; // as many as a chunk has cells at once
SFI_CONSTANT int scan_simds   = scan_threads/simd_size;
SFI_CONSTANT int best_threads = 512;
SFI_CONSTANT int max_group    = 8;
SFI_CONSTANT int max_k_fields = 64;
SFI_CONSTANT int max_v_groups = 8;
SFI_CONSTANT int max_chunks   = 2048;
SFI_CONSTANT int max_chunk    = 1024;

struct scan_field {
    uint8_t plane, shift, bits;
};

struct scan_args {
    int64_t q_nb1, head_bytes, records_at, selected_ld;
    int32_t d_k, d_v, n_k, n_v, n_skip, n_list, n_selected, group, n_chunks, chunk, basis_size, block_bytes, record_bytes;
    int32_t k_planes, first_planes, n_k_fields, n_first_fields, n_v_groups, mean_cells, has_least;
    float   scale, softcap, second_look;
    scan_field k[max_k_fields];
    scan_field v[max_v_groups][4];
};

// Of a head that looks twice. Weights of cells that were looked at again are relative to exp(top), those of all others to
// exp(top_first).
struct head_sums {
    float top_first, others, top, weight, lse;
};

} // namespace sfi_metal

#endif
