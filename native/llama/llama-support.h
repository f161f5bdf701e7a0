// The support of each sequence: where it lives, when it is valid, and its part of the compute graph.
//
// A llama_kv_cache owns at most one llama_support (sfi_attach() gives it one) and tells it about every edit of its
// cells; whatever was not announced by sfi_step() or sfi_prefill() makes the support of that stream invalid.
// One sequence per stream: supports are kept per stream.

#pragma once

#include "llama-kv-cache.h"
#include "ggml-sfi.h"
#include "ggml-cpp.h"
#include "kv-mirror.h"
#include "side-graph.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_context;
struct llama_model;
struct llama_support_input;
struct llama_portable_input;

// What the next ubatch does with its attention.
enum llama_support_kind {
    LLAMA_SUPPORT_NONE,    // upstream's own path
    LLAMA_SUPPORT_PREFILL, // upstream's own path; the last queries are kept, the last ubatch refreshes
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

// What is known of a sequence before a step.
struct llama_support_facts {
    int32_t depth;       // its cells
    int32_t span;        // fast steps since the refresh
    bool    valid;       // a fast step is possible
    bool    edited;      // there was a support, and an edit made it invalid
    bool    window_full; // frozen: the window cannot grow by another cell, and a slow step must move it
};

// What a step attended to and read.
struct llama_support_report {
    int32_t n_cells   = 0;    // cells per KV head of a sparse layer, in the mean
    float   tail_mass = 0.0f; // sketch: attention mass that it stood in for, mean over all heads
    int64_t kv_read   = 0;    // bytes of K and V, and of what the policy reads in their place
};

// What run() returns if llama_decode() did well and something of ours failed afterwards, or before.
constexpr int LLAMA_SUPPORT_FAILED = INT32_MIN;

class llama_support {
public:
    // kv_swa: the cache of the layers with a sliding window, null if there is none; throws std::bad_alloc if the buffers cannot be had
    llama_support(llama_kv_cache * kv, const llama_kv_cache * kv_swa, const llama_model & model, const llama_support_params & params);

    // ---- validity --------------------------------------------------------------------------------------------

    void invalidate(uint32_t stream);

    // Makes streams invalid that hold another number of cells than they did after our last step. The cache tells of the
    // edits that change no number, llama_support_edited().
    void notice_edits();

    // a ubatch has got its cells and is about to be computed
    void on_ubatch(const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo);

    // ---- steps, called by sfi.cpp ------------------------------------------------------------------------------

    llama_support_facts facts(uint32_t stream) const;

    // Calls decode, whose n_tokens tokens of this stream are ours, and returns what it does: 0 if it went well. With refresh the last
    // ubatch chooses the support. Whatever is computed afterwards is not ours, also if decode throws: then the support is invalid.
    int run(llama_context & lctx, uint32_t stream, llama_support_kind kind, int32_t n_tokens, bool refresh, const std::function<int()> & decode);

    // Of what run() computed last for this stream.
    llama_support_report report(uint32_t stream, llama_support_kind kind, bool refresh) const;

    // Bytes of K and V that dense steps read for the last n of `depth` tokens.
    int64_t dense_bytes(int64_t depth, int64_t n) const;

    // The last n cells of a stream were taken out of the cache. What does not list them stays valid; the queries of the
    // removed tokens are gone, and the older ones that they had replaced.
    void roll_back(uint32_t stream, int32_t n);

    // Called between the layers of a fit, if it is set, with those done and all; false stops the fit, as if computing had failed.
    std::function<bool(int32_t done, int32_t total)> on_fit;

    // ---- the graph ---------------------------------------------------------------------------------------------

    // what a graph depends on; two ubatches with equal keys can share one
    struct key {
        llama_support_kind kind = LLAMA_SUPPORT_NONE;
        bool     refresh  = false;
        uint32_t stream   = 0;
        int64_t  n_list   = 0; // length of the list of all cells
        int64_t  n_stored = 0; // queries written to the ring
        int64_t  n_skip   = 0; // sketch: length of the list of cells that the scan leaves out
        int64_t  n_scan   = 0; // sketch: cells that are scanned

        bool operator==(const key & o) const {
            return kind == o.kind && refresh == o.refresh && stream == o.stream && n_list == o.n_list
                && n_stored == o.n_stored && n_skip == o.n_skip && n_scan == o.n_scan;
        }
    };
    key graph_key() const;
    int64_t portable_append() const; // always rows that the ubatch writes to compact caches
    void    remember_scale(int32_t il, float kq_scale) { layers[il].kq_scale = kq_scale; }

