// A sequence outside of its context: rows of K and V, and what fast steps need of them.

#include "context.h"

#include "llama-batch.h"

#include <cstring>
#include <functional>

// ---- rows ----------------------------------------------------------------------------------------------------------------

// Where rows of one tensor begin in the cache.
struct row_range {
    ggml_tensor * t;
    size_t        stream;    // bytes before those of the stream
    size_t        row;       // bytes
};

static std::vector<row_range> tensors_of(const llama_kv_cache & kv, uint32_t stream) {
    std::vector<row_range> out;
    for (const uint32_t il : kv.get_layer_ids()) {
        for (ggml_tensor * t : { kv.get_k_storage(il), llama_support_v_storage(kv, il) }) {
            out.push_back({ t, stream*t->nb[2], t->nb[1] });
        }
    }
    return out;
}

// The caches of a context, that of sliding windows last, if K and V of every token are all that they keep.
static int caches_of(llama_context * lctx, std::vector<llama_kv_cache *> & out) {
    if (!lctx) {
        return fail(SFI_ERR_ARGUMENT, "lctx is NULL.");
    }
    const auto & hparams = lctx->get_model().hparams;
    const llama_kv_cache * kv_swa = nullptr;
    llama_kv_cache * kv = sparse_cache(llama_get_memory(lctx), &kv_swa);
    if (!kv || hparams.is_mla() || kv->has_cell_ext() || (kv_swa && kv_swa->has_cell_ext())) {
        return fail(SFI_ERR_MODEL, "This model keeps more than K and V of each token, so its sequences cannot be kept elsewhere.");
    }
    if (!lctx->get_cparams().flash_attn) {
        return fail(SFI_ERR_CONTEXT, "This context stores V transposed; make it with flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED.");
    }
    if (lctx->get_cparams().n_seq_max > 1 && lctx->get_cparams().kv_unified) {
        return fail(SFI_ERR_CONTEXT, "This context keeps its sequences in one unified KV cache; make it with kv_unified = false.");
    }
    if (kv_swa && kv_swa->get_size() < kv->get_size()) {
        return fail(SFI_ERR_CONTEXT, "The sliding-window layers drop cells before the window. Make the context with swa_full = true.");
    }
    out = { kv };
    if (kv_swa) {
        out.push_back(const_cast<llama_kv_cache *>(kv_swa)); // of the same memory, which is not const
    }
    return SFI_OK;
}

static int64_t row_bytes(const std::vector<llama_kv_cache *> & caches) {
    int64_t bytes = 0;
    for (const auto * kv : caches) {
        for (const auto & range : tensors_of(*kv, 0)) {
            bytes += range.row;
        }
    }
    return bytes;
}

int64_t sfi_rows_size(struct llama_context * lctx, int32_t n) {
    int64_t bytes = 0;
    const int err = no_throw([&] {
        std::vector<llama_kv_cache *> caches;
        if (const int e = caches_of(lctx, caches)) {
            return e;
        }
        bytes = row_bytes(caches)*std::max(n, 0);
        return check_range("n", n, 0, INT32_MAX);
    });
    return err ? err : bytes;
}

// The cells of a sequence in the order of its text.
static std::vector<uint32_t> cells_of(const llama_kv_cache & kv, llama_seq_id seq) {
    std::vector<uint32_t> cells;
    for (const auto & [pos, cell] : kv.get_cells(seq).seq_pos_get(seq)) {
        if (pos != (llama_pos) cells.size()) {
            return {}; // not a text from its beginning
        }
        cells.push_back(cell);
    }
    return cells;
}

using move_rows = std::function<void(ggml_tensor * t, char * bytes, size_t offset, size_t size)>;

// Moves the rows of n cells, of which rows holds n_rows, run by run of neighbours.
static char * each_run(const llama_kv_cache & kv, llama_seq_id seq, const uint32_t * cells, int32_t n, char * rows, int32_t n_rows, const move_rows & move) {
    for (const auto & range : tensors_of(kv, kv.get_stream(seq))) {
        for (int32_t i = 0; i < n; ) {
            int32_t end = i + 1;
            while (end < n && cells[end] == cells[end - 1] + 1) {
                ++end;
            }
            move(range.t, rows + i*range.row, range.stream + cells[i]*range.row, (end - i)*range.row);
            i = end;
        }
        rows += n_rows*range.row;
    }
    return rows;
}

