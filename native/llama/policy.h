// A policy says what fast steps attend to. This is what a support asks it, and what the two share.
//
//     support    the cells that a KV head attends to on a fast step: always and selected
//     always     the first n_sink cells of the text and the latest ones, its *window*: the same for all heads
//     selected   those that a policy chooses, for each layer and KV head
//     evidence   the attention that cells get from some queries; a *refresh* chooses by it what stays selected
//     sketch     a copy of K and V in few bits; a *look* at it chooses what is selected, and it stands for the *tail*: all others
//
// The support follows the cache and knows when fast steps are possible; a policy owns the tensors that they need beside K and V, and
// makes its part of the graph. Who adds a policy writes a class, and makes it in llama_support's constructor.

#pragma once

#include "kv-mirror.h"
#include "side-graph.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include "ggml-sfi.h"

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <utility>
#include <vector>

// Tokens of one sequence that a fast step can take at once.
constexpr int32_t llama_support_max_tokens = 16;

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
    LLAMA_PATH_PORTABLE, // ggml's own, portable.h
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
    float                 prefill_least = 0.0f; // sparse prefill: see ggml_sparse_attn_skip_tiles(); 0: exact

    bool selects()   const { return policy != LLAMA_SUPPORT_WINDOW && n_selected > 0; }
    bool refreshes() const { return policy == LLAMA_SUPPORT_FROZEN && n_selected > 0; } // a refresh takes evidence

    // the candidates of a refresh at n cells, as places in the text
    std::pair<int32_t, int32_t> candidates(int32_t n) const {
        const int32_t j0 = std::min(n_sink, n);
        return { j0, std::max(j0, n - n_recent) };
    }
};

class llama_policy;

// A layer, as its policy finds it.
struct llama_support_layer {
    std::string        why;            // why the layer stays dense; empty if it is sparse
    llama_support_path path = LLAMA_PATH_NONE;
    std::string        lacks;          // path none: what the device lacks, by name
    llama_policy     * policy = nullptr; // null: it stays dense
    int64_t       n_head = 0, n_head_kv = 0, n_embd_k = 0, n_embd_v = 0; // heads, and values of one
    float         kq_scale = 0.0f;     // of the logits, as the graph has it: some models scale Q before
    ggml_tensor * k = nullptr;         // the cache's, [n_embd_gqa, n_cells, n_stream]
    ggml_tensor * v = nullptr;
    ggml_tensor * queries = nullptr;   // F32 [n_embd_k*n_head, n_queries, n_stream], a ring; null: none are kept

    bool on_host() const { return ggml_backend_buffer_is_host(k->buffer); }
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
};

// What the support and its policies share.
struct llama_support_core {
    llama_kv_cache     & kv;
    const llama_model  & model;
    llama_support_params params;
    std::vector<llama_support_layer> layers;
    std::vector<llama_sequence>      streams;
    llama_side_graph                 side;
    std::function<bool(int32_t done, int32_t total)> on_fit; // called between the layers of a fit, if it is set; false stops it

    int64_t always_size() const { // the longest list of always cells
        return std::min<int64_t>(kv.get_size(), (int64_t) params.n_sink + params.n_recent + params.n_grow);
    }
    float   softcap() const;                              // of the logits, 0: none
    int64_t row_bytes(int32_t il, bool keys_only) const;  // of one cell in a layer
    int64_t cell_bytes(bool keys_only) const;             // in all layers that fast steps make sparse
};

// What is done for a run of tokens of one sequence in a ubatch, as far as a graph depends on it.
struct llama_support_part {
    llama_support_kind kind = LLAMA_SUPPORT_NONE;
    bool     refresh  = false; // with evidence
    bool     listed   = false; // prefill by our kernel
    bool     blocks   = false; // ... which packs K and V for all tokens
    float    least    = 0.0f;  // ... and passes over tiles that have less of the attention, see ggml_sparse_attn_skip_tiles()
    uint32_t stream   = 0;
    int64_t  first    = 0;     // its tokens in the ubatch
    int64_t  n_tokens = 0;
    int64_t  index    = 0;     // fast: which of the sequence's tokens in the ubatch it is, and how many come after,
    int64_t  n_behind = 0;     // whose cells it does not see
    int64_t  n_list   = 0;     // length of the list of all cells
    int64_t  n_stored = 0;     // queries written to the ring
    int64_t  n_skip   = 0;     // sketch: length of the list of cells that the scan leaves out
    int64_t  n_scan   = 0;     // sketch: cells that are scanned
    int64_t  n_append = 0;     // portable: rows of compact caches that are written

