#include "tile-choice.h"

#include <algorithm>
#include <cmath>

namespace sfi {

constexpr int n_rounds = 8; // of the iteration; the first eigenvectors are known well before

static int64_t padded(int64_t n) {
    return GGML_PAD(n, max_panel);
}

key_copy::key_copy(int64_t n_embd, int64_t n_tiles, arena & from) {
    from.take(usable, 1);
    from.take(encode, choice_rank*n_embd);
    from.take(decode, max_panel*n_embd);
    from.take(codes, n_tiles*choice_rank*choice_tile);
    from.take(unknown, n_tiles);
}

fit_room::fit_room(int64_t n_embd, arena & from) {
    from.take(rows, choice_rows*n_embd);
    from.take(keys, n_embd*padded(n_embd));
    from.take(queries, n_embd*padded(n_embd));
    from.take(z, choice_rank*n_embd);
    from.take(y, choice_rank*n_embd);
    from.take(packed_k, max_panel*n_embd);
    from.take(packed_v, max_panel*padded(n_embd));
    from.take(ones, n_embd);
    from.take(scratch, max_vector*n_embd);
}

choice_room::choice_room(int64_t n_rows, int64_t n_tiles, arena & from) {
    from.take(w, n_rows*max_panel);
    from.take(x, n_rows*choice_tile);
    from.take(max, n_rows);
    from.take(sum, n_rows);
    from.take(mass, n_rows*n_tiles);
    from.take(wanted, n_tiles);
}

// ---- the fit -------------------------------------------------------------------------------------------------------

static void subtract_mean(float * rows, int n, int n_embd) {
    for (int i = 0; i < n_embd; ++i) {
        double mean = 0.0;
        for (int r = 0; r < n; ++r) {
            mean += rows[(int64_t) r*n_embd + i];
        }
        for (int r = 0; r < n; ++r) {
            rows[(int64_t) r*n_embd + i] -= (float) (mean/n);
        }
    }
}

// A panel of rows x at a time: the sum of x x' is a product of rows packed as K, whose values lie together, with those packed as V.
void moments(const block_ops & f32, const fit_room & room, int n, int n_embd, bool about_mean, float * out) {
    if (about_mean) {
        subtract_mean(room.rows, n, n_embd);
    }
    std::fill(room.ones, room.ones + n_embd, 1.0f);
    std::fill(out, out + n_embd*padded(n_embd), 0.0f);
    const char * start[max_panel];
    for (int r = 0; r < n; r += f32.panel) {
        const int m = std::min(f32.panel, n - r);
        for (int i = 0; i < m; ++i) {
            start[i] = (const char *) (room.rows + (int64_t) (r + i)*n_embd);
        }
        const row_set rows = { start, 0, m, nullptr, 0, 0, 0 };
        f32.pack_k(n_embd, rows, room.packed_k, room.scratch);
        f32.pack_v(n_embd, rows, room.packed_v);
        f32.mad(room.packed_k, f32.panel, n_embd, m, room.packed_v, m, n_embd, room.ones, out, padded(n_embd));
    }
}

static double dot(const float * a, const float * b, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
        sum += (double) a[i]*b[i];
    }
    return sum;
}

static void add_to(float * to, const float * x, float factor, int n) {
    for (int i = 0; i < n; ++i) {
        to[i] += factor*x[i];
    }
}

// out_r = M x_r of each r, M symmetric
static void multiply(const float * matrix, const float * x, int n, float * out) {
    std::fill(out, out + choice_rank*n, 0.0f);
    for (int r = 0; r < choice_rank; ++r) {
        for (int i = 0; i < n; ++i) {
            add_to(out + r*n, matrix + i*padded(n), x[r*n + i], n);
        }
    }
}

// Makes the rows of z orthonormal under K, where y = K z follows. What is nothing beside what it was is 0.
static void orthonormalise(float * z, float * y, int n) {
    for (int r = 0; r < choice_rank; ++r) {
        const double before = dot(z + r*n, y + r*n, n);
        for (int twice = 0; twice < 2; ++twice) { // what rounding left
            for (int i = 0; i < r; ++i) {
                const float along = (float) dot(y + i*n, z + r*n, n);
                add_to(z + r*n, z + i*n, -along, n);
                add_to(y + r*n, y + i*n, -along, n);
            }
        }
        const double length = dot(z + r*n, y + r*n, n);
        const float  factor = length > 1e-11*before && length > 1e-30 ? (float) (1.0/std::sqrt(length)) : 0.0f;
        for (int i = 0; i < n; ++i) {
            z[r*n + i] *= factor;
            y[r*n + i] *= factor;
        }
    }
}

static bool all_finite(const float * x, int64_t n) {
    float sum = 0.0f; // of zeros
    for (int64_t i = 0; i < n; ++i) {
        sum += 0.0f*x[i];
    }
    return sum == 0.0f;
}

