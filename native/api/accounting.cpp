// The statistics of a context.

#include "context.h"

#include <algorithm>

void count_step(sfi * s, const llama_support & support, const sfi_step_info & info, int64_t kv_read) {
    const std::lock_guard<std::mutex> lock(s->meter);
    auto & stats = s->stats;
    stats.kv_read  += kv_read;
    stats.kv_dense += support.dense_bytes(info.depth, 1);
    if (info.reason != SFI_REASON_NONE) {
        ++stats.n_reason[info.reason];
    }
    switch (info.kind) {
        case SFI_STEP_SLOW:
            ++stats.n_slow;
            stats.us_slow += info.t_us;
            break;
        case SFI_STEP_FAST:
            ++stats.n_fast;
            stats.us_fast += info.t_us;
            break;
        default:
            ++stats.n_dense;
            stats.us_dense += info.t_us;
    }
}

void count_verify(sfi * s, const llama_support & support, const sfi_step_info & info, int32_t n, int32_t n_new, int64_t kv_read) {
    const std::lock_guard<std::mutex> lock(s->meter);
    auto & stats = s->stats;
    ++stats.n_verify;
    ++stats.n_reason[info.reason];
    stats.n_verified += n;
    stats.us_verify  += info.t_us;
    stats.kv_read    += kv_read;
    stats.kv_dense   += support.dense_bytes(info.depth, n_new);
}

void count_prefill(sfi * s, int32_t n, int64_t t_us) {
    const std::lock_guard<std::mutex> lock(s->meter);
    s->stats.n_prefill  += n;
    s->stats.us_prefill += t_us;
}

void count_taken_back(sfi * s, const llama_support & support, int64_t depth, int32_t n) {
    const std::lock_guard<std::mutex> lock(s->meter);
    s->stats.kv_dense = std::max<int64_t>(0, s->stats.kv_dense - support.dense_bytes(depth, n));
}