    bool operator==(const llama_support_part & o) const {
        return kind == o.kind && refresh == o.refresh && listed == o.listed && blocks == o.blocks && least == o.least && stream == o.stream && first == o.first
            && n_tokens == o.n_tokens && index == o.index && n_behind == o.n_behind
            && n_list == o.n_list && n_stored == o.n_stored && n_skip == o.n_skip && n_scan == o.n_scan && n_append == o.n_append;
    }
};

// What a graph depends on; two ubatches with equal keys can share one. Empty: the ubatch takes upstream's own path.
using llama_support_key = std::vector<llama_support_part>;

// The inputs of a part; null: its graph does not need it.
struct llama_part_input {
    llama_support_part part;
    ggml_tensor * always  = nullptr; // I32 [always_size]    fast
    ggml_tensor * cells   = nullptr; // I32 [n_list]         dense, short, slow, verify, refreshing prefill, oracle
    ggml_tensor * visible = nullptr; // I32 [n_tokens]       verify, prefill: how many of `cells` each token sees
    ggml_tensor * plan    = nullptr; // I32 [2 + n_queries]  with a refresh; oracle [3]
    ggml_tensor * rows    = nullptr; // I64 [n_stored]       rows of the ring that this ubatch writes
    ggml_tensor * skip    = nullptr; // I32 [n_skip]         sketch
    ggml_tensor * scan    = nullptr; // I32 [1]              sketch: the plan of the scan
    // portable; lists of cells are repeated for each of n_head_kv KV heads, the most that a layer has
    ggml_tensor * append  = nullptr; // I32 [n_append, n_head_kv]  whose rows are written ...
    ggml_tensor * slots   = nullptr; // I64 [n_append]             ... here
    ggml_tensor * in_use  = nullptr; // F16 [n_compact, 1]         fast: 0, or -INFINITY for rows that are not
};

// Attention of one layer for the tokens of one part.
struct llama_layer_graph {
    const llm_graph_context  & g;
    const llama_part_input   & in;
    const llama_support_layer & layer;
    int32_t       il;
    ggml_tensor * q;     // [n_embd_k, n_head, n_tokens]
    ggml_tensor * k;     // all cells of the stream, [n_embd, n_cells, n_head_kv]
    ggml_tensor * v;
    ggml_tensor * sinks; // learned ones, or null
    float         kq_scale, softcap;

    ggml_tensor * q_rows() const { return ggml_permute(g.ctx0, q, 0, 2, 1, 3); } // [n_embd_k, n_tokens, n_head]

    // The result of an operation [n_embd_v, n_head, n_tokens] as upstream has it, placed in the graph.
    ggml_tensor * done(ggml_tensor * attention, const char * name) const;
};

// What a step attended to and read.
struct llama_support_report {
    int32_t n_cells   = 0;    // cells per KV head of a sparse layer, in the mean
    float   tail_mass = 0.0f; // sketch: attention mass that it stood in for, mean over all heads
    int64_t kv_read   = 0;    // bytes of K and V, and of what the policy reads in their place
};

class llama_state_cursor; // support-state.h

class llama_policy {
public:
    explicit llama_policy(llama_support_core & core) : core(core) {}
    virtual ~llama_policy() = default;

    // ---- memory

    // The tensors that it needs for these layers of one device, in a context whose memory is had afterwards and begins with bytes `blank`.
    virtual void    allocate(ggml_context * ctx, const std::vector<int32_t> & ils) = 0;
    virtual uint8_t blank() const { return 0xff; } // lists of cells: of pads

    // ---- a sequence

    // Always is what is not at places [first, second) of the text.
    virtual std::pair<int32_t, int32_t> window(const llama_sequence & st) const = 0;

    // Tokens that fast steps can still take before a slow step must move the window.
    virtual int32_t window_room(const llama_sequence & st) const { (void) st; return INT32_MAX; }

    // Makes it the support of the first `left` tokens; false: it cannot be one.
    virtual bool cut(llama_sequence & st, int32_t left) const = 0;

