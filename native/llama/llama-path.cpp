#include "llama-path.h"

#include "portable.h"

#include "llama-model.h"

#include <cstdlib>
#include <cstring>
#include <set>

llama_path_shape llama_path_shape_of(const llama_model & model, const llama_kv_cache & kv, int32_t il) {
    const auto & hparams = model.hparams;
    return { hparams.n_head(il), hparams.n_head_kv(il), hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), kv.type_k(), kv.type_v(),
        model.layers[il].attn_sinks != nullptr, hparams.attn_soft_cap, kv.get_size() };
}

static constexpr int64_t n_list = 16; // of the instances that devices are asked about

ggml_backend_dev_t llama_path_device(ggml_backend_buffer_t buffer) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    if (!dev && ggml_backend_buffer_is_host(buffer)) {
        dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); // whose own buffers do not name it
    }
    return dev;
}

bool llama_path_cpu_has(const char * feature) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto features = cpu ? (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_get_features") : nullptr;
    for (const ggml_backend_feature * f = features ? features(ggml_backend_dev_backend_reg(cpu)) : nullptr; f && f->name; ++f) {
        if (strcmp(f->name, feature) == 0) {
            return strcmp(f->value, "1") == 0;
        }
    }
    return false;
}

// The sketch operations of a layer, on tensors without data.
static std::vector<ggml_tensor *> sketch_operations(ggml_context * c, const ggml_sketch_format & format, ggml_tensor * q, ggml_tensor * k,
                                                    ggml_tensor * v, ggml_tensor * cells) {
    const int64_t n_head_kv = k->ne[2], n_cells = k->ne[1];
    ggml_tensor * codes = ggml_new_tensor_3d(c, GGML_TYPE_I8, 16*ggml_sketch_cell_bytes(&format), n_cells/16, n_head_kv);
    ggml_tensor * basis = ggml_new_tensor_2d(c, GGML_TYPE_F32, ggml_sketch_basis_size(&format, k->ne[0], v->ne[0]), n_head_kv);
    ggml_tensor * plan  = ggml_new_tensor_1d(c, GGML_TYPE_I32, 1);
    ggml_tensor * selected = ggml_new_tensor_2d(c, GGML_TYPE_I32, n_list, n_head_kv);
    ggml_tensor * counts = ggml_new_tensor_2d(c, GGML_TYPE_I32, 2, n_head_kv);
    return {
        ggml_sketch_encode(c, codes, basis, k, v, cells, &format),
        ggml_sketch_scan(c, q, codes, basis, cells, plan, nullptr, selected, counts, n_cells, v->ne[0], 1.0f, 0.0f, 1.0f, &format),
    };
}

// The names of those that a device lacks, "" if it has all.
static std::string lacking(ggml_backend_dev_t dev, const std::vector<ggml_tensor *> & ops) {
    std::set<std::string> names;
    for (const ggml_tensor * op : ops) {
        if (!ggml_backend_dev_supports_op(dev, op)) {
            names.insert(ggml_sfi_op_desc(op));
        }
    }
    std::string text;
    for (const auto & name : names) {
        text += (text.empty() ? "" : ", ") + name;
    }
    return text;
}

// Chosen by the divergence from dense decoding at equal bytes: of the bits of K many go to weak components, those of V hardly matter,
// and exact cells are worth more than either. Two looks: K has 2 bits for each value of a head of 64, of which every step reads half; with
// less, cells were missed where code repeats itself. Larger heads have 3/2 bits: no trained model of theirs was at hand, and longer records
// of single cells took more time than they saved. A look at all: K has a bit for each value. V has half a bit.
ggml_sketch_format llama_path_format(const llama_path_shape & s, const llama_support_params & p) {
    ggml_sketch_format format = p.format;
    if (format.n_k4 + format.n_k2 + format.n_k1 == 0) {
        const int32_t n_k = std::max<int32_t>(1, s.n_embd_head_k/64), n_v = std::max<int32_t>(1, s.n_embd_head_v/64);
        if (p.tolerance > 0.0f && !s.softcap) {
            return n_k == 1 ? ggml_sketch_format { 8, 48, 0, 0, 16*n_v, 2 } : ggml_sketch_format { 4*n_k, 40*n_k, 0, 0, 16*n_v, (3*n_k + 1)/2 };
        }
        return { 4*n_k, 12*n_k, 24*n_k, 0, 16*n_v, 2*n_k };
    }
    if (s.softcap || format.n_first == 0) {
        format.n_first = sketch_k_planes(format);
    }
    return format;
}

