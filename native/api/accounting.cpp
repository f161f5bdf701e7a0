// What steps read of K and V, in bytes, and what the sketch stood for.

#include "context.h"

#include "ggml-sfi.h"

#include <algorithm>
#include <map>

// Bytes of K and V of one cell in the layers that a fast step makes sparse.
static int64_t sparse_cell_bytes(const llama_support & support, const llama_hparams & hparams, bool keys_only) {
    const llama_kv_cache * kv = support.get_kv();
    int64_t size = 0;
    for (int32_t il = 0; il < (int32_t) support.get_layers().size(); ++il) {
        if (support.is_sparse(il)) {
            size += ggml_row_size(kv->type_k(), hparams.n_embd_k_gqa(il));
            size += keys_only ? 0 : ggml_row_size(kv->type_v(), hparams.n_embd_v_gqa(il));
        }
    }
    return size;
}

// Bytes that the other layers read at a depth, whatever the kind of step.
static int64_t other_bytes(const sfi * s, const llama_support & support, const llama_hparams & hparams, int64_t depth) {
    int64_t size = 0;
    const auto add = [&](const llama_kv_cache * kv, bool swa) {
        for (const uint32_t il : kv->get_layer_ids()) {
            if (il < support.get_layers().size() && !(kv == support.get_kv() && support.is_sparse(il))) {
                const int64_t n = swa ? std::min<int64_t>(depth, hparams.n_swa) : depth;
                size += n*(ggml_row_size(kv->type_k(), hparams.n_embd_k_gqa(il)) + ggml_row_size(kv->type_v(), hparams.n_embd_v_gqa(il)));
            }
        }
    };
    add(support.get_kv(), false);
    if (s->kv_swa) {
        add(s->kv_swa, true);
    }
    return size;
}

// What a fast step with a sketch left in the tensors that the layers of a device share. Each is read once, for a copy from a
// device takes tens of microseconds however small it is; in the host's memory they are looked at where they lie.
class step_results {
public:
    explicit step_results(llama_seq_id seq) : seq(seq) {}

    template <class T> const T * of(const ggml_tensor * t) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return (const T *) ((const char *) t->data + seq*t->nb[2]);
        }
        auto & row = rows[t->view_src];
        if (row.empty()) {
            row.resize(t->view_src->nb[1]);
            ggml_backend_tensor_get(t->view_src, row.data(), seq*t->view_src->nb[1], row.size());
        }
        return (const T *) (row.data() + t->view_offs);
    }

private:
    llama_seq_id seq;
    std::map<const ggml_tensor *, std::vector<char>> rows;
};

static float mean_tail_mass(const llama_support & support, step_results & results) {
    double sum = 0.0;
    int64_t n = 0;
    for (const auto & layer : support.get_layers()) {
        if (layer.mass) {
            const float * values = results.of<float>(layer.mass); // {log-sum-exp, share of the tail} of every head
            for (int64_t h = 0; h < layer.mass->ne[1]; ++h, ++n) {
                sum += values[2*h + 1];
            }
        }
    }
    return n ? (float) (sum/n) : 0.0f;
}

attended attended_by_sketch(const sfi * s, const llama_support & support, llama_seq_id seq, float & tail_mass) {
    step_results results(seq);
    const auto & hparams = s->lctx->get_model().hparams;
    const llama_kv_cache * kv = support.get_kv();
    attended sum;
    for (int32_t il = 0; il < (int32_t) support.get_layers().size() && support.scanned(seq); ++il) {
        const auto & layer = support.layer(il);
        if (!layer.counts) {
            continue;
        }
        const int64_t cell_bytes = ggml_row_size(kv->type_k(), hparams.n_embd_head_k(il)) + ggml_row_size(kv->type_v(), hparams.n_embd_head_v(il));
        const int64_t more_bytes = ggml_sketch_cell_bytes(&layer.format) - 4*layer.format.n_first; // of a second look
        const int32_t * counts = results.of<int32_t>(layer.counts);
        for (int64_t h = 0; h < layer.n_head_kv; ++h) {
            sum.n_cells += counts[2*h];
            sum.bytes   += counts[2*h]*cell_bytes + counts[2*h + 1]*more_bytes;
        }
        sum.n_heads += layer.n_head_kv;
    }
    tail_mass = mean_tail_mass(support, results);
    return sum;
}

