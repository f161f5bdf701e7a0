// sfi-research.h's readers.

#include "context.h"
#include "grown.h"

#include "llama-path.h"

#include <algorithm>
#include <cmath>

int32_t sfi_n_layer(const struct sfi * s) {
    int32_t n = 0;
    const int err = guarded(s, [&](llama_support & support) {
        n = (int32_t) support.get_layers().size();
        return (int) SFI_OK;
    });
    return err ? err : n;
}

static sfi_path public_path(llama_support_path path) {
    switch (path) {
        case LLAMA_PATH_NATIVE:   return SFI_PATH_NATIVE;
        case LLAMA_PATH_PORTABLE: return SFI_PATH_PORTABLE;
        default:                  return SFI_PATH_NONE;
    }
}

enum sfi_path sfi_device_path(size_t device, const struct sfi_params * params, const char ** lacks) {
    static thread_local std::string text;
    text.clear();
    llama_support_path path = LLAMA_PATH_NONE;
    no_throw([&] {
        sfi_settings settings;
        const int err = read_settings(params, settings);
        if (!err && device < ggml_backend_dev_count()) {
            const llama_path_shape shape = { 8, 2, 128, 128, GGML_TYPE_F16, GGML_TYPE_F16 };
            path = llama_path_choose(ggml_backend_dev_get(device), shape, support_params(settings), &text);
        }
        return err;
    });
    if (lacks) {
        *lacks = path == LLAMA_PATH_NONE ? text.c_str() : "";
    }
    return public_path(path);
}

const char * sfi_device_operations(size_t device) {
    static thread_local std::string text;
    text.clear();
    no_throw([&] {
        if (device < ggml_backend_dev_count()) {
            for (const auto & name : llama_path_native(ggml_backend_dev_get(device))) {
                text += (text.empty() ? "" : " ") + name;
            }
        }
        return (int) SFI_OK;
    });
    return text.c_str();
}

static int check_layer(const llama_support & support, int32_t il) {
    return check_range("layer", il, 0, (int32_t) support.get_layers().size() - 1);
}

int sfi_get_layer(const struct sfi * s, int32_t il, struct sfi_layer * layer) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_struct(layer, "layer")) {
            return err;
        }
        if (const int err = check_layer(support, il)) {
            return err;
        }
        const auto & hparams = s->lctx->get_model().hparams;
        const llama_kv_cache & kv = support.get_kv();
        sfi_layer out = {};
        out.sparse        = support.is_sparse(il);
        out.n_head        = hparams.n_head(il);
        out.n_head_kv     = hparams.n_head_kv(il);
        out.n_embd_head_k = hparams.n_embd_head_k(il);
        out.n_embd_head_v = hparams.n_embd_head_v(il);
        out.kv_cell_bytes = ggml_row_size(kv.type_k(), hparams.n_embd_k_gqa(il)) + ggml_row_size(kv.type_v(), hparams.n_embd_v_gqa(il));
        out.why           = support.layer(il).why.c_str();
        out.path          = public_path(support.layer(il).path);
        give(layer, out);
        return (int) SFI_OK;
    });
}

static int check_head(const sfi * s, const llama_support & support, llama_seq_id seq, int32_t il, int32_t head_kv) {
    if (const int err = check_seq(support, seq)) {
        return err;
    }
    if (const int err = check_layer(support, il)) {
        return err;
    }
    if (const int err = check_range("head_kv", head_kv, 0, (int32_t) s->lctx->get_model().hparams.n_head_kv(il) - 1)) {
        return err;
    }
    if (!support.is_sparse(il) || !support.layer(il).policy->has_selected()) {
        return fail(SFI_ERR_NO_SUPPORT, "Layer %d selects nothing: it %s.", il,
                support.is_sparse(il) ? "keeps sink and recent cells only (policy window)" : support.layer(il).why.c_str());
    }
    if (support.n_refresh(seq) == 0) {
        return fail(SFI_ERR_NO_SUPPORT, "Nothing has been selected yet: prefill, or take a slow step first.");
    }
    return SFI_OK;
}

int sfi_get_selected(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head_kv, int32_t * cells, int32_t * positions, int32_t n_max) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_head(s, support, seq, il, head_kv)) {
            return err;
        }
        llama_synchronize(s->lctx);
        const auto list = support.layer(il).policy->selected(seq, il, head_kv);
        const auto & kv_cells = support.get_kv().get_cells(seq);
        for (int32_t i = 0; i < std::min<int32_t>(n_max, (int32_t) list.size()); ++i) {
            if (cells) {
                cells[i] = list[i];
            }
            if (positions) {
                positions[i] = kv_cells.is_empty(list[i]) ? -1 : kv_cells.pos_get(list[i]);
            }
        }
        return (int) list.size();
    });
}

int sfi_get_stability(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head_kv, struct sfi_stability * stability) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_struct(stability, "stability")) {
            return err;
        }
        if (const int err = check_head(s, support, seq, il, head_kv)) {
            return err;
        }
        if (s->settings.params.policy != SFI_POLICY_FROZEN) {
            return fail(SFI_ERR_NO_SUPPORT, "Only policy frozen chooses a support that stays; this one selects anew at every step, so nothing "
                    "is stable or not.");
        }
        llama_synchronize(s->lctx);
        const auto x = support.layer(il).policy->stability(seq, il, head_kv);
        const bool first = support.n_refresh(seq) == 1;
        sfi_stability out = {};
        out.n_selected = (int32_t) support.layer(il).policy->selected(seq, il, head_kv).size();
        out.evidence   = x[0];
        out.mass       = x[0] > 0.0f ? x[1]/x[0] : 1.0f;
        out.mass_prev  = first ? NAN : x[0] > 0.0f ? x[2]/x[0] : 1.0f;
        out.jaccard    = first ? NAN : x[3];
        give(stability, out);
        return (int) SFI_OK;
    });
}

int sfi_get_tail(const struct sfi * s, llama_seq_id seq, int32_t il, int32_t head, struct sfi_tail * tail) {
    return guarded(s, [&](llama_support & support) {
        if (const int err = check_struct(tail, "tail")) {
            return err;
        }
        for (const int err : { check_seq(support, seq), check_layer(support, il) }) {
            if (err) {
                return err;
            }
        }
        const auto & layer = support.layer(il);
        const auto & hparams = s->lctx->get_model().hparams;
        if (const int err = check_range("head", head, 0, (int32_t) hparams.n_head(il) - 1)) {
            return err;
        }
        std::array<float, 2> mass_and_error;
        if (!layer.policy || !layer.policy->tail(seq, il, head, mass_and_error)) {
            return fail(SFI_ERR_NO_SUPPORT, "Layer %d has no tail: only a fast step of policy sketch leaves one, when there are cells beyond the window.", il);
        }
        sfi_tail out = {};
        out.mass        = mass_and_error[0];
        out.logit_error = mass_and_error[1];
        give(tail, out);
        return (int) SFI_OK;
    });
}

