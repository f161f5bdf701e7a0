// SUPPORT_STABILITY on the CPU. Threads share out the KV heads.

#include "sfi-ops.h"

#include "arena.h"
#include "candidates.h"
#include "ggml-cpu-impl.h"

#include <cstring>

namespace {

using sfi::candidates;

// A set of cells in work memory, by hashing: at least half of its slots are free.
class cell_set {
public:
    static int64_t n_slots(int64_t n) {
        int64_t slots = 16;
        while (slots < 2*n) {
            slots *= 2;
        }
        return slots;
    }
    cell_set(int32_t * slots, int64_t n) : slots(slots), mask((uint32_t) (n_slots(n) - 1)) {}

    void fill(const int32_t * cells, int64_t n) {
        std::fill(slots, slots + mask + 1, -1);
        for (int64_t i = 0; i < n; ++i) {
            if (cells[i] >= 0) {
                slots[slot_of(cells[i])] = cells[i];
            }
        }
    }
    bool has(int32_t cell) const { return cell >= 0 && slots[slot_of(cell)] == cell; }

private:
    int32_t  * slots;
    uint32_t   mask;

    // where the cell is, or would be
    uint32_t slot_of(int32_t cell) const {
        uint32_t i = (uint32_t) cell*2654435761u >> 7 & mask;
        while (slots[i] >= 0 && slots[i] != cell) {
            i = (i + 1) & mask;
        }
        return i;
    }
};

// of one thread
struct own_rows {
    int32_t * slots;

    own_rows(const ggml_tensor * dst, sfi::arena & from) { from.take(slots, cell_set::n_slots(dst->src[3]->ne[0])); }
};

// whether the candidates are a run of cells: then a cell's place needs no search
bool is_run(const candidates & c) {
    for (int64_t i = 0; i < c.n(); ++i) {
        if (c.cells[c.j0 + i] != c.cells[c.j0] + i || c.cells[c.j0] < 0) {
            return false;
        }
    }
    return true;
}

double sum_of(const float * x, int64_t n) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += x[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += x[i];
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// evidence of the candidates e that are in a set, which is also given as a list
double evidence_on(const candidates & c, bool run, const float * e, const int32_t * list, int64_t n, const cell_set & set) {
    double sum = 0.0;
    for (int64_t i = 0; i < n && run; ++i) {
        const int64_t at = c.n() > 0 ? (int64_t) list[i] - c.cells[c.j0] : -1;
        sum += list[i] >= 0 && at >= 0 && at < c.n() ? e[at] : 0.0f;
    }
    for (int64_t i = 0; i < c.n() && !run; ++i) {
        sum += set.has(c.cells[c.j0 + i]) ? e[i] : 0.0f;
    }
    return sum;
}

// of a list, and a list that is given as a set of n_b cells
float jaccard(const int32_t * a, int64_t n_a, const cell_set & b, int64_t n_b) {
    int64_t n = n_b, common = 0;
    for (int64_t i = 0; i < n_a; ++i) {
        common += b.has(a[i]);
        n += a[i] >= 0;
    }
    return n > common ? (float) common/(n - common) : 1.0f;
}

} // namespace

void sfi::stability(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * selected = dst->src[3], * previous = dst->src[4];
    const candidates c(dst->src[1], dst->src[2]);
    const bool    run = is_run(c);
    const int64_t n   = selected->ne[0];
    arena mine = arena(params->wdata).behind(params->ith*size_of<own_rows>(dst));
    cell_set set(own_rows(dst, mine).slots, n);

    for (int64_t h = params->ith; h < dst->ne[1]; h += params->nth) {
        const float   * e = (const float   *) ((const char *) evidence->data + h*evidence->nb[1]) + c.j0;
        const int32_t * s = (const int32_t *) ((const char *) selected->data + h*selected->nb[1]);
        const int32_t * p = (const int32_t *) ((const char *) previous->data + h*previous->nb[1]);
        float * out = (float *) ((char *) dst->data + h*dst->nb[1]);

        out[0] = (float) sum_of(e, c.n());
        set.fill(p, n);
        out[2] = (float) evidence_on(c, run, e, p, n, set);
        out[3] = jaccard(s, n, set, n - std::count_if(p, p + n, [](int32_t cell) { return cell < 0; }));
        if (!run) {
            set.fill(s, n);
        }
        out[1] = (float) evidence_on(c, run, e, s, n, set);
    }
}

size_t sfi::stability_work_size(const ggml_tensor * dst, int n_threads) {
    return n_threads*size_of<own_rows>(dst) + arena::line;
}

bool sfi::stability_supported(const ggml_tensor *) {
    return true;
}