    int64_t always_size() const { // the longest list of always cells
        return std::min<int64_t>(kv->get_size(), (int64_t) params.n_sink + params.n_recent + params.n_grow);
    }

    // ---- inspection --------------------------------------------------------------------------------------------

    const llama_support_params & get_params() const { return params; }
    const llama_support_layer  & layer(int32_t il) const { return layers[il]; }
    bool                 is_sparse(int32_t il)     const { return layers[il].why.empty(); }
    bool                 has_portable() const {
        return std::any_of(layers.begin(), layers.end(), [](const auto & layer) { return layer.path == LLAMA_PATH_PORTABLE; });
    }
    // the path that a layer would take with other parameters
    llama_support_path   path_of(const llama_model & model, int32_t il, const llama_support_params & params, std::string * lacks = nullptr) const;
    int64_t              most_cells(const llama_model & model, int32_t il) const; // ... or with fewer cells, 0: with none
    bool                 has_path_with_f16(const llama_model & model, int32_t il) const; // ... or with another type of K and V
    size_t               memory()                  const; // bytes of the buffers
    bool                 scanned(uint32_t stream)  const { return streams[stream].j1 > streams[stream].j0 && params.policy == LLAMA_SUPPORT_SKETCH; }
    float                tail_mass(uint32_t stream, int32_t il, int32_t head) const; // sketch, where it has scanned
    int64_t              n_refresh(uint32_t stream) const { return streams[stream].n_refresh; }
    llama_kv_cache     * get_kv()                  const { return kv; }
    const std::vector<llama_support_layer> & get_layers() const { return layers; }

    // Of one KV head, from the device: the selected cells, and what ggml_support_stability() says of the last refresh.
    std::vector<int32_t> read_selected (uint32_t stream, int32_t il, int32_t head_kv) const;
    std::array<float, 4> read_stability(uint32_t stream, int32_t il, int32_t head_kv) const;

private:
    friend struct llama_support_input;
    friend struct llama_portable_input;
    friend struct llama_portable_refresh;

    struct stream_state {
        explicit stream_state(int32_t n_queries) : mirror(n_queries) {}

        llama_kv_mirror mirror;
        int32_t  n_huge    = 0;         // cells that huge pages hold
        bool     valid     = false;
        bool     edited    = false;
        int32_t  j0 = 0, j1 = 0;        // the candidates of the refresh were those at places [j0, j1); sketch: those with codes
        int32_t  span      = 0;
        int64_t  n_refresh = 0;
        int32_t  n_fit     = 0;         // sketch: the basis was fitted to so many candidates; 0: there is none
        int32_t  n_fit_queries = 0;     // and to so many queries
        int32_t  n_chosen = 0, n_previous = 0; // portable: cells selected by the last refresh and the one before ...
        int64_t  n_scanned = 0;                // ... and cells of its evidence
    };

    llama_kv_cache       * kv;
    const llama_kv_cache * kv_swa;
    const llama_model    & model;
    llama_support_params   params;
    std::vector<llama_support_layer> layers;
    std::vector<stream_state>        streams;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
    size_t planned = 0; // bytes that the buffers would have, of a model that allocates nothing

    // the announced work, and the ubatch of it that is being computed
    llama_support_kind kind    = LLAMA_SUPPORT_NONE;
    uint32_t           stream  = 0;
    int32_t            n_left  = 0;
    bool               refresh = false;
    llama_support_kind ubatch_kind    = LLAMA_SUPPORT_NONE;
    bool               ubatch_refresh = false;
    int32_t            ubatch_tokens  = 0;
    int32_t            ubatch_stored  = 0; // of their queries
    llama_side_graph   side;

