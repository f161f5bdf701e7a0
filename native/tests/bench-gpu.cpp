// Times our operations on a device beside stock flash attention, in one run: sfi-bench-gpu [DEVICE [PART OF A ROW'S NAME]]
//
// Each row is a graph of the same operation for several layers, each with K and V of its own, so that a pass over all of
// them is larger than any cache of the device. Bytes are those that the operation has to read. The bandwidth that they
// are held against is that of a large copy on the device, read and written bytes counted.

#include "ggml-sfi.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int64_t n_head = 32, n_head_kv = 8, d = 128; // Qwen3-4B, Llama-3-8B
constexpr int64_t n_always = 260, n_selected = 2048;
constexpr double  least_bytes = 1.5e9;  // of K and V together
constexpr float   logit_scale = 0.4f/16;   // of a scan
constexpr ggml_sketch_format one_look = { 8, 24, 48, 0, 32, 4 }, two_looks = { 8, 80, 0, 0, 32, 3 }; // defaults without a tolerance, and with one

ggml_backend_t backend;
std::mt19937   gen(2603);

struct graph_of_layers {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph           * graph = nullptr;
};

using builder = std::function<std::vector<ggml_tensor *>(ggml_context *)>;

void fill(ggml_tensor * t) {
    static std::vector<uint8_t> noise;
    if (noise.empty()) {
        noise.resize(64 << 20);
        for (size_t i = 0; i < noise.size(); i += 4) {
            const uint32_t x = gen();
            memcpy(&noise[i], &x, 4);
        }
    }
    const size_t n = ggml_nbytes(t);
    if (t->type == GGML_TYPE_F32) {
        static std::vector<float> values;
        std::normal_distribution<float> normal;
        while (values.size() < size_t(1) << 20) {
            const float x = normal(gen);
            uint32_t bits;
            memcpy(&bits, &x, sizeof(bits));
            bits = (bits & ~0x7c00u) | 0x3800u; // either half is a number too: a basis has some in F16
            values.emplace_back();
            memcpy(&values.back(), &bits, sizeof(bits));
        }
        for (size_t at = 0, chunk = values.size()*sizeof(float); at < n; at += chunk) {
            ggml_backend_tensor_set(t, values.data(), at, std::min(chunk, n - at));
        }
    } else if (t->type == GGML_TYPE_F16) { // random sign and mantissa, 0.5 to 1
        static std::vector<uint16_t> halves;
        for (size_t i = 0; halves.size() < noise.size()/2; ++i) {
            halves.push_back((uint16_t) (((noise[2*i] | noise[2*i + 1] << 8) & 0x83ff) | 0x3800));
        }
        for (size_t at = 0; at < n; at += noise.size()) {
            ggml_backend_tensor_set(t, halves.data(), at, std::min(noise.size(), n - at));
        }
    } else if (t->type == GGML_TYPE_Q8_0) {
        std::vector<uint8_t> blocks(34 << 20);
        for (size_t i = 0; i < blocks.size(); ++i) {
            blocks[i] = noise[i];
        }
        for (size_t i = 0; i + 34 <= blocks.size(); i += 34) {
            blocks[i]     = 0;
            blocks[i + 1] = 0x20; // 2^-7
        }
        for (size_t at = 0; at < n; at += blocks.size()) {
            ggml_backend_tensor_set(t, blocks.data(), at, std::min(blocks.size(), n - at));
        }
    } else if (t->type == GGML_TYPE_I8) {
        for (size_t at = 0; at < n; at += noise.size()) {
            ggml_backend_tensor_set(t, noise.data(), at, std::min(noise.size(), n - at));
        }
    }
}

graph_of_layers build(const builder & add) {
    graph_of_layers g;
    g.ctx.reset(ggml_init({ 4096*ggml_tensor_overhead() + ggml_graph_overhead_custom(4096, false), nullptr, true }));
    const auto results = add(g.ctx.get());
    g.graph = ggml_new_graph_custom(g.ctx.get(), 4096, false);
    for (ggml_tensor * t : results) {
        ggml_build_forward_expand(g.graph, t);
    }
    g.buffer.reset(ggml_backend_alloc_ctx_tensors(g.ctx.get(), backend));
    if (!g.buffer) {
        return g;
    }
    for (ggml_tensor * t = ggml_get_first_tensor(g.ctx.get()); t; t = ggml_get_next_tensor(g.ctx.get(), t)) {
        if (t->op == GGML_OP_NONE && !t->view_src && t->type != GGML_TYPE_I32) {
            fill(t);
        }
    }
    return g;
}

