// Which tiles of cells some queries need: ggml_sparse_attn_skip_tiles().
//
// The keys of a KV head have a copy of few values, c = Z'k for a key k. With w = Y'q for a query q, q.k is w.c, but for what is the same
// for all cells and for what so few values cannot tell. Z and Y are those that tell most, in the mean of squares, for the keys and
// queries at hand: Z spans the first eigenvectors of Q K (the second moments of the queries, and of the keys about their mean), it is
// orthonormal under K, and Y = K Z.
//
// Every query looks at every cell that it sees: needles are found by the one query that looks for them.

#pragma once

#include "arena.h"
#include "attn-block.h"

namespace sfi {

constexpr int     choice_tile  = 64;   // cells
constexpr int     choice_rank  = 16;   // values of a key
constexpr int     choice_rows  = 1024; // keys, and queries, that a fit looks at
constexpr int64_t choice_local = 128;  // cells before the first query that it always has

// Of one KV head.
struct key_copy {
    bool  * usable;  // false: something is not a number, and nothing can be told
    float * encode;  // Z, [choice_rank, n_embd]
    float * decode;  // Y, packed as K
    float * codes;   // [n_tiles, choice_rank*choice_tile], each packed as K
    bool  * unknown; // [n_tiles]: of tiles that have what is not a number

    key_copy(int64_t n_embd, int64_t n_tiles, arena & from);
    float * codes_of(int64_t tile) const { return codes + tile*choice_rank*choice_tile; }
};

// The memory of a fit.
struct fit_room {
    float * rows;                        // [choice_rows, n_embd]
    float * keys, * queries;             // second moments, [n_embd, padded n_embd]
    float * z, * y;                      // [choice_rank, n_embd]
    float * packed_k, * packed_v, * ones, * scratch;

    fit_room(int64_t n_embd, arena & from);
};

// f32: of F32 rows. Second moments of the n rows in room.rows, about their mean or about zero, which go to room.keys or room.queries.
void moments (const block_ops & f32, const fit_room & room, int n, int n_embd, bool about_mean, float * out);

// Z and Y from the moments of keys and queries.
void fit_copy(const block_ops & f32, const fit_room & room, int n_embd, const key_copy & copy);

// Writes the codes of a tile of keys, which are packed: packed_k [choice_tile, n_embd].
void encode_tile(const block_ops & ops, const float * packed_k, int n_embd, const key_copy & copy, int64_t tile);

// The memory of a choice for up to n_rows queries over n_tiles tiles.
struct choice_room {
    float * w;           // [n_rows, choice_rank]
    float * x;           // [n_rows, choice_tile]
    float * max, * sum;  // [n_rows]
    float * mass;        // [n_rows, n_tiles]
    uint8_t * wanted;    // [n_tiles]

    choice_room(int64_t n_rows, int64_t n_tiles, arena & from);
};

// Sets wanted[i] of each of the n_tiles tiles that rows of q [n_rows, n_embd] see, scaled so that logits are of base 2. Row r sees the
// first seen[r] cells.
void choose_tiles(const block_ops & ops, const key_copy & copy, const float * q, const int64_t * seen, int n_rows, int n_embd, int64_t n_tiles,
                  float least, const choice_room & room);

} // namespace sfi
