#include "llama-graph-slots.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-support.h"

#include <utility>

llama_graph_slot_kind llama_graph_slot_of(const llama_memory_context_i * mctx) {
    const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx);
    const auto * kv   = iswa ? iswa->get_base() : dynamic_cast<const llama_kv_cache_context *>(mctx);
    const bool   fast = kv && kv->get_support() && kv->get_support()->graph_key().kind == LLAMA_SUPPORT_FAST;
    return fast ? LLAMA_GRAPH_SLOT_FAST : LLAMA_GRAPH_SLOT_MAIN;
}

void llama_context::swap_graph_slot(llama_graph_slot_kind kind) {
    auto & slot = graph_slots[kind];
    std::swap(sched, slot.sched);
    std::swap(gf_res_prev, slot.gf_res_prev);
    std::swap(gf_res_prev_active, slot.gf_res_prev_active);
}

void llama_context::use_graph_slot(llama_graph_slot_kind kind) {
    // pipeline parallelism already keeps several copies of the inputs of one graph
    const bool shared = one_graph_slot || (kind == LLAMA_GRAPH_SLOT_FAST && cparams.pipeline_parallel);
    const auto wanted = shared ? LLAMA_GRAPH_SLOT_MAIN : kind;
    if (wanted != graph_slot) {
        ggml_backend_sched_synchronize(sched.get());
        swap_graph_slot(graph_slot);
        swap_graph_slot(wanted);
        graph_slot = wanted;
        if (!sched) {
            sched.reset(ggml_backend_sched_new(backend_ptrs.data(), backend_buft.data(), backend_ptrs.size(),
                    gf_res_reserve->get_max_nodes(), false, cparams.op_offload));
        }
    }
    if (kind == LLAMA_GRAPH_SLOT_SIDE) {
        gf_res_prev_active = nullptr; // in the main slot it loses its memory
    }
}

bool llama_context::give_up_graph_slot() {
    if (graph_slot == LLAMA_GRAPH_SLOT_MAIN) {
        return false;
    }
    drop_graph_slots();
    one_graph_slot = true;
    return true;
}

void llama_context::drop_graph_slots() {
    one_graph_slot = false;
    use_graph_slot(LLAMA_GRAPH_SLOT_MAIN);
    graph_slots = {};
}

void llama_context::forget_graphs() {
    use_graph_slot(LLAMA_GRAPH_SLOT_MAIN);
    for (auto & slot : graph_slots) {
        for (auto & res : slot.gf_res_prev) {
            res.reset();
        }
        slot.gf_res_prev_active = nullptr;
    }
}

size_t llama_context::idle_graph_slots_size(ggml_backend_t backend) const {
    size_t size = 0;
    for (const auto & slot : graph_slots) {
        size += slot.sched ? ggml_backend_sched_get_buffer_size(slot.sched.get(), backend) : 0;
    }
    return size;
}
