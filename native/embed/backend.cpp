// What libsfi does where llama.cpp asks for a CPU: it has one set of kernels for each kind, or those of one machine alone, and says so
// in a sentence where none runs here. And the defaults of a context, which in llama.cpp have four threads on every machine.

#include "start.h"
#include "team.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "sfi.h"

// X(name): the kernels of one kind of CPU. Their symbols are made local by the build, but for these two.
#include "sfi-cpu-variants.h"

#define X(name) extern "C" ggml_backend_reg_t sfi_cpu_reg_##name(void);
SFI_CPU_VARIANTS(X)
#undef X

#ifdef SFI_CPU_CHOICE
#define X(name) extern "C" int sfi_cpu_score_##name(void);
SFI_CPU_VARIANTS(X)
#undef X
#else // the one that there is
#define X(name) static int sfi_cpu_score_##name() { return check_cpu() == SFI_OK; }
SFI_CPU_VARIANTS(X)
#undef X
#endif

namespace {

struct variant {
    ggml_backend_reg_t (*reg)(void);
    int (*score)(void); // 0: this CPU cannot run it
};

} // namespace

static const variant variants[] = {
#define X(name) { sfi_cpu_reg_##name, sfi_cpu_score_##name },
    SFI_CPU_VARIANTS(X)
#undef X
};

// llama.cpp calls it once, when it first asks what devices there are.
ggml_backend_reg_t ggml_backend_cpu_reg(void) {
    const variant * best = nullptr;
    int most = 0;
    for (const variant & v : variants) {
        const int score = v.score();
        if (score > most) {
            best = &v;
            most = score;
        }
    }
    if (!best) {
        GGML_LOG_ERROR("%s\n", sfi_last_error());
        return nullptr;
    }
    return best->reg();
}

int32_t team_default_threads() {
    return start_threads();
}

// ---- llama.h -------------------------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) struct llama_context_params sfi_llama_context_default_params(void) {
    llama_context_params params = llama_context_default_params();
    params.n_threads       = start_threads();
    params.n_threads_batch = params.n_threads;
    return params;
}