int64_t mean_cells(const attended & a) {
    return a.n_heads ? (a.n_cells + a.n_heads/2)/a.n_heads : 0;
}

void count_step(sfi * s, const llama_support & support, llama_seq_id seq, const sfi_step_info & info, const attended & sketched) {
    const std::lock_guard<std::mutex> lock(s->meter);
    auto & stats = s->stats;
    const auto & hparams = s->lctx->get_model().hparams;
    const int64_t cell  = sparse_cell_bytes(support, hparams, false);
    const int64_t other = other_bytes(s, support, hparams, info.depth);

    stats.kv_dense += cell*info.depth + other;
    stats.kv_read  += cell*(info.n_cells - mean_cells(sketched)) + sketched.bytes + other;
    if (info.kind == SFI_STEP_FAST) {
        stats.kv_read += support.sketch_bytes(seq);
        stats.kv_read += (int) s->settings.params.policy == SFI_POLICY_ORACLE ? sparse_cell_bytes(support, hparams, true)*info.depth : 0;
    }
    if (info.reason != SFI_REASON_NONE) {
        ++stats.n_reason[info.reason];
    }
    switch (info.kind) {
        case SFI_STEP_SLOW:
            ++stats.n_slow;
            stats.us_slow += info.t_us;
            if (s->settings.params.policy == SFI_POLICY_FROZEN && (s->settings.research.selector == SFI_SELECTOR_PAPER || support.has_portable())) {
                // whose evidence reads the keys once more
                stats.kv_read += sparse_cell_bytes(support, hparams, true)*info.depth;
            }
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

// Bytes of K and V that dense steps read for the last n of `depth` tokens.
static int64_t dense_bytes(const sfi * s, const llama_support & support, int64_t depth, int32_t n) {
    const auto & hparams = s->lctx->get_model().hparams;
    const int64_t cell = sparse_cell_bytes(support, hparams, false);
    int64_t size = 0;
    for (int64_t d = depth - n + 1; d <= depth; ++d) {
        size += cell*d + other_bytes(s, support, hparams, d);
    }
    return size;
}

void count_verify(sfi * s, const llama_support & support, const sfi_step_info & info, int32_t n, int32_t n_new, bool refresh) {
    const std::lock_guard<std::mutex> lock(s->meter);
    auto & stats = s->stats;
    const auto & hparams = s->lctx->get_model().hparams;
    ++stats.n_verify;
    ++stats.n_reason[info.reason];
    stats.n_verified += n;
    stats.us_verify  += info.t_us;
    stats.kv_read    += dense_bytes(s, support, info.depth, 1);
    stats.kv_read    += refresh && s->settings.params.policy == SFI_POLICY_FROZEN ? sparse_cell_bytes(support, hparams, true)*info.depth : 0;
    stats.kv_dense   += dense_bytes(s, support, info.depth, n_new);
}

void count_prefill(sfi * s, int32_t n, int64_t t_us) {
    const std::lock_guard<std::mutex> lock(s->meter);
    s->stats.n_prefill  += n;
    s->stats.us_prefill += t_us;
}

void count_taken_back(sfi * s, const llama_support & support, int64_t depth, int32_t n) {
    const std::lock_guard<std::mutex> lock(s->meter);
    s->stats.kv_dense = std::max<int64_t>(0, s->stats.kv_dense - dense_bytes(s, support, depth, n));
}

float tail_mass_of(const llama_support & support, llama_seq_id seq, int32_t il, int32_t head) {
    return step_results(seq).of<float>(support.layer(il).mass)[2*head + 1];
}