    // Before fast steps of n tokens, with the support valid: what they need and lack. False: computing failed.
    virtual bool prepare(llama_context & lctx, uint32_t stream, int32_t n) { (void) lctx; (void) stream; (void) n; return true; }

    // After a refreshing ubatch, of one token if `slow`. False: computing failed.
    virtual bool refresh(llama_context & lctx, uint32_t stream, bool slow) = 0;

    // ---- the graph

    virtual void key(llama_support_part & part) const { (void) part; }
    virtual void new_inputs(ggml_context * ctx, llama_part_input & in) const { (void) ctx; (void) in; }
    virtual void set_inputs(const llama_part_input & in) const { (void) in; }

    // [n_embd_v*n_head, n_tokens], in the graph; null: the part takes upstream's own path.
    virtual ggml_tensor * attend(const llama_layer_graph & a) const = 0;

    // ---- what a step did

    // Adds to what always has what the last fast step attended to and read beside, for token i of n.
    virtual void report(uint32_t stream, int32_t i, int32_t n, llama_support_report & out) const { (void) stream; (void) i; (void) n; (void) out; }

    // Whether such a step reads all keys once more, for its evidence.
    virtual bool reads_keys(llama_support_kind kind, bool refresh) const { (void) kind; (void) refresh; return false; }

    // ---- inspection, from the device

    virtual bool                 has_selected() const { return false; }
    virtual std::vector<int32_t> selected (uint32_t stream, int32_t il, int32_t head_kv) const { (void) stream; (void) il; (void) head_kv; return {}; }
    virtual std::array<float, 4> stability(uint32_t stream, int32_t il, int32_t head_kv) const { (void) stream; (void) il; (void) head_kv; return {}; }

    // {mass, expected error of a logit} of a query head; false: no fast step has left a tail
    virtual bool tail(uint32_t stream, int32_t il, int32_t head, std::array<float, 2> & out) const { (void) stream; (void) il; (void) head; (void) out; return false; }

    // ---- the state of a sequence, see support-state.h

    virtual bool keeps_state() const { return false; }
    virtual void state(llama_state_cursor & c, uint32_t stream, int32_t il, int32_t n_coded, int32_t n_kept) { (void) c; (void) stream; (void) il; (void) n_coded; (void) n_kept; }
    virtual bool is_sound(const char * bytes, int32_t il, int32_t n_coded) const { (void) bytes; (void) il; (void) n_coded; return false; }

protected:
    llama_support_core & core;
};

// ---- for policies, policy.cpp ------------------------------------------------------------------------------------------

// Every cell of the list, by our kernel; null where upstream's own path is taken.
ggml_tensor * llama_attend_densely(const llama_layer_graph & a);

// The queries that are kept, as [n_embd_k, n_head, n_queries].
ggml_tensor * llama_kept_queries(const llama_layer_graph & a);

// All cells of one stream in a cache, as [n_embd, n_cells, n_head_kv].
ggml_tensor * llama_all_cells(ggml_context * ctx, ggml_tensor * cache, int64_t n_embd, int64_t n_head_kv, uint32_t stream);

// A stream of a tensor [ne0, ne1, n_stream].
ggml_tensor * llama_stream_of(ggml_context * ctx, ggml_tensor * t, uint32_t stream);

// The part of one stream in a tensor whose dimension dim (1 or 2) holds the KV heads of all streams.
ggml_tensor * llama_heads_of(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n_head_kv, uint32_t stream);

ggml_tensor * llama_new_input(ggml_context * ctx, ggml_type type, std::array<int64_t, 4> ne, const char * name);

// An input that the graph uses: one that no operation reads has no memory.
inline bool llama_is_used(const ggml_tensor * t) { return t && t->buffer; }

// A list of cells, with pads behind it.
void llama_set_list(ggml_tensor * dst, std::vector<int32_t> list);

// The length of the list of all cells of a stream, padded so that a graph fits many depths.
int64_t llama_list_size(const llama_support_core & core, uint32_t stream);

// The cells of a list [n, n_head_kv, n_stream] of one KV head, from the device, without pads.
std::vector<int32_t> llama_read_cells(const ggml_tensor * lists, uint32_t stream, int32_t head_kv);