// What both directions need to be right; of no caches: err.
static int check_rows(llama_context * lctx, llama_seq_id seq, int32_t n, int32_t n_rows, const void * rows, size_t size, std::vector<llama_kv_cache *> & caches) {
    if (const int err = caches_of(lctx, caches)) {
        return err;
    }
    if (!rows) {
        return fail(SFI_ERR_ARGUMENT, "rows is NULL.");
    }
    for (const int err : { check_range("seq", seq, 0, (int32_t) lctx->get_cparams().n_seq_max - 1), check_range("n", n, 1, n_rows) }) {
        if (err) {
            return err;
        }
    }
    if (size != (size_t) row_bytes(caches)*n_rows) {
        return fail(SFI_ERR_ARGUMENT, "The rows of %d tokens have %lld bytes in this context, and these have %zu.", n_rows,
                (long long) row_bytes(caches)*n_rows, size);
    }
    return SFI_OK;
}

int sfi_get_rows(struct llama_context * lctx, llama_seq_id seq, int32_t first, int32_t n, void * rows, size_t size) {
    return no_throw([&] {
        std::vector<llama_kv_cache *> caches;
        if (const int err = check_rows(lctx, seq, n, n, rows, size, caches)) {
            return err;
        }
        llama_synchronize(lctx);
        char * to = (char *) rows;
        for (const auto * kv : caches) {
            const auto cells = cells_of(*kv, seq);
            if (first < 0 || (size_t) first + n > cells.size()) {
                return fail(SFI_ERR_ARGUMENT, "The sequence holds %zu tokens from its beginning on, which do not include %d tokens from %d on.",
                        cells.size(), n, first);
            }
            to = each_run(*kv, seq, &cells[first], n, to, n, [](ggml_tensor * t, char * bytes, size_t offset, size_t n_bytes) {
                ggml_backend_tensor_get(t, bytes, offset, n_bytes);
            });
        }
        return (int) SFI_OK;
    });
}

// Gives n tokens at positions from `first` on cells of a cache.
static bool place(llama_kv_cache & kv, llama_seq_id seq, const llama_token * tokens, int32_t n, llama_pos first, const llama_hparams & hparams,
                  llama_kv_cache::slot_info & where) {
    llama_batch_allocr batch(hparams.n_pos_per_embd());
    llama_ubatch ubatch = batch.ubatch_reserve(n, 1);
    ubatch.seq_id_unq[0] = seq;
    for (int32_t i = 0; i < n; ++i) {
        ubatch.token[i]    = tokens[i];
        ubatch.pos[i]      = first + i;
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq;
    }
    where = kv.find_slot(ubatch, false);
    if (where.empty()) {
        return false;
    }
    kv.apply_ubatch(where, ubatch);
    return true;
}

int sfi_add_rows(struct llama_context * lctx, llama_seq_id seq, const llama_token * tokens, int32_t n, const void * rows, int32_t n_rows, size_t size) {
    return no_throw([&] {
        std::vector<llama_kv_cache *> caches;
        if (const int err = check_rows(lctx, seq, n, n_rows, rows, size, caches)) {
            return err;
        }
        if (!tokens) {
            return fail(SFI_ERR_ARGUMENT, "There are no tokens to these rows.");
        }
        llama_synchronize(lctx);
        const llama_pos first = caches[0]->seq_pos_max(seq) + 1;
        const auto & hparams = lctx->get_model().hparams;
        char * from = const_cast<char *>((const char *) rows); // is read
        for (size_t i = 0; i < caches.size(); ++i) {
            auto & kv = *caches[i];
            llama_kv_cache::slot_info where;
            if (kv.seq_pos_max(seq) + 1 != first || n > (int32_t) kv.get_size() - first || !place(kv, seq, tokens, n, first, hparams, where)) {
                for (size_t done = 0; done < i; ++done) {
                    caches[done]->seq_rm(seq, first, -1);
                }
                return fail(SFI_ERR_FULL, "The context has no %d free cells for these rows; make it larger.", n);
            }
            if (kv.support) {
                kv.support->invalidate(kv.get_stream(seq));
            }
            from = each_run(kv, seq, where.idxs[0].data(), n, from, n_rows, [](ggml_tensor * t, char * bytes, size_t offset, size_t n_bytes) {
                ggml_backend_tensor_set(t, bytes, offset, n_bytes);
            });
        }
        return (int) SFI_OK;
    });
}

// ---- state ---------------------------------------------------------------------------------------------------------------
//
// A uint64 with the bytes of the support, these, and those of the history.