// seconds of a pass, the median of several
double time_of(ggml_cgraph * graph) {
    for (int i = 0; i < 3; ++i) { // a backend may take two to capture it
        ggml_backend_graph_compute(backend, graph);
    }
    std::vector<double> times;
    const auto begin = std::chrono::steady_clock::now();
    while (times.size() < 5 || (times.size() < 200 && std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(400))) {
        const auto t0 = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count());
    }
    std::nth_element(times.begin(), times.begin() + times.size()/2, times.end());
    return times[times.size()/2];
}

void set(ggml_tensor * t, const std::vector<int32_t> & values) {
    ggml_backend_tensor_set(t, values.data(), 0, values.size()*sizeof(int32_t));
}

// n of the cells first .. last - 1 in random order
std::vector<int32_t> some(int64_t n, int64_t first, int64_t last) {
    std::vector<int32_t> cells;
    for (int64_t c = first; c < last; ++c) {
        cells.push_back((int32_t) c);
    }
    std::shuffle(cells.begin(), cells.end(), gen);
    cells.resize(n);
    return cells;
}

std::vector<int32_t> all(int64_t n) {
    std::vector<int32_t> cells(n);
    for (int64_t c = 0; c < n; ++c) {
        cells[c] = (int32_t) c;
    }
    return cells;
}

double copy_bandwidth() {
    auto g = build([](ggml_context * ctx) {
        ggml_tensor * a = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 256 << 20), * b = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 256 << 20);
        return std::vector<ggml_tensor *> { ggml_cpy(ctx, a, b) };
    });
    return 2.0*4*(256 << 20)/time_of(g.graph);
}

// K or V of a layer as the cache holds it, seen as [d, n_cells, n_head_kv, n_stream]
ggml_tensor * cache(ggml_context * ctx, ggml_type type, int64_t n_cells, int64_t n_stream) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, d*n_head_kv, n_cells, n_stream);
    ggml_tensor * v = ggml_view_4d(ctx, t, d, n_head_kv, n_cells, n_stream, ggml_row_size(type, d), t->nb[1], t->nb[2], 0);
    return ggml_permute(ctx, v, 0, 2, 1, 3);
}

int layers_for(ggml_type type, int64_t n_cells, int64_t n_stream) {
    const double one = 2.0*ggml_row_size(type, d)*n_head_kv*n_cells*n_stream;
    return (int) std::clamp(std::ceil(least_bytes/one), 2.0, 48.0);
}

struct measured { double us; double bytes; std::string note; };

std::string only; // rows whose name has this in it

void row(const std::string & what, int64_t depth, int64_t batch, ggml_type type, double bandwidth, const std::function<measured()> & measure) {
    if (what.find(only) == std::string::npos) {
        return;
    }
    const measured m = measure();
    printf("%-34s %8lld %5lld %5s %10.1f %10.2f %8.0f %7.0f%%  %s\n", what.c_str(), (long long) depth, (long long) batch, ggml_type_name(type),
            m.us, m.bytes/1e6, m.bytes/m.us/1e3, 100*m.bytes/m.us*1e6/bandwidth, m.note.c_str());
}

// ---- the rows ----------------------------------------------------------------------------------------------------------

measured frozen_step(ggml_type type, int64_t depth, int64_t n_stream) {
    const int n_layer = layers_for(type, depth, n_stream);
    std::vector<ggml_tensor *> selected;
    ggml_tensor * always = nullptr;
    auto g = build([&](ggml_context * ctx) {
        std::vector<ggml_tensor *> out;
        always = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_always, 1, 1, n_stream);
        for (int il = 0; il < n_layer; ++il) {
            ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, d, n_head, 1, n_stream), 0, 2, 1, 3);
            selected.push_back(ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_selected, n_head_kv, 1, n_stream));
            out.push_back(ggml_sparse_attn(ctx, q, cache(ctx, type, depth, n_stream), cache(ctx, type, depth, n_stream), always,
                    selected.back(), nullptr, nullptr, 1.0f/std::sqrt((float) d), 0.0f));
        }
        return out;
    });
    std::vector<int32_t> list;
    for (int64_t s = 0; s < n_stream; ++s) {
        const auto part = all(n_always);
        list.insert(list.end(), part.begin(), part.end());
    }
    set(always, list);
    for (ggml_tensor * t : selected) {
        list.clear();
        for (int64_t i = 0; i < n_head_kv*n_stream; ++i) {
            const auto part = some(n_selected, n_always, depth);
            list.insert(list.end(), part.begin(), part.end());
        }
        set(t, list);
    }
    return { time_of(g.graph)/n_layer*1e6, 2.0*ggml_row_size(type, d)*n_head_kv*n_stream*(n_always + n_selected), "" };
}

