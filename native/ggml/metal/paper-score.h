// The score by which GGML_SUPPORT_SELECTOR_PAPER selects.

#pragma once

#include "host.h"

namespace sfi_metal {

// of the operation's scratch
struct paper_places {
    place f, r, of_f, of_r, apart;
};

bool         paper_score_supported(const ggml_tensor * dst);
paper_places take_paper           (const ggml_tensor * dst, scratch_parts & parts);
place        paper_score          (encoder & e, const ggml_tensor * dst, const paper_places & p); // [n_head_kv, n_list], of candidates only

} // namespace sfi_metal
