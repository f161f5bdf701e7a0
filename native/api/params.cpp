#include "params.h"

#include "grown.h"

#include <cmath>
#include <cstddef>

static constexpr int32_t sketch_batch   = 32; // cells that leave the window, and get their codes, at once
static constexpr int32_t sketch_queries = 64; // the basis is fitted to the last ones
static constexpr int32_t sketch_depth   = 1024; // from which a fast step with a sketch is faster than a dense one

// ---- defaults and ranges -----------------------------------------------------------------------------------------------

bool refreshes(sfi_policy policy) {
    return (int) policy == SFI_POLICY_FROZEN || (int) policy == SFI_POLICY_WINDOW;
}

// A number of one of the two structs. What is 0 where a policy chooses anew at each step has two defaults.
struct number {
    const char * name;
    size_t       offset;
    bool         research, real;
    double       min, max;
    double       follows, refreshed; // the defaults
};

static constexpr int32_t many = 1 << 24;

#define INT(name, min, max, follows, refreshed)      { #name, offsetof(sfi_params,   name), false, false, min, max, follows, refreshed }
#define REAL(name, min, max, value)                  { #name, offsetof(sfi_params,   name), false, true,  min, max, value, value }
#define MORE_INT(name, min, max, value)              { #name, offsetof(sfi_research, name), true,  false, min, max, value, value }
#define MORE_REAL(name, min, max, value)             { #name, offsetof(sfi_research, name), true,  true,  min, max, value, value }

static const number numbers[] = {
    REAL     (tolerance,       0, 1e6, 3e-4),
    INT      (n_selected,      1, many, 1024, 2048),
    INT      (n_recent,        1, many, 32, 256),
    INT      (n_sink,          0, many, 4, 4),
    INT      (auto_depth,     -1, INT32_MAX, 0, 0),
    INT      (max_span,        0, many, 0, 32),
    INT      (prefill,         SFI_PREFILL_EXACT, SFI_PREFILL_SPARSE, SFI_PREFILL_EXACT, SFI_PREFILL_EXACT),
    MORE_INT (selector,        SFI_SELECTOR_TOPK, SFI_SELECTOR_PAPER, SFI_SELECTOR_TOPK),
    MORE_INT (min_span,        0, many, 16),
    MORE_INT (n_queries,       1, 64, 16),
    MORE_INT (pool_after,      0, 4096, 16),
    MORE_INT (pool_before,     0, 4096, 2),
    MORE_INT (sketch_k4,       0, 512, 0),
    MORE_INT (sketch_k2,       0, 512, 0),
    MORE_INT (sketch_k1,       0, 512, 0),
    MORE_INT (sketch_v4,       0, 512, 0),
    MORE_INT (sketch_v2,       0, 512, 0),
    MORE_INT (sketch_first,    0, 64, 0),
    MORE_REAL(second_look,     0, 1e6, 0.5),
    // the authors' code; the paper gives lambda_clip 0.02, a_soft 0.5, a_cross 0.35 and no others
    MORE_REAL(alpha,           1e-6, 1e6, 0.5),
    MORE_REAL(gamma,          -1e38, 1e38, 0.5),
    MORE_REAL(beta,           -1e38, 1e38, 0.568),
    MORE_REAL(p,              -1e38, 1e38, 1.8),
    MORE_REAL(eta,            -1e38, 1e38, 0.4),
    MORE_REAL(lambda_clip,     0, 1, 0.02),
    MORE_REAL(a_soft,         -1e38, 1e38, 0.5),
    MORE_REAL(a_cross,        -1e38, 1e38, 0.35),
    MORE_REAL(temperature,     1e-6, 1e6, 2.0),
    MORE_INT (nms_radius,      0, 4096, 16),
    MORE_REAL(prefill_least,   0, 1, 0.01),
};

static char * place_of(const number & n, sfi_settings & s) {
    return (n.research ? (char *) &s.research : (char *) &s.params) + n.offset;
}

sfi_settings default_settings(sfi_policy policy) {
    sfi_settings s = {};
    for (const auto & n : numbers) {
        const double value = refreshes(policy) ? n.refreshed : n.follows;
        if (n.real) {
            *(float *) place_of(n, s) = (float) value;
        } else {
            *(int32_t *) place_of(n, s) = (int32_t) value;
        }
    }
    s.params.struct_size   = sizeof(sfi_params);
    s.params.policy        = policy;
    s.params.boundary      = refreshes(policy);
    s.research.struct_size = sizeof(sfi_research);
    if ((int) policy == SFI_POLICY_ORACLE) {
        s.params.n_selected = 256; // its best ones: more hardly change the result
    }
    return s;
}

static int check_numbers(sfi_settings & s) {
    for (const auto & n : numbers) {
        if (!n.real) {
            if (const int err = check_range(n.name, *(int32_t *) place_of(n, s), (int64_t) n.min, (int64_t) n.max)) {
                return err;
            }
            continue;
        }
        const float value = *(float *) place_of(n, s);
        if (!std::isfinite(value)) {
            return fail(SFI_ERR_ARGUMENT, "%s is not a finite number.", n.name);
        }
        if (value < (float) n.min || value > (float) n.max) {
            return fail(SFI_ERR_ARGUMENT, "%s is %g, but must be from %g to %g.", n.name, value, n.min, n.max);
        }
    }
    return SFI_OK;
}

