// What the parts of a support share: its parameters, its layers, a sequence, and what a graph depends on.
//
//     support    the cells that a KV head attends to on a fast step: always and selected
//     always     the first n_sink cells of the text and the latest ones, its *window*: the same for all heads
//     selected   those that a policy chooses, for each layer and KV head
//     evidence   the attention that cells get from some queries; a *refresh* chooses by it what stays selected
//     sketch     a copy of K and V in few bits; a *look* at it chooses what is selected, and it stands for the *tail*: all others

#pragma once

#include "kv-mirror.h"
#include "side-graph.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include "ggml-sfi.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

// What the next ubatch does with its attention.
enum llama_support_kind {
    LLAMA_SUPPORT_NONE,    // upstream's own path
    LLAMA_SUPPORT_PREFILL, // on a CPU our kernel for many tokens, elsewhere upstream's path; the last queries are kept, the last ubatch refreshes
    LLAMA_SUPPORT_DENSE,   // every cell, our kernel
    LLAMA_SUPPORT_SHORT,   // every cell, by what is faster: our kernel in the host's memory, elsewhere upstream's own path
    LLAMA_SUPPORT_SLOW,    // every cell, our kernel, then a refresh
    LLAMA_SUPPORT_FAST,    // the support alone
    LLAMA_SUPPORT_VERIFY,  // several tokens, each attends to every cell up to its own, our kernel; may end with a refresh
};

// How a fast step gets its support.
enum llama_support_policy {
    LLAMA_SUPPORT_FROZEN, // selected at a refresh, from evidence
    LLAMA_SUPPORT_WINDOW, // always only
    LLAMA_SUPPORT_SKETCH, // selected anew at every step, from the sketch, which also stands for all other cells
    LLAMA_SUPPORT_ORACLE, // selected anew at every step, from the exact logits: no faster than dense, for measuring
};

// Whose operations compute the support of a layer.
enum llama_support_path {
    LLAMA_PATH_NONE,     // its device lacks them
    LLAMA_PATH_NATIVE,   // ours, ggml-sfi.h
    LLAMA_PATH_PORTABLE, // ggml's own, llama-portable.h
};

struct llama_support_params {
    llama_support_policy policy = LLAMA_SUPPORT_FROZEN;
    int32_t n_sink     = 4;
    int32_t n_recent   = 256;
    int32_t n_selected = 2048;
    int32_t n_grow     = 64;   // cells by which the window may grow: frozen, max_span; sketch, cells coded at once
    int32_t n_queries  = 16;   // how many are kept
    int32_t n_evidence = 16;   // how many of them may give evidence (the last ones) at the end of a batch; a slow step's is the own
    ggml_support_selector selector = {};
    float                 tolerance = 0.0f; // sketch: attend exactly to cells whose share of the attention times the
                                            // error of their logit is larger; 0: to n_selected cells
    float                 second_look = 0.0f; // sketch: see ggml_sketch_scan()
    ggml_sketch_format    format   = {}; // all 0: by the head size of each layer

    bool selects()   const { return policy != LLAMA_SUPPORT_WINDOW && n_selected > 0; }
    bool pinned()    const { return policy == LLAMA_SUPPORT_FROZEN; } // the window's start stays where the refresh put it
    bool refreshes() const { return policy == LLAMA_SUPPORT_FROZEN && n_selected > 0; } // a refresh takes evidence

    // the candidates of a refresh at n cells, as places in the text
    std::pair<int32_t, int32_t> candidates(int32_t n) const {
        const int32_t j0 = std::min(n_sink, n);
        return { j0, std::max(j0, n - n_recent) };
    }
};

