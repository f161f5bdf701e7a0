// What a context computes with, once for each kind of work.
//
// A scheduler holds one allocated graph. With one for every kind of work, a fast step finds its graph built, split and
// allocated though other steps came between. The slot in use lies in the members of llama_context that upstream has for it.

#pragma once

#include "llama-graph.h"

#include "ggml-cpp.h"

#include <array>

enum llama_graph_slot_kind {
    LLAMA_GRAPH_SLOT_MAIN, // all that follows, where there is no other
    LLAMA_GRAPH_SLOT_FAST, // fast steps
    LLAMA_GRAPH_SLOT_SIDE, // graphs that are no model's: llama_support::compute()
    LLAMA_GRAPH_SLOT_COUNT,
};

struct llama_graph_slot {
    ggml_backend_sched_ptr              sched;       // null: not made yet
    std::array<llm_graph_result_ptr, 2> gf_res_prev; // as in llama_context
    llm_graph_result                  * gf_res_prev_active = nullptr;
};

// Which slot the next ubatch takes.
llama_graph_slot_kind llama_graph_slot_of(const llama_memory_context_i * mctx);