static int check_format(const sfi_research & r) {
    const int32_t n_bits = 4*r.sketch_k4 + 2*r.sketch_k2 + r.sketch_k1;
    if (r.sketch_k4 % 4 || r.sketch_k2 % 4 || r.sketch_k1 % 4 || n_bits % 32) {
        return fail(SFI_ERR_ARGUMENT, "sketch_k4, sketch_k2 and sketch_k1 must be multiples of 4, and their bits together a multiple of 32.");
    }
    if (r.sketch_first > 0 && 32*r.sketch_first >= n_bits) {
        return fail(SFI_ERR_ARGUMENT, "sketch_first must be less than the bits of sketch_k4, sketch_k2 and sketch_k1 over 32.");
    }
    if (r.sketch_v4 % 16 || r.sketch_v2 % 16) {
        return fail(SFI_ERR_ARGUMENT, "sketch_v4 and sketch_v2 must be multiples of 16.");
    }
    if (n_bits == 0 && r.sketch_v4 + r.sketch_v2 > 0) {
        return fail(SFI_ERR_ARGUMENT, "sketch_v4 or sketch_v2 is given without components of K: give sketch_k4, sketch_k2 or sketch_k1 as well.");
    }
    return SFI_OK;
}

static int check_settings(sfi_settings & s) {
    if (const int err = check_numbers(s)) {
        return err;
    }
    if (refreshes(s.params.policy)) {
        if (const int err = check_range("max_span", s.params.max_span, 1, many)) {
            return err;
        }
    }
    if (s.params.policy == SFI_POLICY_FROZEN) {
        if (const int err = check_range("n_recent", s.params.n_recent, s.research.n_queries, many)) { // they see those cells
            return err;
        }
    }
    return check_format(s.research);
}

int read_settings(const sfi_params * theirs, sfi_settings & out) {
    if (!theirs) {
        out = default_settings(SFI_POLICY_SKETCH);
        return SFI_OK;
    }
    if (const int err = check_struct(theirs, "params")) {
        return err;
    }
    if (const int err = check_range("policy", theirs->policy, SFI_POLICY_FROZEN, SFI_POLICY_ORACLE)) {
        return err;
    }
    out = default_settings(theirs->policy);
    if (const int err = take(theirs, out.params, "params")) {
        return err;
    }
    if (const sfi_research * research = out.params.research) {
        if (const int err = check_struct(research, "params->research")) {
            return err;
        }
        if (const int err = take(research, out.research, "params->research")) {
            return err;
        }
    }
    out.params.research = nullptr;
    return check_settings(out);
}

int sfi_default_params(struct sfi_params * params, enum sfi_policy policy) {
    if (const int err = check_struct(params, "params")) {
        return err;
    }
    if (const int err = check_range("policy", policy, SFI_POLICY_FROZEN, SFI_POLICY_ORACLE)) {
        return err;
    }
    give(params, default_settings(policy).params);
    return SFI_OK;
}

int sfi_default_research(struct sfi_research * research) {
    if (const int err = check_struct(research, "research")) {
        return err;
    }
    give(research, default_settings(SFI_POLICY_SKETCH).research);
    return SFI_OK;
}

// ---- what they mean ------------------------------------------------------------------------------------------------------

// At twice the budget a step reads half of the cache, enough to pay for the slow steps. A sketch of sketch_depth cells is read
// about as fast as a tenth of them.
int32_t auto_depth(const sfi_params & p) {
    if (p.auto_depth >= 0) {
        return p.auto_depth;
    }
    return p.policy == SFI_POLICY_SKETCH ? sketch_depth : 2*(p.n_sink + p.n_recent + p.n_selected);
}

int32_t sfi_auto_depth(const struct sfi_params * params) {
    sfi_settings settings;
    const int err = read_settings(params, settings);
    return err ? err : auto_depth(settings.params);
}

static llama_support_policy support_policy(sfi_policy policy) {
    switch ((int) policy) {
        case SFI_POLICY_WINDOW: return LLAMA_SUPPORT_WINDOW;
        case SFI_POLICY_SKETCH: return LLAMA_SUPPORT_SKETCH;
        case SFI_POLICY_ORACLE: return LLAMA_SUPPORT_ORACLE;
        default:                return LLAMA_SUPPORT_FROZEN;
    }
}

static ggml_support_selector support_selector(const sfi_research & r) {
    ggml_support_selector s = {};
    s.kind        = r.selector == SFI_SELECTOR_PAPER ? GGML_SUPPORT_SELECTOR_PAPER : GGML_SUPPORT_SELECTOR_TOPK;
    s.pool_after  = r.pool_after;
    s.pool_before = r.pool_before;
    s.nms_radius  = r.nms_radius;
    s.alpha       = r.alpha;
    s.gamma       = r.gamma;
    s.beta        = r.beta;
    s.p           = r.p;
    s.eta         = r.eta;
    s.lambda_clip = r.lambda_clip;
    s.a_soft      = r.a_soft;
    s.a_cross     = r.a_cross;
    s.temperature = r.temperature;
    return s;
}

llama_support_params support_params(const sfi_settings & settings) {
    const auto & p = settings.params;
    const auto & r = settings.research;
    const bool sketch = p.policy == SFI_POLICY_SKETCH, paper = r.selector == SFI_SELECTOR_PAPER;
    llama_support_params sp;
    sp.policy      = support_policy(p.policy);
    sp.n_sink      = p.n_sink;
    sp.n_recent    = p.n_recent;
    sp.n_selected  = p.n_selected;
    sp.n_grow      = sketch ? sketch_batch : p.max_span;
    sp.n_queries   = sketch ? sketch_queries : r.n_queries;
    sp.n_evidence  = paper ? 1 : r.n_queries; // the paper: the slow step's query alone
    sp.tolerance   = p.tolerance;
    sp.second_look = r.second_look;
    sp.format      = { r.sketch_k4, r.sketch_k2, r.sketch_k1, r.sketch_v4, r.sketch_v2, r.sketch_first };
    sp.selector    = support_selector(r);
    sp.prefill_least = p.prefill == SFI_PREFILL_SPARSE ? r.prefill_least : 0.0f;
    return sp;
}