int64_t sfi_state_size(const struct sfi * s, llama_seq_id seq) {
    int64_t size = 0;
    const int err = guarded(s, [&](llama_support & support) {
        if (const int e = check_seq(support, seq)) {
            return e;
        }
        const size_t n = support.state_size(seq);
        size = n ? sizeof(uint64_t) + n + s->histories[seq].bytes().size() : 0;
        return (int) SFI_OK;
    });
    return err ? err : size;
}

int sfi_get_state(const struct sfi * s, llama_seq_id seq, void * state, size_t size) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        const uint64_t    n       = support.state_size(seq);
        const std::string history = s->histories[seq].bytes();
        if (!n) {
            return fail(SFI_ERR_NO_SUPPORT, "Sequence %d has no state to keep: prefill, or take a slow step first.", seq);
        }
        if (!state || size != sizeof(n) + n + history.size()) {
            return fail(SFI_ERR_ARGUMENT, "The state of sequence %d has %zu bytes, and there is room for %zu.", seq,
                    (size_t) (sizeof(n) + n + history.size()), state ? size : 0);
        }
        llama_synchronize(s->lctx);
        char * to = (char *) state;
        memcpy(to, &n, sizeof(n));
        support.get_state(seq, to + sizeof(n));
        memcpy(to + sizeof(n) + n, history.data(), history.size());
        return (int) SFI_OK;
    });
}

// The number of tokens of a sequence whose cell i holds token i; 0: another order.
static int32_t depth_in_order(const llama_kv_cache & kv, llama_seq_id seq) {
    const auto cells = cells_of(kv, seq);
    for (size_t i = 0; i < cells.size(); ++i) {
        if (cells[i] != i) {
            return 0;
        }
    }
    return (int32_t) cells.size();
}

int sfi_set_state(struct sfi * s, llama_seq_id seq, const void * state, size_t size) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_seq(support, seq)) {
            return err;
        }
        uint64_t n = 0;
        if (!state || size < sizeof(n)) {
            return fail(SFI_ERR_NO_SUPPORT, "This is no state of a sequence.");
        }
        memcpy(&n, state, sizeof(n));
        if (n > size - sizeof(n)) {
            return fail(SFI_ERR_NO_SUPPORT, "This state of a sequence ends too early.");
        }
        const int32_t depth = depth_in_order(support.get_kv(), seq);
        if (!depth) {
            return fail(SFI_ERR_NO_SUPPORT, "Sequence %d has no cells, or not in the order of its text.", seq);
        }
        slowfast::history history;
        const char * bytes = (const char *) state + sizeof(n);
        if (!history.take(bytes + n, size - sizeof(n) - n)) {
            return fail(SFI_ERR_NO_SUPPORT, "This state of a sequence has no end of a text.");
        }
        llama_synchronize(s->lctx);
        int32_t n_tokens = 0;
        const std::string why = support.set_state(seq, bytes, n, depth, n_tokens);
        if (!why.empty()) {
            return fail(SFI_ERR_NO_SUPPORT, "This state does not serve the sequence: %s.", why.c_str());
        }
        history.take_back(n_tokens - depth);
        s->histories[seq] = std::move(history);
        return (int) SFI_OK;
    });
}

// ---- checksum ------------------------------------------------------------------------------------------------------------

// Four lanes of a multiplication and a shift for each 8 bytes, so that none waits for the one before.
uint64_t sfi_checksum(uint64_t begin, const void * bytes, size_t n) {
    constexpr uint64_t odd = 0x9e3779b97f4a7c15, other = 0xd6e8feb86659fd93;
    const auto mix = [](uint64_t h, uint64_t x) {
        h = (h ^ x)*odd;
        return h ^ h >> 32;
    };
    uint64_t lane[4] = { begin ^ odd, begin + other, begin ^ ~odd, begin - other };
    const char * p = (const char *) bytes;
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        uint64_t x[4];
        memcpy(x, p + i, 32);
        for (int j = 0; j < 4; ++j) {
            lane[j] = mix(lane[j], x[j]);
        }
    }
    for (int j = 0; i < n; i += 8, j = (j + 1) % 4) {
        uint64_t x = 0;
        memcpy(&x, p + i, std::min<size_t>(8, n - i));
        lane[j] = mix(lane[j], x);
    }
    uint64_t h = n;
    for (const uint64_t x : lane) {
        h = mix(h, x);
    }
    return h;
}