void fit_copy(const block_ops & f32, const fit_room & room, int n_embd, const key_copy & copy) {
    *copy.usable = all_finite(room.keys, n_embd*padded(n_embd)) && all_finite(room.queries, n_embd*padded(n_embd));
    if (!*copy.usable) {
        return;
    }
    uint32_t random = 1; // where the iteration begins does not matter, if it is nowhere in particular
    for (int i = 0; i < choice_rank*n_embd; ++i) {
        random = 1664525*random + 1013904223;
        room.z[i] = (float) (random >> 8)/(1 << 24) - 0.5f;
    }
    for (int i = 0; ; ++i) {
        multiply(room.keys, room.z, n_embd, room.y);
        orthonormalise(room.z, room.y, n_embd);
        if (i == n_rounds) {
            break;
        }
        multiply(room.queries, room.y, n_embd, room.z);
    }
    *copy.usable = all_finite(room.z, choice_rank*n_embd) && all_finite(room.y, choice_rank*n_embd);
    std::copy(room.z, room.z + choice_rank*n_embd, copy.encode);
    const char * start[choice_rank];
    for (int r = 0; r < choice_rank; ++r) {
        start[r] = (const char *) (room.y + r*n_embd);
    }
    f32.pack_k(n_embd, { start, 0, choice_rank, nullptr, 0, 0, 0 }, copy.decode, room.scratch);
}

void encode_tile(const block_ops & ops, const float * packed_k, int n_embd, const key_copy & copy, int64_t tile) {
    float * codes = copy.codes_of(tile);
    for (int c = 0; c < choice_tile; c += ops.panel) {
        ops.dot(copy.encode, choice_rank, n_embd, packed_k + c*n_embd, ops.panel, codes + c*choice_rank, ops.panel);
    }
    copy.unknown[tile] = !all_finite(codes, choice_rank*choice_tile);
}

// ---- the choice ----------------------------------------------------------------------------------------------------

// w = Y'q of each row
static void project(const block_ops & ops, const key_copy & copy, const float * q, int n_rows, int n_embd, float * w) {
    ops.dot(q, n_rows, n_embd, copy.decode, choice_rank, w, max_panel);
    for (int r = 0; r < n_rows; ++r) {
        std::copy(w + r*max_panel, w + r*max_panel + choice_rank, w + r*choice_rank);
    }
}

// Sum of the weights of a tile that rows see in part or as a whole, with a running maximum.
static void look_closely(const block_ops & ops, const key_copy & copy, const int64_t * seen, int n_rows, int64_t tile, const choice_room & room) {
    ops.dot(room.w, n_rows, choice_rank, copy.codes_of(tile), choice_tile, room.x, choice_tile);
    for (int r = 0; r < n_rows; ++r) {
        float * x = room.x + r*choice_tile;
        const int64_t n = std::clamp<int64_t>(seen[r] - tile*choice_tile, 0, choice_tile);
        std::fill(x + n, x + choice_tile, -INFINITY);
        if (n > 0) {
            ops.weigh(x, choice_tile, room.max + r, room.sum + r);
        }
    }
}

void choose_tiles(const block_ops & ops, const key_copy & copy, const float * q, const int64_t * seen, int n_rows, int n_embd, int64_t n_tiles,
                  float least, const choice_room & room) {
    const int64_t first = *std::min_element(seen, seen + n_rows);
    const int64_t local = std::clamp<int64_t>((first - choice_local)/choice_tile, 1, n_tiles);
    std::fill(room.wanted, room.wanted + n_tiles, *copy.usable ? 0 : 1);
    if (!*copy.usable) {
        return;
    }
    project(ops, copy, q, n_rows, n_embd, room.w);
    std::fill(room.max, room.max + n_rows, -INFINITY);
    std::fill(room.sum, room.sum + n_rows, 0.0f);
    for (int64_t i = 0; i < n_tiles; i = i == 0 ? local : i + 1) {
        room.wanted[i] = 1;
        look_closely(ops, copy, seen, n_rows, i, room);
    }
    for (int64_t i = 1; i < local; ++i) {
        room.wanted[i] = copy.unknown[i];
        ops.mass(room.w, n_rows, choice_rank, copy.codes_of(i), choice_tile, room.max, room.mass + i, n_tiles);
    }
    for (int r = 0; r < n_rows; ++r) {
        const float * mass = room.mass + r*n_tiles;
        float all = room.sum[r];
        for (int64_t i = 1; i < local; ++i) {
            all += mass[i];
        }
        for (int64_t i = 1; i < local; ++i) {
            room.wanted[i] |= mass[i] >= least*all; // nothing, if it is not a number: then the result is none either
        }
    }
}

} // namespace sfi