enum class dense { ours, stock, slow };

measured dense_step(ggml_type type, int64_t depth, dense kind) {
    const int n_layer = layers_for(type, depth, 1);
    ggml_tensor * cells = nullptr, * plan = nullptr;
    auto g = build([&](ggml_context * ctx) {
        std::vector<ggml_tensor *> out;
        cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, depth);
        plan  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, depth, 1);
        ggml_support_selector selector = {};
        selector.pool_after  = 16;
        selector.pool_before = 2;
        for (int il = 0; il < n_layer; ++il) {
            ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, d, n_head, 1, 1), 0, 2, 1, 3);
            ggml_tensor * k = cache(ctx, type, depth, 1), * v = cache(ctx, type, depth, 1);
            const float scale = 1.0f/std::sqrt((float) d);
            if (kind == dense::stock) {
                out.push_back(ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f));
            } else if (kind == dense::ours) {
                out.push_back(ggml_sparse_attn(ctx, q, k, v, cells, nullptr, nullptr, nullptr, scale, 0.0f));
            } else {
                ggml_tensor * both = ggml_sparse_attn_evidence(ctx, q, k, v, cells, nullptr, plan, scale, 0.0f);
                ggml_tensor * evidence = ggml_view_2d(ctx, both, depth, n_head_kv, depth*sizeof(float), d*n_head*sizeof(float));
                ggml_tensor * selected = ggml_support_select(ctx, evidence, cells, plan, nullptr, n_selected, &selector);
                out.push_back(ggml_support_stability(ctx, evidence, cells, plan, selected, selected));
            }
        }
        return out;
    });
    set(cells, all(depth));
    set(plan, { 4, (int32_t) depth - 256 });
    return { time_of(g.graph)/n_layer*1e6, 2.0*ggml_row_size(type, d)*n_head_kv*depth, "" };
}

// cells that were selected, and that were looked at again, over all layers; the counts of ggml_sketch_scan()
std::pair<double, double> total(const std::vector<ggml_tensor *> & counts) {
    std::pair<double, double> sum;
    for (const ggml_tensor * t : counts) {
        std::vector<int32_t> of_head(ggml_nelements(t));
        ggml_backend_tensor_get(t, of_head.data(), 0, ggml_nbytes(t));
        for (size_t i = 0; i < of_head.size(); i += 2) {
            sum.first  += of_head[i];
            sum.second += of_head[i + 1];
        }
    }
    return sum;
}