// A layer's tensors, in the memory of the backend that holds its K.
struct llama_support_layer {
    std::string   why;                 // why the layer stays dense; empty if it is sparse
    llama_support_path path = LLAMA_PATH_NONE;
    std::string   lacks;               // path none: what the device lacks, by name
    ggml_tensor * queries   = nullptr; // F32 [n_embd_head_k*n_head, n_queries, n_stream], a ring
    ggml_tensor * selected  = nullptr; // I32 [n_selected, n_head_kv, n_stream]
    ggml_tensor * stability = nullptr; // F32 [4, n_head_kv, n_stream], see ggml_support_stability()
    // policy sketch; selected, mass and counts are parts of tensors that all layers of a device share
    ggml_sketch_format format = {};
    int64_t       n_embd_k = 0, n_embd_v = 0, n_head_kv = 0; // of a head; of a stream
    float         kq_scale = 0.0f;     // of the logits, as the graph has it: some models scale Q before
    ggml_tensor * v         = nullptr; // the cache's V
    ggml_tensor * codes     = nullptr; // I8  [16*cell_bytes, n_blocks, n_head_kv*n_stream]
    ggml_tensor * basis     = nullptr; // F32 [basis_size, n_head_kv*n_stream]
    ggml_tensor * least     = nullptr; // F32 [n_head_kv, n_stream], see ggml_sketch_scan()
    ggml_tensor * mass      = nullptr; // F32 [2, n_head, n_stream], see ggml_sparse_attn_set_mass()
    ggml_tensor * counts    = nullptr; // I32 [2, n_head_kv, n_stream], see ggml_sketch_scan()
    std::vector<float> logit_error;    // [n_stream*n_head_kv]: expected error of a sketched logit, from the fit
    // path portable
    ggml_tensor * compact_k = nullptr; // [n_embd_head_k, n_compact, n_head_kv, n_stream], and the same of V
    ggml_tensor * compact_v = nullptr;
    ggml_tensor * previous  = nullptr; // I32 like selected: the set before
    ggml_tensor * evidence  = nullptr; // F32 [n_ctx, n_head_kv, n_stream], of the last refresh
};

// A sequence, between steps.
struct llama_sequence {
    explicit llama_sequence(int32_t n_queries) : mirror(n_queries) {}

    llama_kv_mirror mirror;
    int32_t n_huge    = 0;     // cells that huge pages hold
    bool    valid     = false; // a fast step is possible
    bool    edited    = false; // one was, until the cells were edited
    int32_t j0 = 0, j1 = 0;    // places of the text: frozen, the candidates of the refresh; sketch, those with codes
    int32_t span      = 0;     // fast steps since the refresh
    int64_t n_refresh = 0;
    int32_t n_fit     = 0;     // sketch: the basis was fitted to so many candidates; 0: there is none
    int32_t n_fit_queries = 0; // and to so many queries
    int32_t n_chosen = 0, n_previous = 0; // portable: cells selected by the last refresh and the one before ...
    int64_t n_scanned = 0;                // ... and cells of its evidence
};

// What a graph depends on; two ubatches with equal keys can share one.
struct llama_support_key {
    llama_support_kind kind = LLAMA_SUPPORT_NONE;
    bool     refresh  = false;
    bool     listed   = false; // prefill by our kernel
    bool     blocks   = false; // ... which packs K and V for all tokens
    uint32_t stream   = 0;
    int64_t  n_list   = 0; // length of the list of all cells
    int64_t  n_stored = 0; // queries written to the ring
    int64_t  n_skip   = 0; // sketch: length of the list of cells that the scan leaves out
    int64_t  n_scan   = 0; // sketch: cells that are scanned
    int64_t  n_append = 0; // portable: rows of compact caches that are written

    bool operator==(const llama_support_key & o) const {
        return kind == o.kind && refresh == o.refresh && listed == o.listed && blocks == o.blocks && stream == o.stream && n_list == o.n_list
            && n_stored == o.n_stored && n_skip == o.n_skip && n_scan == o.n_scan && n_append == o.n_append;
    }
};

// What the operations of a layer depend on.
struct llama_path_shape {
    int64_t   n_head, n_head_kv, n_embd_head_k, n_embd_head_v;
    ggml_type type_k, type_v;
    bool      sinks = false;   // learned ones
    bool      softcap = false; // of the logits
    int64_t   n_cells = 256;   // of a sequence
};

// All cells of the stream that `view` (one of get_k() / get_v()) shows, as [n_embd_head, n_cells, n_head_kv].
inline ggml_tensor * llama_support_all_cells(ggml_context * ctx, const ggml_tensor * view) {
    ggml_tensor * cache = view->view_src;
    ggml_tensor * all = ggml_view_3d(ctx, cache, view->ne[0], view->ne[1], cache->ne[1], view->nb[1], view->nb[2], view->view_offs);
    return ggml_permute(ctx, all, 0, 2, 1, 3);
}

// The part of one stream in a tensor whose dimension dim (1 or 2) holds the KV heads of all streams.
inline ggml_tensor * llama_support_heads(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n_head_kv, uint32_t stream) {
    return dim == 2
        ? ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n_head_kv, t->nb[1], t->nb[2], stream*n_head_kv*t->nb[2])
        : ggml_view_2d(ctx, t, t->ne[0], n_head_kv, t->nb[1], stream*n_head_kv*t->nb[1]);
}
