// A text and its continuation in C++: raii MODEL.gguf TEXT [N]

#include "sfi.hpp"

#include <cstdio>
#include <cstdlib>

static void run(const char * path, const char * text, int n) {
    const sfi_local::model model(path);
    const auto prompt = model.tokenize(text);
    const sfi_local::context context(model, sfi_local::context_params((uint32_t) prompt.size() + (uint32_t) n));
    sfi_local::engine engine(context);
    const std::unique_ptr<llama_sampler, void (*)(llama_sampler *)> sampler(llama_sampler_init_greedy(), llama_sampler_free);

    engine.prefill(prompt, [](sfi_phase, int32_t done, int32_t total) {
        std::fprintf(stderr, "%d of %d read\n", done, total);
        return true;
    });
    for (int i = 0; i < n; ++i) {
        const llama_token token = llama_sampler_sample(sampler.get(), context, -1);
        if (model.ends(token)) {
            break;
        }
        std::fputs(model.piece(token).c_str(), stdout);
        engine.step(token);
    }
    std::fputs("\n", stdout);
    const sfi_stats stats = engine.stats();
    std::fprintf(stderr, "%lld fast steps of %lld\n", (long long) stats.n_fast, (long long) (stats.n_fast + stats.n_slow + stats.n_dense));
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: %s MODEL.gguf TEXT [N]\n", argv[0]);
        return 2;
    }
    sfi_log_set([](ggml_log_level level, const char * line, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(line, stderr);
        }
    }, nullptr);
    try {
        run(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 64);
        return 0;
    } catch (const std::exception & e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