// Scan, then attention over what it selected. The logits of cells are as far apart as in decoding: some percent of them matter.
measured sketch_step(ggml_type type, int64_t depth, const ggml_sketch_format & format, bool attend) {
    const int n_layer = layers_for(type, depth, 1);
    const int64_t n_skip = 512;
    ggml_tensor * always = nullptr, * skip = nullptr, * plan = nullptr, * least = nullptr;
    std::vector<ggml_tensor *> counts;
    auto g = build([&](ggml_context * ctx) {
        std::vector<ggml_tensor *> out;
        always = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_always);
        skip   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_skip);
        plan   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
        least  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head_kv);
        for (int il = 0; il < n_layer; ++il) {
            ggml_tensor * q_rows = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, d, n_head, 1, 1);
            ggml_tensor * codes = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, 16*ggml_sketch_cell_bytes(&format), depth/16, n_head_kv);
            ggml_tensor * basis = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_sketch_basis_size(&format, d, d), n_head_kv);
            ggml_tensor * selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1024, n_head_kv);
            counts.push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_head_kv));
            ggml_tensor * tail = ggml_sketch_scan(ctx, ggml_reshape_2d(ctx, q_rows, d, n_head), codes, basis, skip, plan, least, selected,
                    counts.back(), depth, d, logit_scale, 0.0f, 0.5f, &format);
            out.push_back(tail);
            if (attend) {
                ggml_tensor * q = ggml_permute(ctx, q_rows, 0, 2, 1, 3);
                out.push_back(ggml_sparse_attn(ctx, q, cache(ctx, type, depth, 1), cache(ctx, type, depth, 1), always, selected, tail, nullptr,
                        1.0f/std::sqrt((float) d), 0.0f));
            }
        }
        return out;
    });
    set(always, all(n_always));
    std::vector<int32_t> list = all(n_always);
    list.resize(n_skip, -1);
    set(skip, list);
    set(plan, { (int32_t) depth });
    const std::vector<float> values(n_head_kv, 1e-3f);
    ggml_backend_tensor_set(least, values.data(), 0, n_head_kv*sizeof(float));

    const double us = time_of(g.graph)/n_layer*1e6;
    const auto [n_selected_cells, n_again] = total(counts);
    const double first_bytes = 4*format.n_first;
    const double scanned = first_bytes*n_head_kv*depth + (ggml_sketch_cell_bytes(&format) - first_bytes)*n_again/n_layer;
    const double attended = 2.0*ggml_row_size(type, d)*(n_head_kv*n_always + n_selected_cells/n_layer);
    char note[64];
    snprintf(note, sizeof(note), "%.0f cells a head selected, %.1f %% looked at again", n_selected_cells/n_layer/n_head_kv,
            100*n_again/n_layer/n_head_kv/depth);
    return { us, scanned + (attend ? attended : 0), note };
}

} // namespace

int main(int argc, char ** argv) {
    ggml_backend_load_all();
    ggml_backend_dev_t dev = argc > 1 ? ggml_backend_dev_by_name(argv[1]) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (!dev) {
        fprintf(stderr, "There is no %s. Devices:", argc > 1 ? argv[1] : "GPU");
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
        }
        fprintf(stderr, "\n");
        return 1;
    }
    only = argc > 2 ? argv[2] : "";
    backend = ggml_backend_dev_init(dev, nullptr);
    const bool gpu = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU;
    const double bandwidth = copy_bandwidth();
    setvbuf(stdout, nullptr, _IOLBF, 0);
    printf("%s; copy %.0f GB/s; %lld heads, %lld KV heads of %lld\n\n", ggml_backend_dev_description(dev), bandwidth/1e9,
            (long long) n_head, (long long) n_head_kv, (long long) d);
    printf("%-34s %8s %5s %5s %10s %10s %8s %8s\n", "one layer", "depth", "batch", "KV", "us", "MB", "GB/s", "of copy");
    const std::vector<int64_t> depths = gpu ? std::vector<int64_t> { 8192, 32768, 131072 } : std::vector<int64_t> { 4096 };
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t depth : depths) {
            for (int64_t batch : { 1, 4 }) {
                if (depth*batch <= 4*32768) {
                    row("fast step, frozen, 2308 cells", depth, batch, type, bandwidth, [&] { return frozen_step(type, depth, batch); });
                }
            }
        }
        for (int64_t depth : depths) {
            row("flash attention (stock)",       depth, 1, type, bandwidth, [&] { return dense_step(type, depth, dense::stock); });
            row("dense step",                    depth, 1, type, bandwidth, [&] { return dense_step(type, depth, dense::ours); });
            row("slow step: evidence, selection", depth, 1, type, bandwidth, [&] { return dense_step(type, depth, dense::slow); });
        }
    }
    for (int64_t depth : depths) {
        row("sketch scan, one look",          depth, 1, GGML_TYPE_F16, bandwidth, [&] { return sketch_step(GGML_TYPE_F16, depth, one_look,  false); });
        row("sketch scan, two looks",         depth, 1, GGML_TYPE_F16, bandwidth, [&] { return sketch_step(GGML_TYPE_F16, depth, two_looks, false); });
        row("fast step, sketch, two looks",   depth, 1, GGML_TYPE_F16, bandwidth, [&] { return sketch_step(GGML_TYPE_F16, depth, two_looks, true);  });
    }
    ggml_backend_free(backend);
    return 0;
}