    void    finish(bool ok);
    void    allocate(const llama_model & model);
    void    allocate_sketch(ggml_context * ctx, const llama_model & model, int32_t il);
    void    allocate_results(ggml_context * ctx, const llama_model & model, const std::vector<int32_t> & ils);
    void    place(stream_state & st, const llama_ubatch & ubatch, const std::vector<uint32_t> & idxs);
    void    use_huge_pages(uint32_t stream);
    // the portable path, after a refresh: chooses the support, by the evidence of a slow step or of a batch; false: computing failed
    bool    refresh_portable(llama_context & lctx, uint32_t stream, bool slow);
    // Policy sketch, between steps: fits the basis if it is missing or of too little, writes the codes of cells that have left
    // the window or will with the next cell. False: computing failed, and the support is invalid.
    bool    update_sketch(llama_context & lctx, uint32_t stream);
    bool    window_full(const stream_state & st) const;
    std::pair<int32_t, int32_t> window(const stream_state & st) const; // always is what is not at places [first, second)
    int64_t cell_bytes (bool keys_only) const;          // report.cpp, see there
    int64_t other_bytes(int64_t depth, int64_t n) const;
    int64_t sketch_bytes(uint32_t stream) const;
    void    report_sketch(uint32_t stream, llama_support_report & out) const;
    struct layer_rows { std::vector<float> k, v, q; }; // that a basis is fitted to, [n, n_embd] of all heads
    std::vector<std::vector<float>> device_rows(llama_context & lctx, uint32_t stream, const std::vector<std::pair<ggml_tensor *, const std::vector<int32_t> *>> & wanted);
    bool    fit(llama_context & lctx, uint32_t stream);
    bool    fit_rows(llama_context & lctx, uint32_t stream, int32_t il, const std::vector<int32_t> & cells, const std::vector<int32_t> & queries, layer_rows & out);
    struct layer_fit { std::vector<float> basis, logit_error, need; };
    static layer_fit fit_layer(const llama_support_layer & layer, const layer_rows & rows);
    void    spread_tolerance(uint32_t stream, const std::vector<std::vector<float>> & need);
    bool    encode(llama_context & lctx, uint32_t stream, int32_t from, int32_t to);
    ggml_tensor * encode_layer(ggml_context * ctx, uint32_t stream, int32_t il, ggml_tensor * cells);
    int64_t list_size() const;
    int64_t scan_size(const stream_state & st) const; // portable: cells that evidence is made of
    bool    overwritten(int32_t n) const;             // portable: rows that a sliding window needs again without the last n cells
    std::vector<int32_t> read_portable(uint32_t stream, int32_t il, int32_t head_kv) const;
    std::array<float, 4> portable_stability(uint32_t stream, int32_t il, int32_t head_kv) const;

    // the candidates of a refresh at n cells, as a range of `stream_state::cells`
    std::pair<int32_t, int32_t> candidates(int32_t n) const {
        const int32_t j0 = std::min(params.n_sink, n);
        return { j0, std::max(j0, n - params.n_recent) };
    }
};

// The cells of a stream were edited; -1: of all streams. Called by the KV cache where their number tells nothing.
void llama_support_edited(llama_support * support, int64_t stream);

// A ubatch has got its cells and is about to be computed. Called by the KV cache.
void llama_support_placed(llama_support * support, const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo);

// The graph input that carries lists and plan; each graph over a cache with a support has one, and if the ubatch is not ours it
// is empty.
struct llama_support_input : public llm_graph_input_i {
    explicit llama_support_input(const std::shared_ptr<llama_support> & support);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    std::weak_ptr<llama_support> owner; // a graph lives longer than it is used, and must not keep the memory of a support
    llama_support              * support; // while the owner lives
    const llama_support::key     built;
    llama_portable_input         * portable = nullptr; // of the same graph

    ggml_tensor * always = nullptr; // I32 [always_size]    fast
    ggml_tensor * cells  = nullptr; // I32 [n_list]         dense, short, slow, verify, refreshing prefill, oracle
    ggml_tensor * visible = nullptr; // I32 [n_tokens]      verify: how many of `cells` each token sees
    ggml_tensor * plan   = nullptr; // I32 [2 + n_queries]  with a refresh; oracle [3]
    ggml_tensor * skip   = nullptr; // I32 [n_skip]         sketch
    ggml_tensor * scan   = nullptr; // I32 [1]              sketch: the plan of the scan
    ggml_tensor * rows   = nullptr; // I64 [n_stored]       rows of the ring that this ubatch writes
};

// All cells of the stream that `view` (one of get_k() / get_v()) shows, as [n_embd_head, n_cells, n_head_kv].
ggml_tensor * llama_support_all_cells(ggml_context * ctx, const ggml_tensor * view);

// The part of one stream in a tensor whose dimension dim (1 or 2) holds the KV heads of all streams.
ggml_tensor * llama_support_heads(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n_head_kv, uint32_t stream);

// Attention of one layer. Null: the layer or the ubatch takes upstream's own path.
//   q [n_embd_head_k, n_head, n_tokens], k and v as llama_kv_cache::get_k() and get_v() return them
ggml_tensor * llama_support_build_attn(const llm_graph_context & g,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);
