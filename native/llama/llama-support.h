// The support of each sequence: when it is valid, and its part of the compute graph. What it is, a policy says.
//
// A llama_kv_cache owns at most one llama_support (sfi_attach() gives it one) and tells it about every edit of its
// cells; whatever was not announced by run() makes the support of that stream invalid.
// One sequence per stream: supports are kept per stream.

#pragma once

#include "huge-pages.h"
#include "policy.h"

#include "llama-kv-cache.h"
#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

struct llama_context;
struct llama_model;
struct llama_support_input;

// What is known of a sequence before a step.
struct llama_support_facts {
    int32_t depth;       // its cells
    int32_t span;        // fast steps since the refresh
    bool    valid;       // a fast step is possible
    bool    edited;      // there was a support, and an edit made it invalid
    int32_t window_room; // tokens that fast steps can take before a slow step must move the window; sketch: at once
};

// What run() is told of the tokens of one sequence.
struct llama_support_work {
    uint32_t           stream;
    llama_support_kind kind;
    int32_t            n_tokens;
    bool               refresh; // the last ubatch chooses the support
    int32_t            n_after = 0; // tokens of the same text that will come after these, as far as it is known
};

// What run() returns if llama_decode() did well and something of ours failed afterwards, or before.
constexpr int LLAMA_SUPPORT_FAILED  = INT32_MIN;
constexpr int LLAMA_SUPPORT_STOPPED = 2; // ... by the abort callback: as llama_decode() says it

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
    bool needs_mask() const; // upstream's own path is a part of it

    // ---- steps, called by sfi.cpp ------------------------------------------------------------------------------

    llama_support_facts facts(uint32_t stream) const;

    // Calls decode, whose tokens are these, and returns what it does: 0 if it went well. Whatever is computed afterwards is not ours,
    // also if decode throws: then the supports are invalid.
    int run(llama_context & lctx, const std::vector<llama_support_work> & work, const std::function<int()> & decode);

    // Of what run() computed last for this stream.
    // Token i of a fast step of n; of another kind i and n are 0 and 1.
    llama_support_report report(uint32_t stream, llama_support_kind kind, bool refresh, int32_t i = 0, int32_t n = 1) const;

    // Bytes of K and V that dense steps read for the last n of `depth` tokens.
    int64_t dense_bytes(int64_t depth, int64_t n) const;

    // The last n cells of a stream were taken out of the cache. What does not list them stays valid; the queries of the
    // removed tokens are gone, and the older ones that they had replaced.
    void roll_back(uint32_t stream, int32_t n);

    // What fast steps need of a stream whose cell i holds token i, support-state.h. Bytes of it, 0: there is nothing to keep.
    size_t state_size(uint32_t stream);
    void   get_state (uint32_t stream, char * bytes);

    // Takes the first n tokens of such a state, whose cells the cache holds already; n_whole: all that it is of. Returns why not, and
    // then changes nothing.
    std::string set_state(uint32_t stream, const char * bytes, size_t size, int32_t n, int32_t & n_whole);

    // Called between the layers of a fit, if it is set, with those done and all; false stops the fit, as if computing had failed.
    void on_fit(std::function<bool(int32_t done, int32_t total)> watch) { core.on_fit = std::move(watch); }

    // ---- the graph ---------------------------------------------------------------------------------------------

    const llama_support_key  & graph_key() const { return current; }
    const llama_support_core & parts()     const { return core; }
    const std::vector<std::unique_ptr<llama_policy>> & get_policies() const { return policies; }
    void  remember_scale(int32_t il, float kq_scale) { core.layers[il].kq_scale = kq_scale; }

    // ---- inspection --------------------------------------------------------------------------------------------

    const llama_support_layer & layer(int32_t il) const { return core.layers[il]; }
    const std::vector<llama_support_layer> & get_layers() const { return core.layers; }
    const llama_kv_cache &      get_kv()             const { return core.kv; }
    llama_kv_cache &            get_kv()                   { return core.kv; }
    bool                        is_sparse(int32_t il) const { return core.layers[il].why.empty(); }
    bool                        has_portable() const;
    int64_t                     n_refresh(uint32_t stream) const { return core.streams[stream].n_refresh; }
    size_t                      memory() const; // bytes of the buffers

    // The path that a layer would take with other parameters ...
    llama_support_path path_of(int32_t il, const llama_support_params & params, std::string * lacks = nullptr) const;
    int64_t            most_cells(int32_t il) const;        // ... or with fewer cells, 0: with none
    bool               has_path_with_f16(int32_t il) const; // ... or with another type of K and V

private:
    struct announced : llama_support_work { int32_t n_left; };

    llama_support_core     core;
    const llama_kv_cache * kv_swa;
    std::vector<std::unique_ptr<llama_policy>> policies; // one, or two where devices differ
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
    size_t                 planned = 0; // bytes that the buffers would have, of a model that allocates nothing
    std::vector<announced> work;        // what run() was told
    llama_support_key      current;     // the ubatch of it that is being computed

    friend struct llama_support_input;
    llama_support_input  * built = nullptr; // of the graph that was built last, as long as there is that graph

    void    choose_paths();
    void    make_policies();
    void    allocate();
    void    allocate_on(ggml_backend_buffer_type_t device, llama_policy & policy, const std::vector<int32_t> & ils);
    std::set<const ggml_tensor *> of_all_streams() const;
    void    use_huge_pages(uint32_t stream);
    void    place(llama_sequence & st, const llama_ubatch & ubatch, int32_t first, int32_t n, const std::vector<uint32_t> & idxs);
    void    add_parts(const announced & work, int64_t first, int64_t n);
    llama_support_part part_of(const announced & work, int64_t first, int64_t n, int64_t index, int64_t n_behind) const;
    bool    prepare(llama_context & lctx, uint32_t stream, int32_t n);
    bool    refresh(llama_context & lctx, const llama_support_work & work);
    void    finish(bool ok);
    int     failed() const;
    bool    cut(llama_sequence & st, int32_t left) const;
    bool    keeps_state() const;
    size_t  state_size_of(int32_t n_coded);
    int64_t other_bytes(int64_t depth, int64_t n) const;
};

// The cache's V of all streams, [n_embd_v_gqa, n_cells, n_stream].
ggml_tensor * llama_support_v_storage(const llama_kv_cache & kv, int32_t il);

// The cells of a stream were edited; -1: of all streams. Called by the KV cache where their number tells nothing.
void llama_support_edited(llama_support * support, int64_t stream);

// A ubatch has got its cells and is about to be computed. Called by the KV cache; of how many cells its masks are, which is n_kv where
// they may be looked at.
uint32_t llama_support_placed(llama_support * support, const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo, uint32_t n_kv);

// Attention of one layer. Null: the layer or the ubatch takes upstream's own path.
//   q [n_embd_head_k, n_head, n_tokens], k and v as llama_kv_cache::get_k() and get_v() return them
ggml_tensor * llama_support_build_attn(const llm_graph_context & g,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);

// Nodes that a graph must have room for beside upstream's: of each layer those of every further token that steps with the first, of
// n_seq sequences or of one. Called when a context is made.
uint32_t llama_support_max_nodes(uint32_t n_layer, uint32_t n_seq);

// A product of weights w with activations x: ggml_mul_mat(), or in prefill on a CPU ours.
ggml_tensor * llama_support_build_mul_mat(const llm_graph_context & g, ggml_tensor * w, ggml_tensor * x);