static std::vector<ggml_tensor *> native_operations(ggml_context * c, const llama_path_shape & s, const llama_support_params & p) {
    const int64_t n_cells = GGML_PAD(s.n_cells, 256);
    ggml_tensor * q     = ggml_new_tensor_4d(c, GGML_TYPE_F32, s.n_embd_head_k, 1, s.n_head, 1);
    ggml_tensor * k     = ggml_new_tensor_4d(c, s.type_k, s.n_embd_head_k, n_cells, s.n_head_kv, 1);
    ggml_tensor * v     = ggml_new_tensor_4d(c, s.type_v, s.n_embd_head_v, n_cells, s.n_head_kv, 1);
    ggml_tensor * cells = ggml_new_tensor_1d(c, GGML_TYPE_I32, n_cells);
    ggml_tensor * plan  = ggml_new_tensor_1d(c, GGML_TYPE_I32, 3);
    ggml_tensor * last  = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.n_embd_head_k, s.n_head, 1);

    ggml_tensor * attn = ggml_sparse_attn(c, q, k, v, cells, nullptr, nullptr, nullptr, 1.0f, 0.0f);
    ggml_sparse_attn_set_visible(attn, ggml_new_tensor_1d(c, GGML_TYPE_I32, 1));
    ggml_tensor * evidence = ggml_support_evidence(c, last, k, cells, plan, 1.0f, 0.0f, 1.0f, GGML_SUPPORT_SOFTMAX_VISIBLE);
    ggml_tensor * selected = ggml_support_select(c, evidence, cells, plan,
            p.selector.kind == GGML_SUPPORT_SELECTOR_PAPER ? k : nullptr, std::max(p.n_selected, 1), &p.selector);
    ggml_tensor * stability = ggml_support_stability(c, evidence, cells, plan, selected, selected);
    std::vector<ggml_tensor *> ops = { attn, evidence, selected, stability };
    if (p.policy == LLAMA_SUPPORT_SKETCH) {
        const auto more = sketch_operations(c, llama_path_format(s, p), last, k, v, cells);
        ops.insert(ops.end(), more.begin(), more.end());
    }
    return ops;
}

// Bytes of the codes of one KV head: the kernels of some CPUs know where a cell's are by 32 bits.
static int64_t codes_of_a_head(const llama_path_shape & s, const llama_support_params & p) {
    const auto format = llama_path_format(s, p);
    return s.n_cells*ggml_sketch_cell_bytes(&format);
}

static bool portable_forced() {
    const char * value = getenv("SFI_PORTABLE_PATH");
    return value && *value && strcmp(value, "0") != 0;
}

llama_support_path llama_path_choose(ggml_backend_dev_t dev, const llama_path_shape & shape, const llama_support_params & params,
                                     std::string * lacks) {
    ggml_context_ptr ctx(ggml_init({ 128*ggml_tensor_overhead() + ggml_graph_overhead_custom(128, false), nullptr, true }));
    if (!ctx || !dev) {
        return LLAMA_PATH_NONE;
    }
    std::string native = portable_forced() ? "" : lacking(dev, native_operations(ctx.get(), shape, params));
    if (native.empty() && params.policy == LLAMA_SUPPORT_SKETCH && codes_of_a_head(shape, params) > INT32_MAX) {
        native = "SKETCH_SCAN over so many cells";
    }
    if (native.empty() && !portable_forced()) {
        return LLAMA_PATH_NATIVE;
    }
    if (!llama_portable_has(params)) {
        if (lacks) {
            *lacks = native;
        }
        return LLAMA_PATH_NONE;
    }
    const std::string portable = lacking(dev, llama_portable_operations(ctx.get(), shape, params));
    if (lacks) {
        *lacks = portable;
    }
    return portable.empty() ? LLAMA_PATH_PORTABLE : LLAMA_PATH_NONE;
}

std::vector<std::string> llama_path_native(ggml_backend_dev_t dev) {
    static const char * const names[] = { "sparse_attn", "support_evidence", "support_select", "support_stability", "sketch_encode", "sketch_scan" };
    ggml_context_ptr ctx(ggml_init({ 128*ggml_tensor_overhead(), nullptr, true }));
    llama_support_params params;
    params.policy    = LLAMA_SUPPORT_SKETCH;
    params.tolerance = 1.0f;
    std::vector<std::string> has;
    if (ctx) {
        const auto ops = native_operations(ctx.get(), { 2, 1, 64, 64, GGML_TYPE_F16, GGML_TYPE_F16 }, params);
        for (size_t i = 0; i < ops.size(); ++i) {
            if (ggml_backend_dev_supports_op(dev, ops[i])) {
                has.push_back(names[i]);
            }
        }
    }
    return has;
}
