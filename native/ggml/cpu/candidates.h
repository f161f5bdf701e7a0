// The candidates of a list of cells: what selection and stability look at.

#pragma once

#include "ggml.h"

#include <algorithm>
#include <cstdint>

namespace sfi {

struct candidates {
    int64_t n_list, j0, j1;
    const int32_t * cells;

    candidates(const ggml_tensor * cells_t, const ggml_tensor * plan_t) : n_list(cells_t->ne[0]) {
        const int32_t * plan = (const int32_t *) plan_t->data;
        cells = (const int32_t *) cells_t->data;
        j0 = std::clamp<int64_t>(plan[0], 0, n_list);
        j1 = std::clamp<int64_t>(plan[1], j0, n_list);
    }
    int64_t n() const { return j1 - j0; }
    bool    is_cell(int64_t i) const { return cells[j0 + i] >= 0; }
};

} // namespace sfi
