// Sizes that the host and the kernels of Metal agree on, beside gpu/args.h.

#ifndef SFI_METAL_KERNELS_H // no pragma: to the kernels it comes as a part of their text
#define SFI_METAL_KERNELS_H

#include "gpu/args.h"

namespace sfi_metal {

SFI_CONSTANT int simd_size = 32;

SFI_CONSTANT int attn_simds   = 4;
SFI_CONSTANT int attn_threads = attn_simds*simd_size;
SFI_CONSTANT int attn_flight  = 2;  // rows under way in a lane: more would not fit its registers
SFI_CONSTANT int max_splits   = 64;

struct own_evidence_args {
    int32_t n_list, group;
};

SFI_CONSTANT int evidence_simds   = 4;
SFI_CONSTANT int evidence_threads = evidence_simds*simd_size;
SFI_CONSTANT int tile_cells       = 16;
SFI_CONSTANT int chunk_tiles      = 16;
SFI_CONSTANT int chunk_cells      = chunk_tiles*tile_cells;
SFI_CONSTANT int max_rows         = 512; // of a KV head
SFI_CONSTANT int rows_at_once     = 4;   // of half a simdgroup
SFI_CONSTANT int lse_threads      = 64;

SFI_CONSTANT int list_threads   = 256; // where a thread has a cell of a list
SFI_CONSTANT int select_threads = 512;
SFI_CONSTANT int select_simds   = select_threads/simd_size;

SFI_CONSTANT int set_slots = 7168; // of a hash set in threadgroup memory
SFI_CONSTANT int set_cells = 4096; // that it takes at a time

SFI_CONSTANT int encode_threads = 128;

SFI_CONSTANT int scan_threads = 256; // as many as a chunk has cells at once
SFI_CONSTANT int scan_simds   = scan_threads/simd_size;
SFI_CONSTANT int best_threads = 512;
SFI_CONSTANT int best_simds   = best_threads/simd_size;
SFI_CONSTANT int max_chunk    = 1024;

} // namespace sfi_metal

#endif
