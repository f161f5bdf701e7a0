// The support of each sequence: where it lives, when it is valid, and its part of the compute graph.
//
// A llama_kv_cache owns at most one llama_support (sfi_attach() gives it one) and tells it about every edit of its
// cells; whatever was not announced by sfi_step() or sfi_prefill() makes the support of that stream invalid.
// One sequence per stream: supports are kept per stream.

#pragma once

#include "llama-kv-cache.h"
#include "ggml-sfi.h"
#include "ggml-cpp.h"
#include "huge-pages.h"
#include "llama-portable.h"
#include "policy.h"

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

    // What fast steps need of a stream whose cell i holds token i, support-state.cpp. Bytes of it, 0: there is nothing to keep.
    size_t state_size(uint32_t stream) const;
    void   get_state (uint32_t stream, char * bytes);

    // Takes the first n tokens of such a state, whose cells the cache holds already; n_whole: all that it is of. Returns why not, and
    // then changes nothing.
    std::string set_state(uint32_t stream, const char * bytes, size_t size, int32_t n, int32_t & n_whole);

    // Called between the layers of a fit, if it is set, with those done and all; false stops the fit, as if computing had failed.
    std::function<bool(int32_t done, int32_t total)> on_fit;

    // ---- the graph ---------------------------------------------------------------------------------------------

    llama_support_key graph_key() const;
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

    llama_kv_cache       * kv;
    const llama_kv_cache * kv_swa;
    const llama_model    & model;
    llama_support_params   params;
    std::vector<llama_support_layer> layers;
    std::vector<llama_sequence>        streams;
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
    bool               has_blocks     = false; // some layer is prefilled by our kernel
    int32_t            ubatch_stored  = 0; // of their queries
    llama_side_graph   side;

    void    finish(bool ok);
    void    allocate(const llama_model & model);
    void    allocate_sketch(ggml_context * ctx, const llama_model & model, int32_t il);
    void    allocate_results(ggml_context * ctx, const llama_model & model, const std::vector<int32_t> & ils);
    void    place(llama_sequence & st, const llama_ubatch & ubatch, const std::vector<uint32_t> & idxs);
    void    use_huge_pages(uint32_t stream);
    // the portable path, after a refresh: chooses the support, by the evidence of a slow step or of a batch; false: computing failed
    bool    refresh_portable(llama_context & lctx, uint32_t stream, bool slow);
    // Policy sketch, between steps: fits the basis if it is missing or of too little, writes the codes of cells that have left
    // the window or will with the next cell. False: computing failed, and the support is invalid.
    bool    update_sketch(llama_context & lctx, uint32_t stream);
    bool    window_full(const llama_sequence & st) const;
    // Whether the support stays one if `left` tokens are left, and what it then is. It may list none of the others; a sketch loses their
    // codes with them, and its basis is good as long as half of the cells are there that it was fitted to.
    bool    cut_support(llama_sequence & st, int32_t left) const;
    size_t  state_size_of(int32_t n_coded) const;
    std::pair<int32_t, int32_t> window(const llama_sequence & st) const; // always is what is not at places [first, second)
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
};

// The cache's V of all streams, [n_embd_v_gqa, n_cells, n_stream].
ggml_tensor * llama_support_v_storage(const llama_kv_cache & kv, int32_t il);

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
    const llama_support_key      built;
    std::unique_ptr<llama_portable_input> portable; // null if no layer is portable

    ggml_tensor * always = nullptr; // I32 [always_size]    fast
    ggml_tensor * cells  = nullptr; // I32 [n_list]         dense, short, slow, verify, refreshing prefill, oracle
    ggml_tensor * visible = nullptr; // I32 [n_tokens]      verify: how many of `cells` each token sees
    ggml_tensor * plan   = nullptr; // I32 [2 + n_queries]  with a refresh; oracle [3]
    ggml_tensor * skip   = nullptr; // I32 [n_skip]         sketch
    ggml_tensor * scan   = nullptr; // I32 [1]              sketch: the plan of the scan
    ggml_tensor * rows   = nullptr; // I64 [n_stored]       rows of the ring that this ubatch writes
};

// Attention of one layer. Null: the layer or the ubatch takes upstream's own path.
//   q [n_embd_head_k, n_head, n_tokens], k and v as llama_kv_cache::get_k() and get_v() return them
ggml_tensor * llama_support_build_attn(const llm_graph_context & g,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);

// A product of weights w with activations x: ggml_mul_mat(), or in prefill on a CPU ours.
ggml_tensor * llama_support_build_mul_mat(const llm_graph_context & g, ggml_tensor * w, ggml_tensor * x);
