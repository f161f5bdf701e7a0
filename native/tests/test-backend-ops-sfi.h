// Cases of test-backend-ops for the operations of ggml-sfi.h. Included by tests/test-backend-ops.cpp after its own
// cases: it uses that file's test_case, init_tensor_uniform, tensor_to_float, jdst and VARS_TO_STR.
//
// test-backend-ops compares a backend with the CPU's reference implementation. Where the backend is the CPU itself
// (test-backend-ops -b CPU; without -b it is skipped and "passes") that compares the vector kernels with the scalar
// ones, and would never see an error they share. So each case also computes what it expects, in double, from the
// tensors it was given, and both results must agree with that.

#pragma once

#include "ggml-sfi.h"

struct test_sfi : public test_case {
    ggml_tensor * out = nullptr;
    std::mt19937  gen;

    // the result, in the order of its elements
    virtual std::vector<float> expected() = 0;

    virtual double distance(const float * a, const float * b, size_t n) {
        double diff = 0.0, size = 1e-30; // like nmse(), but two results of zeros agree
        for (size_t i = 0; i < n; i++) {
            diff += ((double) a[i] - b[i])*((double) a[i] - b[i]);
            size += (double) b[i]*b[i];
        }
        return diff/size;
    }

    double max_nmse_err() override {
        return 1e-6;
    }

    double err(const float * a, const float * b, size_t n) override {
        if (!is_result(a, n)) {
            return nmse(a, b, n); // a sentinel
        }
        const std::vector<float> e = expected();
        return std::max(distance(a, e.data(), n), distance(b, e.data(), n));
    }

    // err() is called for the sentinels as well, which are computed (that is, left alone) after the operation
    bool is_result(const float * a, size_t n) {
        const std::vector<float> data = tensor_to_float(out);
        return n == data.size() && std::equal(a, a + n, data.begin());
    }

    ggml_tensor * named(ggml_tensor * t, const char * name) {
        ggml_set_name(t, name);
        return t;
    }

    std::string op_desc(ggml_tensor * t) override {
        return ggml_sfi_op_desc(t);
    }

    ggml_tensor * result(ggml_tensor * t) {
        out = named(t, "out");
        return t;
    }

    // K or V: [n_embd, n_cells, n_head_kv, n_stream] as it lies in llama.cpp's cache, or contiguous
    ggml_tensor * cache(ggml_context * ctx, ggml_type type, int64_t n_embd, int64_t n_cells, int64_t n_head_kv, int64_t n_stream, bool view) {
        if (!view) {
            return ggml_new_tensor_4d(ctx, type, n_embd, n_cells, n_head_kv, n_stream);
        }
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, n_embd*n_head_kv, n_cells + 7, n_stream);
        const size_t row = ggml_row_size(type, n_embd);
        t = ggml_view_4d(ctx, t, n_embd, n_head_kv, n_cells, n_stream, row, t->nb[1], t->nb[2], 0);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    }

    virtual void init_list(ggml_tensor * t) = 0; // of type I32

    void initialize_tensors(ggml_context * ctx) override {
        gen.seed(2603);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src || t->op != GGML_OP_NONE) {
                continue;
            }
            if (t->type == GGML_TYPE_I32) {
                init_list(t);
            } else {
                init_tensor_uniform(t);
            }
        }
    }

    // n cells of [first, last), each at most once, about one in eight replaced by a pad
    std::vector<int32_t> random_cells(int64_t n, int64_t first, int64_t last, bool pads = true) {
        std::vector<int32_t> cells(last - first);
        for (size_t i = 0; i < cells.size(); i++) {
            cells[i] = first + i;
        }
        std::shuffle(cells.begin(), cells.end(), gen);
        cells.resize(n, -1);
        for (auto & cell : cells) {
            if (pads && gen() % 8 == 0) {
                cell = -1;
            }
        }
        return cells;
    }

    void set(ggml_tensor * t, const std::vector<int32_t> & data) {
        GGML_ASSERT(data.size() == (size_t) ggml_nelements(t));
        ggml_backend_tensor_set(t, data.data(), 0, data.size()*sizeof(int32_t));
    }

    static std::vector<int32_t> get(const ggml_tensor * t) {
        std::vector<int32_t> data(t ? ggml_nelements(t) : 0);
        if (t) {
            ggml_backend_tensor_get(t, data.data(), 0, data.size()*sizeof(int32_t));
        }
        return data;
    }

    static double logit(const float * q, const float * k, int64_t n, double scale, double softcap) {
        double sum = 0.0;
        for (int64_t i = 0; i < n; i++) {
            sum += (double) q[i]*k[i];
        }
        return softcap > 0.0 ? softcap*tanh(scale*sum/softcap) : scale*sum;
    }
};

// SPARSE_ATTN
struct test_sparse_attn : public test_sfi {
    const ggml_type type_K;
    const ggml_type type_V;
    const int64_t hsk;        // K head size
    const int64_t hsv;        // V head size
    const int64_t nh_kv;      // num KV heads
    const int64_t nr;         // query heads of a KV head
    const int64_t n_always;   // -1: NULL
    const int64_t n_selected; // -1: NULL
    const int64_t nb;         // tokens
    const int64_t ns;         // num streams
    const bool per_token;     // own lists for each token
    const bool tail;
    const bool sinks;
    const float logit_softcap;
    const bool view;          // K and V as views of a cache
    const bool visible;       // each token sees another length of `always`

    ggml_tensor * t[8] = {};  // q, k, v, always, selected, tail, sinks, visible
    std::vector<float> expected_mass; // by expected(), of all tokens

    std::string vars() override {
        return VARS_TO_STR16(type_K, type_V, hsk, hsv, nh_kv, nr, n_always, n_selected, nb, ns, per_token, tail, sinks, logit_softcap, view, visible);
    }

    test_sparse_attn(int64_t n_always = 36, int64_t n_selected = 128, int64_t hsk = 64, int64_t hsv = 64, int64_t nh_kv = 2, int64_t nr = 4,
            ggml_type type_K = GGML_TYPE_F16, ggml_type type_V = GGML_TYPE_F16, int64_t nb = 1, int64_t ns = 1, bool per_token = false,
            bool tail = false, bool sinks = false, float logit_softcap = 0.0f, bool view = true, bool visible = false)
        : type_K(type_K), type_V(type_V), hsk(hsk), hsv(hsv), nh_kv(nh_kv), nr(nr), n_always(n_always), n_selected(n_selected), nb(nb), ns(ns),
          per_token(per_token), tail(tail), sinks(sinks), logit_softcap(logit_softcap), view(view), visible(visible) {}

    int64_t n_seen(int64_t token) const { return visible ? n_always*(token + 1)/(nb + 1) : n_always; }
    int64_t n_cells() const { return std::max<int64_t>(n_always, 0) + std::max<int64_t>(n_selected, 0) + 50; }
    int64_t n_lists() const { return per_token ? nb : 1; }
    float   scale()   const { return 1.0f/sqrtf(hsk); }

    uint64_t op_flops(ggml_tensor * out) override {
        GGML_UNUSED(out);
        return 2*nh_kv*nr*nb*ns*(hsk + hsv)*(std::max<int64_t>(n_always, 0) + std::max<int64_t>(n_selected, 0));
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t nh = nh_kv*nr;
        t[0] = ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh, nb, ns), 0, 2, 1, 3);
        t[1] = cache(ctx, type_K, hsk, n_cells(), nh_kv, ns, view);
        t[2] = cache(ctx, type_V, hsv, n_cells(), nh_kv, ns, view);
        t[3] = n_always   < 0 ? nullptr : named(ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_always, n_lists(), 1, ns), "always");
        t[4] = n_selected < 0 ? nullptr : named(ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_selected, nh_kv, n_lists(), ns), "selected");
        t[5] = tail  ? ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsv + 1, nh, nb, ns) : nullptr;
        t[6] = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh) : nullptr;
        ggml_tensor * attn = ggml_sparse_attn(ctx, t[0], t[1], t[2], t[3], t[4], t[5], t[6], scale(), logit_softcap);
        if (visible) {
            t[7] = named(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, nb, ns), "visible");
            ggml_sparse_attn_set_visible(attn, t[7]);
        }
        return result(attn);
    }

    // the first n_always cells are for `always`, the others for `selected`
    void init_list(ggml_tensor * list) override {
        const bool    shared = strcmp(list->name, "always") == 0;
        const int64_t split  = std::max<int64_t>(n_always, 0);
        std::vector<int32_t> data;
        if (strcmp(list->name, "visible") == 0) {
            for (int64_t i = 0; i < nb*ns; i++) {
                data.push_back((int32_t) n_seen(i % nb));
            }
            set(list, data);
            return;
        }
        for (int64_t r = 0; r < ggml_nrows(list); r++) {
            const auto cells = random_cells(list->ne[0], shared ? 0 : split, shared ? split : n_cells());
            data.insert(data.end(), cells.begin(), cells.end());
        }
        set(list, data);
    }

    std::vector<float> expected() override {
        const int64_t nh = nh_kv*nr;
        const auto q = tensor_to_float(t[0]), k = tensor_to_float(t[1]), v = tensor_to_float(t[2]);
        const auto tl = t[5] ? tensor_to_float(t[5]) : std::vector<float>(), sk = t[6] ? tensor_to_float(t[6]) : std::vector<float>();
        const auto always = get(t[3]), selected = get(t[4]);

        std::vector<float> res;
        expected_mass.clear();
        for (int64_t s = 0; s < ns; s++) {
            for (int64_t b = 0; b < nb; b++) {
                for (int64_t h = 0; h < nh; h++) {
                    const int64_t l = s*n_lists() + (per_token ? b : 0), kv = h/nr;
                    std::vector<int32_t> cells;
                    const auto add = [&cells](const std::vector<int32_t> & lists, int64_t row, int64_t row_size, int64_t n) {
                        cells.insert(cells.end(), lists.begin() + row*row_size, lists.begin() + row*row_size + n);
                    };
                    if (t[3]) { add(always,   l,            n_always,   n_seen(b)); }
                    if (t[4]) { add(selected, l*nh_kv + kv, n_selected, n_selected); }

                    // logits are small here: no maximum needed
                    std::vector<double> o(hsv, 0.0);
                    double sum = t[6] ? exp(sk[h]) : 0.0, of_tail = 0.0;
                    for (const int32_t cell : cells) {
                        if (cell < 0) {
                            continue;
                        }
                        const double w = exp(logit(&q[((s*nh + h)*nb + b)*hsk], &k[((s*nh_kv + kv)*n_cells() + cell)*hsk], hsk, scale(), logit_softcap));
                        sum += w;
                        for (int64_t i = 0; i < hsv; i++) {
                            o[i] += w*v[((s*nh_kv + kv)*n_cells() + cell)*hsv + i];
                        }
                    }
                    if (t[5]) {
                        const float * row = &tl[((s*nb + b)*nh + h)*(hsv + 1)];
                        of_tail = exp(row[hsv]);
                        sum += of_tail;
                        for (int64_t i = 0; i < hsv; i++) {
                            o[i] += of_tail*row[i];
                        }
                    }
                    for (int64_t i = 0; i < hsv; i++) {
                        res.push_back(sum > 0.0 ? o[i]/sum : 0.0);
                    }
                    expected_mass.push_back(log(sum));
                    expected_mass.push_back(of_tail/sum);
                }
            }
        }
        return res;
    }
};

// SPARSE_ATTN of many tokens at once
struct test_sparse_attn_blocks : public test_sparse_attn {
    const float least; // so small that every tile has it: which are wanted, an estimate decides, and what it is may differ by path

    std::string vars() override {
        return test_sparse_attn::vars() + ",blocks=1,least=" + std::to_string(least);
    }

    test_sparse_attn_blocks(int64_t n_cells, int64_t nb, int64_t hsk = 64, int64_t hsv = 64, int64_t nr = 3, ggml_type type_K = GGML_TYPE_F16,
            ggml_type type_V = GGML_TYPE_F16, int64_t ns = 1, bool sinks = false, float logit_softcap = 0.0f, float least = 0.0f)
        : test_sparse_attn(n_cells, -1, hsk, hsv, 2, nr, type_K, type_V, nb, ns, false, false, sinks, logit_softcap, true, true), least(least) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * attn = test_sparse_attn::build_graph(ctx);
        ggml_sparse_attn_set_blocks(attn);
        ggml_sparse_attn_skip_tiles(attn, least);
        return attn;
    }
};

// SPARSE_ATTN that says where the attention went, which no backend's result shows
struct test_sparse_attn_mass : public test_sparse_attn {
    ggml_tensor * mass = nullptr;

    std::string vars() override {
        return test_sparse_attn::vars() + ",mass=1";
    }

    test_sparse_attn_mass(int64_t n_always, int64_t n_selected, int64_t nr, bool tail, bool sinks)
        : test_sparse_attn(n_always, n_selected, 64, 64, 2, nr, GGML_TYPE_F16, GGML_TYPE_F16, 1, 1, false, tail, sinks) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * attn = test_sparse_attn::build_graph(ctx);
        mass = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 2, nh_kv*nr);
        ggml_sparse_attn_set_mass(attn, mass);
        return attn;
    }

    double err(const float * a, const float * b, size_t n) override {
        const double of_result = test_sparse_attn::err(a, b, n);
        if (!is_result(a, n)) {
            return of_result;
        }
        const auto written = tensor_to_float(mass);
        return std::max(of_result, distance(written.data(), expected_mass.data(), written.size()));
    }
};

// A list of the cells of one sequence and a plan over it: what evidence, selection and stability share.
struct test_support : public test_sfi {
    const int64_t n_list;
    const int64_t n_queries;
    const bool    pads;

    ggml_tensor * cells = nullptr, * plan = nullptr;

    test_support(int64_t n_list, int64_t n_queries, bool pads) : n_list(n_list), n_queries(n_queries), pads(pads) {}

    int64_t n_cells() const { return n_list + 20; }
    int64_t j0()      const { return std::min<int64_t>(4, n_list); }
    int64_t j1()      const { return std::max<int64_t>(j0(), n_list - 16); }

    void new_list(ggml_context * ctx) {
        cells = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_list), "cells");
        plan  = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2 + n_queries), "plan");
    }

    void init_list(ggml_tensor * t) override {
        if (t == cells) {
            set(t, random_cells(n_list, 0, n_cells(), pads));
        } else if (t == plan) {
            std::vector<int32_t> data = { (int32_t) j0(), (int32_t) j1() };
            for (int64_t i = 0; i < n_queries; i++) {
                data.push_back(i % 5 == 4 ? 0 : std::max<int64_t>(1, n_list - i)); // every fifth is not used
            }
            set(t, data);
        } else { // a set of cells per KV head
            std::vector<int32_t> data;
            for (int64_t r = 0; r < ggml_nrows(t); r++) {
                const auto row = random_cells(t->ne[0], 0, n_cells());
                data.insert(data.end(), row.begin(), row.end());
            }
            set(t, data);
        }
    }
};

// SUPPORT_EVIDENCE
struct test_support_evidence : public test_support {
    const ggml_type type_K;
    const int64_t hsk;   // K head size
    const int64_t nh_kv; // num KV heads
    const int64_t nr;    // query heads of a KV head
    const float alpha;
    const float logit_softcap;
    const bool candidates; // softmax over the candidates only
    const bool view;

    ggml_tensor * q = nullptr, * k = nullptr;

    std::string vars() override {
        return VARS_TO_STR11(type_K, hsk, nh_kv, nr, n_list, n_queries, alpha, logit_softcap, candidates, pads, view);
    }

    test_support_evidence(int64_t n_list = 300, int64_t n_queries = 16, int64_t hsk = 64, int64_t nh_kv = 2, int64_t nr = 4,
            ggml_type type_K = GGML_TYPE_F16, float alpha = 1.0f, bool candidates = false, float logit_softcap = 0.0f, bool pads = false, bool view = true)
        : test_support(n_list, n_queries, pads), type_K(type_K), hsk(hsk), nh_kv(nh_kv), nr(nr), alpha(alpha), logit_softcap(logit_softcap),
          candidates(candidates), view(view) {}

    float scale() const { return 1.0f/sqrtf(hsk); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh_kv*nr, n_queries);
        k = cache(ctx, type_K, hsk, n_cells(), nh_kv, 1, view);
        new_list(ctx);
        return result(ggml_support_evidence(ctx, q, k, cells, plan, scale(), logit_softcap, alpha,
            candidates ? GGML_SUPPORT_SOFTMAX_CANDIDATES : GGML_SUPPORT_SOFTMAX_VISIBLE));
    }

    std::vector<float> expected() override {
        const auto qf = tensor_to_float(q), kf = tensor_to_float(k);
        const auto list = get(cells), pl = get(plan);
        const int64_t first = candidates ? j0() : 0, last = candidates ? j1() : n_list;

        std::vector<float> res(n_list*nh_kv, 0.0f);
        for (int64_t kv = 0; kv < nh_kv; kv++) {
            std::vector<double> sum(n_list, 0.0);
            int64_t n_rows = 0;
            for (int64_t r = 0; r < n_queries*nr; r++) {
                const int64_t i = r/nr, h = kv*nr + r % nr;
                n_rows += pl[2 + i] > 0;
                std::vector<double> w(n_list, 0.0);
                double total = 0.0;
                for (int64_t j = first; j < std::min<int64_t>(last, pl[2 + i]); j++) {
                    if (list[j] >= 0) {
                        w[j] = exp(logit(&qf[(i*nh_kv*nr + h)*hsk], &kf[(kv*n_cells() + list[j])*hsk], hsk, scale(), logit_softcap));
                        total += w[j];
                    }
                }
                for (int64_t j = j0(); j < j1(); j++) {
                    sum[j] += w[j] > 0.0 ? pow(w[j]/total, alpha) : 0.0;
                }
            }
            for (int64_t j = 0; j < n_list && n_rows > 0; j++) {
                res[kv*n_list + j] = sum[j]/n_rows;
            }
        }
        return res;
    }
};

// SPARSE_ATTN that makes evidence on the way
struct test_sparse_attn_evidence : public test_support {
    const ggml_type type_K;
    const ggml_type type_V;
    const int64_t hsk;   // K head size
    const int64_t hsv;   // V head size
    const int64_t nh_kv; // num KV heads
    const int64_t nr;    // query heads of a KV head
    const bool sinks;
    const float logit_softcap;

    ggml_tensor * q = nullptr, * k = nullptr, * v = nullptr, * s = nullptr;

    std::string vars() override {
        return VARS_TO_STR10(type_K, type_V, hsk, hsv, nh_kv, nr, n_list, sinks, logit_softcap, pads);
    }

    test_sparse_attn_evidence(int64_t n_list = 300, int64_t hsk = 64, int64_t hsv = 64, int64_t nh_kv = 2,
            int64_t nr = 4, ggml_type type_K = GGML_TYPE_F16, ggml_type type_V = GGML_TYPE_F16, bool sinks = false,
            float logit_softcap = 0.0f, bool pads = false)
        : test_support(n_list, 0, pads), type_K(type_K), type_V(type_V), hsk(hsk), hsv(hsv), nh_kv(nh_kv), nr(nr),
          sinks(sinks), logit_softcap(logit_softcap) {}

    float scale() const { return 1.0f/sqrtf(hsk); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        q = ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh_kv*nr, 1, 1), 0, 2, 1, 3);
        k = cache(ctx, type_K, hsk, n_cells(), nh_kv, 1, true);
        v = cache(ctx, type_V, hsv, n_cells(), nh_kv, 1, true);
        s = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh_kv*nr) : nullptr;
        new_list(ctx);
        return result(ggml_sparse_attn_evidence(ctx, q, k, v, cells, s, plan, scale(), logit_softcap));
    }

    // evidence counts by itself: it is far smaller than the attention before it
    double distance(const float * a, const float * b, size_t n) override {
        const size_t split = hsv*nh_kv*nr;
        return std::max(test_sfi::distance(a, b, split), test_sfi::distance(a + split, b + split, n - split));
    }

    std::vector<float> expected() override {
        const auto qf = tensor_to_float(q), kf = tensor_to_float(k), vf = tensor_to_float(v);
        const auto sf = s ? tensor_to_float(s) : std::vector<float>();
        const auto list = get(cells);
        const int64_t nh = nh_kv*nr;

        std::vector<float>  res(hsv*nh + n_list*nh_kv, 0.0f);
        std::vector<double> evidence(n_list*nh_kv, 0.0);
        for (int64_t h = 0; h < nh; h++) {
            std::vector<double> w(n_list, 0.0);
            double total = 0.0;
            for (int64_t j = 0; j < n_list; j++) {
                if (list[j] >= 0) {
                    w[j] = exp(logit(qf.data() + h*hsk, kf.data() + (h/nr*n_cells() + list[j])*hsk, hsk, scale(), logit_softcap));
                    total += w[j];
                }
            }
            for (int64_t j = j0(); j < j1() && total > 0.0; j++) {
                evidence[h/nr*n_list + j] += w[j]/total/nr;
            }
            const double all = total + (s ? exp(sf[h]) : 0.0);
            for (int64_t j = 0; j < n_list && total > 0.0; j++) {
                for (int64_t d = 0; d < hsv && list[j] >= 0; d++) {
                    res[h*hsv + d] += w[j]/all*vf[(h/nr*n_cells() + list[j])*hsv + d];
                }
            }
        }
        std::copy(evidence.begin(), evidence.end(), res.begin() + hsv*nh);
        return res;
    }
};

// SUPPORT_SELECT
struct test_support_select : public test_support {
    const int64_t n_selected;
    const int64_t nh_kv;
    const int32_t pool_after;
    const int32_t pool_before;
    const bool ties;  // evidence takes few values
    const bool paper; // no expected result here: the backends need to agree but for near ties
    const ggml_type type_K; // paper
    const float alpha;

    ggml_tensor * evidence = nullptr, * k = nullptr;

    std::string vars() override {
        return VARS_TO_STR10(n_list, n_selected, nh_kv, pool_after, pool_before, ties, paper, pads, type_K, alpha);
    }

    test_support_select(int64_t n_list = 300, int64_t n_selected = 64, int64_t nh_kv = 2, int32_t pool_after = 0, int32_t pool_before = 0,
            bool ties = false, bool paper = false, bool pads = false, ggml_type type_K = GGML_TYPE_F16, float alpha = 0.5f)
        : test_support(n_list, 1, pads), n_selected(n_selected), nh_kv(nh_kv), pool_after(pool_after), pool_before(pool_before), ties(ties),
          paper(paper), type_K(type_K), alpha(alpha) {}

    double max_nmse_err() override {
        return paper ? 0.02 : 0.0; // the part of the cells that may differ
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        evidence = named(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_list, nh_kv), "evidence");
        new_list(ctx);
        ggml_support_selector sel = {};
        sel.kind        = paper ? GGML_SUPPORT_SELECTOR_PAPER : GGML_SUPPORT_SELECTOR_TOPK;
        sel.pool_after  = pool_after;
        sel.pool_before = pool_before;
        if (paper) {
            k = cache(ctx, type_K, 64, n_cells(), nh_kv, 1, true);
            sel.nms_radius  = 16;
            sel.alpha       = alpha;
            sel.gamma       = 0.5f;
            sel.beta        = 0.568f;
            sel.p           = 1.8f;
            sel.eta         = 0.4f;
            sel.lambda_clip = 0.3f;
            sel.a_soft      = 1.0f;
            sel.a_cross     = 0.85f;
            sel.temperature = 2.0f;
        }
        return result(ggml_support_select(ctx, evidence, cells, plan, k, n_selected, &sel));
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_sfi::initialize_tensors(ctx);
        auto e = tensor_to_float(evidence);
        const auto list = get(cells);
        for (size_t i = 0; i < e.size(); i++) {
            e[i] = list[i % n_list] < 0 ? 0.0f : ties ? (float) (int) (4*fabsf(e[i])) : fabsf(e[i]);
        }
        ggml_backend_tensor_set(evidence, e.data(), 0, e.size()*sizeof(float));
    }

    // sets, one KV head at a time; cell numbers are exact in float
    double distance(const float * a, const float * b, size_t n) override {
        double diff = 0.0;
        for (size_t i = 0; i < n; i += n_selected) {
            diff = std::max(diff, jdst(a + i, b + i, n_selected));
        }
        return diff;
    }

    // what no selection may be: cells that are no candidates, cells twice, fewer than there are
    bool valid(const float * a) {
        const auto list = get(cells);
        const std::set<int32_t> all(list.begin() + j0(), list.begin() + j1());
        const size_t n_valid = all.size() - all.count(-1);
        for (int64_t h = 0; h < nh_kv; h++) {
            std::set<int32_t> seen;
            for (int64_t i = 0; i < n_selected; i++) {
                const int32_t cell = a[h*n_selected + i];
                if (cell != -1 && (!all.count(cell) || !seen.insert(cell).second)) {
                    return false;
                }
            }
            if (seen.size() != std::min<size_t>(n_selected, n_valid)) {
                return false;
            }
        }
        return true;
    }

    double err(const float * a, const float * b, size_t n) override {
        if (!is_result(a, n)) {
            return nmse(a, b, n);
        }
        if (!valid(a) || !valid(b)) {
            return 1.0;
        }
        return paper ? distance(a, b, n) : test_sfi::err(a, b, n);
    }

    std::vector<float> expected() override {
        const auto e = tensor_to_float(evidence);
        const auto list = get(cells);
        std::vector<float> res;
        for (int64_t h = 0; h < nh_kv; h++) {
            std::vector<std::pair<float, int64_t>> ranked; // (-score, position): the earlier of two equals comes first
            for (int64_t j = j0(); j < j1(); j++) {
                float score = 0.0f;
                for (int64_t i = std::max<int64_t>(j0(), j - pool_after); i <= std::min<int64_t>(j1() - 1, j + pool_before); i++) {
                    score = std::max(score, e[h*n_list + i]);
                }
                if (list[j] >= 0) {
                    ranked.emplace_back(-score, j);
                }
            }
            std::sort(ranked.begin(), ranked.end());
            for (int64_t i = 0; i < n_selected; i++) {
                res.push_back(i < (int64_t) ranked.size() ? list[ranked[i].second] : -1);
            }
        }
        return res;
    }
};

// SUPPORT_STABILITY
struct test_support_stability : public test_support {
    const int64_t n_selected;
    const int64_t nh_kv;

    ggml_tensor * evidence = nullptr, * selected = nullptr, * previous = nullptr;

    std::string vars() override {
        return VARS_TO_STR4(n_list, n_selected, nh_kv, pads);
    }

    test_support_stability(int64_t n_list = 300, int64_t n_selected = 64, int64_t nh_kv = 2, bool pads = false)
        : test_support(n_list, 1, pads), n_selected(n_selected), nh_kv(nh_kv) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        evidence = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_list, nh_kv);
        new_list(ctx);
        selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_selected, nh_kv);
        previous = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_selected, nh_kv);
        return result(ggml_support_stability(ctx, evidence, cells, plan, selected, previous));
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_sfi::initialize_tensors(ctx);
        auto e = tensor_to_float(evidence);
        const auto list = get(cells);
        for (size_t i = 0; i < e.size(); i++) {
            e[i] = list[i % n_list] < 0 ? 0.0f : fabsf(e[i]);
        }
        ggml_backend_tensor_set(evidence, e.data(), 0, e.size()*sizeof(float));
    }

    std::vector<float> expected() override {
        const auto e = tensor_to_float(evidence);
        const auto list = get(cells), sel = get(selected), prev = get(previous);
        std::vector<float> res;
        for (int64_t h = 0; h < nh_kv; h++) {
            std::set<int32_t> now(&sel[h*n_selected], &sel[h*n_selected] + n_selected), before(&prev[h*n_selected], &prev[h*n_selected] + n_selected);
            now.erase(-1);
            before.erase(-1);
            double mass[3] = { 0.0, 0.0, 0.0 };
            for (int64_t j = j0(); j < j1(); j++) {
                const double x = list[j] < 0 ? 0.0 : e[h*n_list + j];
                mass[0] += x;
                mass[1] += now.count(list[j])    ? x : 0.0;
                mass[2] += before.count(list[j]) ? x : 0.0;
            }
            size_t common = 0;
            for (const int32_t cell : now) {
                common += before.count(cell);
            }
            const size_t all = now.size() + before.size() - common;
            for (const double x : { mass[0], mass[1], mass[2], all > 0 ? (double) common/all : 1.0 }) {
                res.push_back(x);
            }
        }
        return res;
    }
};

// What the sketch operations share: random bases, codes of random bytes, and where a code lies, by the words of ggml-sfi.h.
struct test_sketch : public test_sfi {
    const std::array<int32_t, 6> form; // n_k4, n_k2, n_k1, n_v4, n_v2, n_first
    const int64_t nh_kv;               // num KV heads
    const int64_t nr;                  // query heads of a KV head
    const int64_t hs;                  // K and V head size
    const int64_t n_list;

    ggml_tensor * codes = nullptr, * basis = nullptr;

    test_sketch(std::array<int32_t, 6> form, int64_t nh_kv, int64_t nr, int64_t hs, int64_t n_list)
        : form(form), nh_kv(nh_kv), nr(nr), hs(hs), n_list(n_list) {}

    ggml_sketch_format format() const { return { form[0], form[1], form[2], form[3], form[4], form[5] }; }
    int64_t n_k()         const { return form[0] + form[1] + form[2]; }
    int64_t n_v()         const { return form[3] + form[4]; }
    int     bits_k(int j) const { return j < form[0] ? 4 : j < form[0] + form[1] ? 2 : 1; }
    int     bits_v(int j) const { return j < form[3] ? 4 : 2; }

    void new_sketch(ggml_context * ctx) {
        const auto f = format();
        codes = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, 16*ggml_sketch_cell_bytes(&f), (n_list + 15)/16 + 1, nh_kv);
        basis = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_sketch_basis_size(&f, hs, hs), nh_kv);
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_sfi::initialize_tensors(ctx);
        if (codes) {
            std::vector<uint8_t> bytes(ggml_nbytes(codes));
            for (auto & byte : bytes) {
                byte = (uint8_t) gen();
            }
            ggml_backend_tensor_set(codes, bytes.data(), 0, bytes.size());
            for (int64_t h = 0; h < nh_kv; h++) {
                draw_dec(h, false);
                draw_dec(h, true);
            }
        }
    }

    // any floats do for the other parts of a basis
    void draw_dec(int64_t h, bool of_v) {
        std::vector<ggml_fp16_t> values(hs*(of_v ? n_v() : n_k()));
        for (auto & x : values) {
            x = ggml_fp32_to_fp16((float) (gen() % 2001)/1000.0f - 1.0f);
        }
        ggml_backend_tensor_set(basis, values.data(), (h*basis->ne[0] + dec_begin(of_v))*sizeof(float), values.size()*sizeof(ggml_fp16_t));
    }

    // component j of a cell in the bytes of its KV head
    int code(const uint8_t * head, bool of_v, int j, int64_t cell) const {
        const int per_byte_group = of_v ? 16 : 4;
        int bit = 0, plane = 0; // before this component: bits of every byte, and planes
        for (int i = 0; of_v && i < n_k(); i += 4) {
            plane += bits_k(i);
        }
        plane /= 8;
        for (int i = 0; i + per_byte_group <= j; i += per_byte_group) {
            bit += of_v ? 4*bits_v(i) : bits_k(i);
        }
        const int bits = of_v ? bits_v(j) : bits_k(j), i = (int) (cell % 16);
        const auto f = format();
        if (of_v || bit/8 >= form[5]) { // in the cell's record
            const int64_t record_bytes = ggml_sketch_cell_bytes(&f) - 4*form[5];
            const uint8_t * record = head + 64*form[5]*codes->ne[1] + record_bytes*cell;
            const int at = of_v ? 32*(plane - form[5]) + 4*bit + bits*(j % 16) : 32*(bit/8 - form[5]) + 8*(j % 4) + bit % 8;
            return record[at/8] >> at % 8 & ((1 << bits) - 1);
        }
        return head[cell/16*64*form[5] + 64*(bit/8) + 4*i + j % 4] >> bit % 8 & ((1 << bits) - 1);
    }

    std::vector<uint8_t> bytes_of(const ggml_tensor * t) const {
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
        return bytes;
    }

    // the parts of a KV head's basis: where they begin, in floats
    int64_t mean_begin(bool of_v) const { return of_v ? hs*(1 + n_k() + n_k()/2) : 0; }
    int64_t dec_begin (bool of_v) const { return mean_begin(of_v) + hs*(1 + (of_v ? n_v() : n_k())); }

    const float * mean(const std::vector<float> & b, int64_t h, bool of_v) const { return b.data() + h*basis->ne[0] + mean_begin(of_v); }
    const float * enc (const std::vector<float> & b, int64_t h, bool of_v, int j) const { return mean(b, h, of_v) + hs*(1 + j); }
    float         dec (const std::vector<float> & b, int64_t h, bool of_v, int j, int64_t i) const {
        return ggml_fp16_to_fp32(((const ggml_fp16_t *) (b.data() + h*basis->ne[0] + dec_begin(of_v)))[j*hs + i]);
    }

    // infinities at the same places are equal
    double distance(const float * a, const float * b, size_t n) override {
        double diff = 0.0, size = 1e-30;
        for (size_t i = 0; i < n; i++) {
            if (std::isnan(b[i])) { // nobody knows to the cell what is looked at again
                continue;
            }
            if (a[i] != b[i]) {
                diff += ((double) a[i] - b[i])*((double) a[i] - b[i]);
            }
            size += std::isfinite(b[i]) ? (double) b[i]*b[i] : 0.0;
        }
        return diff/size;
    }
};

// SKETCH_ENCODE
struct test_sketch_encode : public test_sketch {
    const int64_t n_listed;
    const ggml_type type_K;
    const ggml_type type_V;
    const bool view;

    ggml_tensor * k = nullptr, * v = nullptr, * cells = nullptr;
    std::vector<uint8_t> before;

    std::string vars() override {
        return VARS_TO_STR8(form, nh_kv, hs, n_list, n_listed, type_K, type_V, view);
    }

    test_sketch_encode(std::array<int32_t, 6> form = { 16, 0, 0, 16, 0, 2 }, int64_t n_listed = 50, int64_t hs = 64, ggml_type type_K = GGML_TYPE_F16,
            ggml_type type_V = GGML_TYPE_F16, int64_t nh_kv = 2, bool view = true)
        : test_sketch(form, nh_kv, 1, hs, 100), n_listed(n_listed), type_K(type_K), type_V(type_V), view(view) {}

    double max_nmse_err() override {
        return 0.0; // codes that are wrong
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        new_sketch(ctx);
        k = cache(ctx, type_K, hs, n_list, nh_kv, 1, view);
        v = cache(ctx, type_V, hs, n_list, nh_kv, 1, view);
        cells = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_listed), "cells");
        const auto f = format();
        return result(ggml_sketch_encode(ctx, codes, basis, k, v, cells, &f));
    }

    void init_list(ggml_tensor * t) override {
        set(t, random_cells(n_listed, 0, n_list));
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_sketch::initialize_tensors(ctx);
        before = bytes_of(codes);
    }

    std::vector<float> expected() override {
        return {};
    }

    // components that are not what they must be: next to the unrounded code if listed, else what they were
    double n_wrong(const float * a, size_t n) {
        std::vector<uint8_t> after(n);
        for (size_t i = 0; i < n; i++) {
            after[i] = (uint8_t) (int8_t) a[i];
        }
        const auto b = tensor_to_float(basis), kf = tensor_to_float(k), vf = tensor_to_float(v);
        const auto list = get(cells);
        const std::set<int32_t> listed(list.begin(), list.end());
        double wrong = 0;
        for (int64_t h = 0; h < nh_kv; h++) {
            const size_t head = h*n/nh_kv;
            for (bool of_v : { false, true }) {
                for (int64_t c = 0; c < 16*codes->ne[1]; c++) {
                    const float * x = &(of_v ? vf : kf)[(h*n_list + std::min(c, n_list - 1))*hs];
                    for (int j = 0; j < (of_v ? n_v() : n_k()); j++) {
                        const int got = code(&after[head], of_v, j, c), largest = (1 << (of_v ? bits_v(j) : bits_k(j))) - 1;
                        double exact = 0.5*largest;
                        for (int64_t i = 0; i < hs; i++) {
                            exact += (double) enc(b, h, of_v, j)[i]*(x[i] - mean(b, h, of_v)[i]);
                        }
                        exact = std::min(std::max(exact, 0.0), (double) largest);
                        wrong += listed.count((int32_t) c) ? fabs(got - exact) > 0.5 + 1e-4 : got != code(&before[head], of_v, j, c);
                    }
                }
            }
        }
        return wrong;
    }

    double err(const float * a, const float * b, size_t n) override {
        if (!is_result(a, n)) {
            return nmse(a, b, n);
        }
        return std::max(n_wrong(a, n), n_wrong(b, n));
    }
};

// SKETCH_SCAN. What is selected shows in the tail, which is all the rest; what is written as selected is looked at too.
struct test_sketch_scan : public test_sketch {
    const int64_t n_used;
    const int64_t n_skip;
    const int64_t n_selected;
    const float least;  // 0: NULL
    const float logit_softcap;
    const float second_look;
    const bool broken;  // the query of head 1 is not finite, nor is `least` of the last KV head

    ggml_tensor * q = nullptr, * skip = nullptr, * plan = nullptr, * t_least = nullptr, * selected = nullptr, * counts = nullptr;

    std::string vars() override {
        return VARS_TO_STR12(form, nh_kv, nr, hs, n_list, n_used, n_skip, n_selected, least, logit_softcap, second_look, broken);
    }

    test_sketch_scan(std::array<int32_t, 6> form = { 16, 0, 0, 16, 0, 2 }, int64_t nh_kv = 2, int64_t nr = 3, int64_t hs = 64, int64_t n_list = 1040,
            int64_t n_used = 1029, int64_t n_skip = 20, int64_t n_selected = 64, float least = 0.0f, float logit_softcap = 0.0f,
            float second_look = 0.0f, bool broken = false)
        : test_sketch(form, nh_kv, nr, hs, n_list), n_used(n_used), n_skip(n_skip), n_selected(n_selected), least(least), logit_softcap(logit_softcap),
          second_look(second_look), broken(broken) {}

    float scale() const { return 1.0f/hs; }
    bool  has_query(int64_t h) const { return !broken || h != 1; }
    float least_of(int64_t kv) const { return broken && least > 0.0f && kv == nh_kv - 1 ? NAN : least; }

    // A weight between two integers may be rounded to either, and of near ties either may be selected. On the CPU, which cells
    // are selected is tested to the cell in tests/ops/test_sketch_ops.py.
    double max_nmse_err() override {
        return n_selected < n_list && least == 0.0f ? 5e-3 : 2e-5;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        new_sketch(ctx);
        q        = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hs, nh_kv*nr);
        skip     = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_skip), "skip");
        plan     = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1), "plan");
        selected = named(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_selected, nh_kv), "selected");
        t_least  = least > 0.0f ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh_kv) : nullptr;
        counts   = named(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, nh_kv), "counts");
        const auto f = format();
        return result(ggml_sketch_scan(ctx, q, codes, basis, skip, plan, t_least, selected, counts, n_list, hs, scale(), logit_softcap, second_look, &f));
    }

    void init_list(ggml_tensor * t) override {
        if (t == selected) {
            set(t, std::vector<int32_t>(n_selected*nh_kv, 7)); // to be overwritten
        } else if (t == counts) {
            set(t, std::vector<int32_t>(2*nh_kv, -7));
        } else {
            set(t, t == plan ? std::vector<int32_t>{ (int32_t) n_used } : random_cells(n_skip, 0, n_list));
        }
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_sketch::initialize_tensors(ctx);
        for (int64_t kv = 0; kv < nh_kv && t_least; kv++) {
            const float value = least_of(kv);
            ggml_backend_tensor_set(t_least, &value, kv*sizeof(float), sizeof(float));
        }
        if (broken) {
            const float value = INFINITY;
            ggml_backend_tensor_set(q, &value, (hs + 3)*sizeof(float), sizeof(float));
        }
    }

    // w_j/s of ggml-sfi.h, before they are rounded, and s
    std::vector<double> weights(int64_t h, const std::vector<float> & b, const float * x, double & s) const {
        std::vector<double> w(n_k(), 0.0);
        s = 0.0;
        for (int j = 0; j < n_k(); j++) {
            for (int64_t i = 0; i < hs; i++) {
                w[j] += (double) x[i]*dec(b, h/nr, false, j, i);
            }
            s = std::max(s, fabs(w[j])/127);
        }
        for (double & wj : w) {
            wj /= s;
        }
        return w;
    }

    // in single precision a weight of this KV head may be rounded to another number
    bool has_doubtful_weight(int64_t kv) const {
        const auto b = tensor_to_float(basis), qf = tensor_to_float(q);
        for (int64_t h = kv*nr; h < (kv + 1)*nr; h++) {
            double s;
            for (const double w : weights(h, b, &qf[h*hs], s)) {
                if (has_query(h) && fabs(fabs(w - nearbyint(w)) - 0.5) < 2e-4) {
                    return true;
                }
            }
        }
        return false;
    }

    // Of one head, by the first look and by both; -INFINITY where a cell is left out.
    std::array<std::vector<double>, 2> logits(int64_t h) const {
        const auto b = tensor_to_float(basis), qf = tensor_to_float(q);
        const auto bytes = bytes_of(codes);
        const float * x = &qf[h*hs];
        std::array<std::vector<double>, 2> res = { std::vector<double>(n_list, -INFINITY), std::vector<double>(n_list, -INFINITY) };
        double s = 0.0, base = 0.0;
        for (int64_t i = 0; i < hs; i++) {
            base += (double) x[i]*mean(b, h/nr, false)[i];
        }
        const auto w = weights(h, b, x, s);
        for (int64_t c = 0; c < n_used && has_query(h); c++) {
            double sum[2] = { 0.0, 0.0 };
            for (int j = 0, bit = 0; j < n_k(); bit += j % 4 == 3 ? bits_k(j) : 0, j++) {
                const double x = s*nearbyint(w[j])*(code(&bytes[h/nr*bytes.size()/nh_kv], false, j, c) - 0.5*((1 << bits_k(j)) - 1));
                sum[0] += bit/8 < form[5] ? x : 0.0;
                sum[1] += x;
            }
            for (int look : { 0, 1 }) {
                const double y = scale()*(base + sum[look]);
                res[look][c] = logit_softcap > 0 ? logit_softcap*tanh(y/logit_softcap) : y;
            }
        }
        for (int32_t c : get(skip)) {
            if (c >= 0 && c < n_list) {
                res[0][c] = res[1][c] = -INFINITY;
            }
        }
        return res;
    }

    // What a KV head sees: shares of its heads, and which cells are looked at again.
    struct sight {
        std::vector<std::vector<double>> share; // [nr, n_list]
        std::vector<double>  all;               // [nr]: sums of the exponentials
        std::vector<bool>    again;             // [n_list]
        bool doubtful = false;                  // in single precision other cells may be looked at again
    };

    static double sum_of_exp(std::vector<double> & x) {
        double sum = 0.0;
        for (double & y : x) {
            y = exp(y);
            sum += y;
        }
        return sum;
    }

    sight see(int64_t kv) const {
        sight res;
        res.again.assign(n_list, false);
        std::vector<std::array<std::vector<double>, 2>> looks;
        const double edge = second_look/std::min<double>(std::max<int64_t>(n_used, 1), 8192);
        for (int64_t g = 0; g < nr; g++) {
            looks.push_back(logits(kv*nr + g));
            const double sum = sum_of_exp(looks[g][0]);
            sum_of_exp(looks[g][1]);
            for (int64_t c = 0; c < n_list && sum > 0.0; c++) {
                const double share = looks[g][0][c]/sum;
                res.again[c] = res.again[c] || (share > 0.0 && share >= edge);
                res.doubtful = res.doubtful || (edge > 0.0 && fabs(share/edge - 1.0) < 2e-4);
            }
        }
        for (int64_t g = 0; g < nr; g++) {
            std::vector<double> x(n_list);
            double all = 0.0;
            for (int64_t c = 0; c < n_list; c++) {
                x[c] = looks[g][res.again[c]][c];
                all += x[c];
            }
            for (double & y : x) {
                y = all > 0.0 ? y/all : 0.0;
            }
            res.share.push_back(x);
            res.all.push_back(all);
        }
        return res;
    }

    struct candidate {
        double  score, most; // over the heads: sum and maximum
        int64_t cell;
    };

    // the cells that may be selected, the best first
    static std::vector<candidate> ranking(const sight & s) {
        std::vector<candidate> res;
        for (int64_t c = 0; c < (int64_t) s.again.size(); c++) {
            candidate x = { 0.0, 0.0, c };
            for (const auto & row : s.share) {
                x.score += row[c];
                x.most   = std::max(x.most, row[c]);
            }
            if (s.again[c] && x.most > 0.0) {
                res.push_back(x);
            }
        }
        std::sort(res.begin(), res.end(), [](const candidate & x, const candidate & y) {
            return x.score != y.score ? x.score > y.score : x.cell < y.cell;
        });
        return res;
    }

    static std::set<int64_t> best(const sight & s, int64_t n, double least) {
        std::set<int64_t> cells;
        for (const candidate & c : ranking(s)) {
            if (c.most >= least && (int64_t) cells.size() < n) {
                cells.insert(c.cell);
            }
        }
        return cells;
    }

    // Did the backend write the best of each KV head? Shares and scores may be off by 1e-4 of themselves, so those of cells at
    // the edge by twice that.
    bool wrote_the_best() const {
        const auto written = get(selected), counted = get(counts);
        for (int64_t kv = 0; kv < nh_kv; kv++) {
            const sight s = see(kv);
            if (has_doubtful_weight(kv) || s.doubtful) {
                continue;
            }
            const auto ranked = ranking(s);
            const double least = least_of(kv);
            std::set<int32_t> cells(&written[kv*n_selected], &written[kv*n_selected] + n_selected);
            const size_t n_pads = std::count(&written[kv*n_selected], &written[kv*n_selected] + n_selected, -1);
            cells.erase(-1);
            if (cells.size() + n_pads != (size_t) n_selected) {
                return false; // twice the same
            }
            if (counted[2*kv] != (int32_t) cells.size() || counted[2*kv + 1] != (int32_t) ranked.size()) {
                return false;
            }
            size_t n_found = 0, n_sure = 0;
            double worst_in = INFINITY, best_out = 0.0;
            for (const candidate & c : ranked) {
                const bool in = cells.count(c.cell);
                n_found += in;
                n_sure  += c.most >= least*(1 + 2e-4);
                if (in) {
                    worst_in = std::min(worst_in, c.most >= least*(1 - 2e-4) ? c.score : 0.0);
                } else if (c.most >= least*(1 + 2e-4)) {
                    best_out = std::max(best_out, c.score);
                }
            }
            if (n_found != cells.size() || cells.size() < std::min<size_t>(n_selected, n_sure) || worst_in < best_out*(1 - 2e-4)) {
                return false;
            }
        }
        return true;
    }

    double err(const float * a, const float * b, size_t n) override {
        const double of_result = test_sketch::err(a, b, n);
        return is_result(a, n) && !wrote_the_best() ? INFINITY : of_result;
    }

    std::vector<float> expected() override {
        const auto b = tensor_to_float(basis);
        const auto bytes = bytes_of(codes);
        std::vector<float> res;
        for (int64_t kv = 0; kv < nh_kv; kv++) {
            const sight s = see(kv);
            const auto taken = best(s, n_selected, least_of(kv));
            for (int64_t g = 0; g < nr; g++) {
                const auto row = tail(b, &bytes[kv*bytes.size()/nh_kv], kv, s, g, taken);
                res.insert(res.end(), row.begin(), row.end());
            }
        }
        return res;
    }

    std::vector<float> tail(const std::vector<float> & b, const uint8_t * head, int64_t kv, const sight & s, int64_t g,
            const std::set<int64_t> & taken) const {
        std::vector<double> z(n_v(), 0.0);
        double known = 0.0, others = 0.0; // weights of the cells that were looked at again, and of those that were not
        for (int64_t c = 0; c < n_list; c++) {
            const double share = taken.count(c) ? 0.0 : s.share[g][c];
            (s.again[c] ? known : others) += share;
            for (int j = 0; j < n_v() && s.again[c] && share > 0.0; j++) {
                z[j] += share*(code(head, true, j, c) - 0.5*((1 << bits_v(j)) - 1));
            }
        }
        const double sum = known + others, of_others = sum > 0.0 ? others/sum : 0.0;
        std::vector<float> res(hs, s.doubtful ? NAN : 0.0f);
        for (int64_t i = 0; i < hs && sum > 0.0 && !s.doubtful; i++) {
            double y = mean(b, kv, true)[i];
            for (int j = 0; j < n_v() && known > 0.0; j++) {
                y += (1.0 - of_others*of_others)*z[j]/known*dec(b, kv, true, j, i);
            }
            res[i] = y;
        }
        res.push_back(s.doubtful ? NAN : log(sum*s.all[g]));
        return res;
    }
};

// BLOCK_MUL_MAT
struct test_block_mul_mat : public test_sfi {
    const ggml_type type_W;
    const int64_t n_in;
    const int64_t n_out;
    const int64_t nb; // tokens

    ggml_tensor * w = nullptr, * x = nullptr;

    std::string vars() override {
        return VARS_TO_STR4(type_W, n_in, n_out, nb);
    }

    test_block_mul_mat(ggml_type type_W, int64_t n_in = 512, int64_t n_out = 96, int64_t nb = 37)
        : type_W(type_W), n_in(n_in), n_out(n_out), nb(nb) {}

    double max_nmse_err() override {
        return 5e-4; // activations are rounded to 8 bits, as in MUL_MAT
    }

    uint64_t op_flops(ggml_tensor * out) override {
        GGML_UNUSED(out);
        return 2*n_in*n_out*nb;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        w = ggml_new_tensor_2d(ctx, type_W, n_in, n_out);
        x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, nb);
        return result(ggml_block_mul_mat(ctx, w, x));
    }

    void init_list(ggml_tensor * t) override {
        GGML_UNUSED(t);
    }

    std::vector<float> expected() override {
        const auto a = tensor_to_float(w), b = tensor_to_float(x);
        std::vector<float> res;
        for (int64_t t = 0; t < nb; t++) {
            for (int64_t r = 0; r < n_out; r++) {
                double sum = 0.0;
                for (int64_t i = 0; i < n_in; i++) {
                    sum += (double) a[r*n_in + i]*b[t*n_in + i];
                }
                res.push_back((float) sum);
            }
        }
        return res;
    }
};

// FEW_MUL_MAT
struct test_few_mul_mat : public test_block_mul_mat {
    using test_block_mul_mat::test_block_mul_mat;

    ggml_tensor * build_graph(ggml_context * ctx) override {
        w = ggml_new_tensor_2d(ctx, type_W, n_in, n_out);
        x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, nb);
        return result(ggml_few_mul_mat(ctx, w, x));
    }
};

static void make_sfi_test_cases_eval(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const ggml_type F32 = GGML_TYPE_F32, F16 = GGML_TYPE_F16, BF16 = GGML_TYPE_BF16, Q8_0 = GGML_TYPE_Q8_0, Q4_0 = GGML_TYPE_Q4_0;

    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_K, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K }) {
        test_cases.emplace_back(new test_block_mul_mat(type, 512));
        test_cases.emplace_back(new test_block_mul_mat(type, 768, 544, 130));
    }
    for (int64_t nb : { 1, 3, 4, 5 }) {
        test_cases.emplace_back(new test_block_mul_mat(GGML_TYPE_Q4_1, 544, 32, nb));
    }

    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_K, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
                             GGML_TYPE_Q8_0 }) {
        for (int64_t nb : { 1, 2, 7, 8, 31 }) {
            test_cases.emplace_back(new test_few_mul_mat(type, 768, 41, nb));
        }
        test_cases.emplace_back(new test_few_mul_mat(type, 4096, 3, 33));
    }
    for (int64_t n_in : { 32, 96, 288, 576 }) {
        test_cases.emplace_back(new test_few_mul_mat(GGML_TYPE_Q4_1, n_in, 17, 5));
    }

    // sparse_attn: lengths, head sizes and types, groups, tokens and streams, tail and sinks and softcap
    for (int n : { -1, 0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 2308 }) {
        test_cases.emplace_back(new test_sparse_attn(-1, n));
        test_cases.emplace_back(new test_sparse_attn(n, 33));
    }
    for (int hs : { 64, 80, 96, 128, 256 }) {
        for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
            if (hs % ggml_blck_size(type) == 0) {
                test_cases.emplace_back(new test_sparse_attn(9, 65, hs, hs, 2, 4, type, type));
            }
        }
    }
    for (ggml_type type : { F16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_sparse_attn(300, 2048, 128, 128, 2, 12, type, type));
    }
    test_cases.emplace_back(new test_sparse_attn(9, 65, 192, 128));
    test_cases.emplace_back(new test_sparse_attn(9, 65, 512, 512, 1, 8));
    test_cases.emplace_back(new test_sparse_attn(9, 65, 64, 64, 2, 4, F16, Q8_0));
    test_cases.emplace_back(new test_sparse_attn(9, 65, 64, 64, 2, 4, Q8_0, F16));
    test_cases.emplace_back(new test_sparse_attn(9, 65, 64, 64, 2, 4, Q8_0, Q4_0));
    for (int nr : { 1, 2, 3, 5, 7, 8 }) {
        test_cases.emplace_back(new test_sparse_attn(36, 100, 64, 64, 3, nr));
    }
    for (int nb : { 1, 3 }) {
        for (int ns : { 1, 2 }) {
            for (bool per_token : { false, true }) {
                for (bool view : { false, true }) {
                    test_cases.emplace_back(new test_sparse_attn(36, 65, 64, 64, 2, 3, F16, F16, nb, ns, per_token, false, false, 0.0f, view));
                }
            }
        }
    }
    for (bool tail : { false, true }) {
        for (bool sinks : { false, true }) {
            for (float logit_softcap : { 0.0f, 10.0f }) {
                test_cases.emplace_back(new test_sparse_attn(36, 65, 64, 64, 2, 3, F16, F16, 2, 1, true, tail, sinks, logit_softcap));
            }
        }
    }
    test_cases.emplace_back(new test_sparse_attn(-1, 0, 64, 64, 2, 3, F16, F16, 1, 1, false, true)); // the tail alone
    for (bool tail : { false, true }) {
        for (bool sinks : { false, true }) {
            test_cases.emplace_back(new test_sparse_attn_mass(36, 700, 3, tail, sinks));
        }
    }
    test_cases.emplace_back(new test_sparse_attn_mass(-1, 0, 1, true, false));
    for (int64_t n : { 7, 64, 65, 300, 700 }) {
        for (int64_t nb : { 2, 17 }) {
            for (ggml_type type_K : { F16, Q8_0 }) {
                test_cases.emplace_back(new test_sparse_attn(n, -1, 64, 64, 2, 3, type_K, Q8_0, nb, 2, false, true, true, 0.0f, true, true));
            }
        }
    }
    for (int64_t n : { 0, 1, 64, 127, 128, 129, 700 }) {
        for (int64_t nb : { 1, 2, 17, 65 }) {
            test_cases.emplace_back(new test_sparse_attn_blocks(n, nb));
        }
    }
    for (int hs : { 64, 80, 96, 128, 256 }) {
        for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
            if (hs % ggml_blck_size(type) == 0) {
                test_cases.emplace_back(new test_sparse_attn_blocks(300, 19, hs, hs, 4, type, type));
            }
        }
    }
    for (int nr : { 1, 2, 5, 7, 8 }) {
        test_cases.emplace_back(new test_sparse_attn_blocks(300, 131, 64, 64, nr, F16, Q8_0, 2, nr % 2 == 0, nr > 4 ? 10.0f : 0.0f));
    }
    test_cases.emplace_back(new test_sparse_attn_blocks(300, 19, 192, 128));
    for (int64_t n : { 0, 1, 127, 700, 1025 }) {
        for (int64_t nb : { 1, 19, 61, 130 }) {
            test_cases.emplace_back(new test_sparse_attn_blocks(n, nb, 64, 64, 3, F16, F16, 2, nb == 19, 0.0f, 1e-12f));
        }
    }
    for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_sparse_attn_blocks(900, 70, 128, 96, 4, type, type, 1, false, 0.0f, 1e-12f));
    }

    // sparse_attn with evidence
    for (int64_t n_list : { 1, 63, 64, 65, 300, 1025, 2308 }) {
        test_cases.emplace_back(new test_sparse_attn_evidence(n_list, 64, 64, 3, 3));
    }
    test_cases.emplace_back(new test_sparse_attn_evidence(300, 128, 128, 2, 5, F16, F16, true, 10.0f, true));
    for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_sparse_attn_evidence(130, 128, 96, 2, 4, type, type));
    }
    test_cases.emplace_back(new test_sparse_attn_evidence(300, 80, 80, 2, 1, F16, F16, true, 0.0f,  true));
    test_cases.emplace_back(new test_sparse_attn_evidence(300, 80, 64, 2, 8, F16, F16, true, 10.0f, true));

    // support_evidence
    for (int n_list : { 1, 20, 21, 63, 64, 65, 257, 2308 }) {
        for (bool candidates : { false, true }) {
            test_cases.emplace_back(new test_support_evidence(n_list, 5, 64, 3, 3, F16, 1.0f, candidates));
        }
    }
    for (int n_queries : { 1, 7, 8, 64 }) {
        test_cases.emplace_back(new test_support_evidence(200, n_queries));
    }
    for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_support_evidence(130, 16, 128, 2, 4, type));
    }
    for (bool candidates : { false, true }) {
        test_cases.emplace_back(new test_support_evidence(130, 3, 80,  2, 1, F16, 0.5f, candidates, 0.0f,  true,  false));
        test_cases.emplace_back(new test_support_evidence(130, 3, 256, 2, 8, F16, 2.0f, candidates, 10.0f, false, true));
    }

    // support_select
    for (bool paper : { false, true }) {
        for (int n_list : { 20, 21, 64, 257, 2308 }) {
            test_cases.emplace_back(new test_support_select(n_list, 50, 3, 0, 0, false, paper));
        }
        test_cases.emplace_back(new test_support_select(300, 1, 2, 0, 0, false, paper));
        test_cases.emplace_back(new test_support_select(300, 300, 8, 0, 0, false, paper, true));
    }
    for (bool ties : { false, true }) {
        test_cases.emplace_back(new test_support_select(1025, 200, 2, 16, 2, ties));
        test_cases.emplace_back(new test_support_select(1025, 200, 2, 0, 500, ties, false, true));
        test_cases.emplace_back(new test_support_select(1025, 200, 1, 0, 0, ties));
    }

    for (int n_selected : { 64, 2048 }) {
        test_cases.emplace_back(new test_support_select(9000, n_selected, 2, 16, 2));
        test_cases.emplace_back(new test_support_select(9000, n_selected, 3, 0, 0, false, true, true));
    }
    for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_support_select(1025, 200, 2, 0, 0, false, true, false, type));
    }
    for (int nh_kv : { 1, 2, 3, 8 }) {
        for (float alpha : { 0.2f, 1.0f, 2.0f }) {
            test_cases.emplace_back(new test_support_select(1025, 200, nh_kv, 0, 0, false, true, true, F16, alpha));
        }
        test_cases.emplace_back(new test_support_select(1, 4, nh_kv, 0, 0, false, true));
    }

    // support_stability
    for (int n_list : { 1, 21, 300, 2308, 9000 }) {
        for (int n_selected : { 1, 64, 300 }) {
            test_cases.emplace_back(new test_support_stability(n_list, n_selected, 3, n_list == 300));
        }
    }
    test_cases.emplace_back(new test_support_stability(5000, 4200, 2));  // more cells than Metal's sets on chip take at a time,
    test_cases.emplace_back(new test_support_stability(200000, 300, 1)); // a larger cache than CUDA's do

    // the sketch; the last number of a form is that of the planes of the first look: in the first eight all
    for (std::array<int32_t, 6> form : { std::array<int32_t, 6>{ 16, 0, 0, 16, 0, 2 }, { 4, 16, 16, 16, 0, 2 }, { 8, 0, 0, 16, 0, 1 }, { 16, 16, 32, 32, 0, 4 },
            { 16, 32, 0, 0, 32, 4 }, { 4, 4, 8, 16, 16, 1 }, { 0, 0, 32, 0, 16, 1 }, { 12, 4, 40, 64, 16, 3 },
            { 4, 40, 0, 0, 16, 1 }, { 8, 48, 0, 0, 16, 2 }, { 8, 80, 0, 0, 32, 3 }, { 4, 24, 32, 16, 0, 1 }, { 4, 4, 40, 16, 16, 1 } }) {
        test_cases.emplace_back(new test_sketch_encode(form));
        for (int nr : { 1, 2, 3, 4, 5, 8 }) {
            test_cases.emplace_back(new test_sketch_scan(form, 2, nr));
        }
    }
    for (ggml_type type : { F32, F16, BF16, Q8_0, Q4_0 }) {
        test_cases.emplace_back(new test_sketch_encode({ 4, 16, 16, 16, 0, 2 }, 33, 128, type, type, 3, type != F16));
    }
    for (int n_listed : { 1, 16, 17, 100 }) {
        test_cases.emplace_back(new test_sketch_encode({ 16, 0, 0, 16, 0, 2 }, n_listed));
    }
    for (int n_list : { 16, 256, 272, 2064 }) {
        for (int hs : { 64, 80, 128 }) {
            for (int n_selected : { 1, n_list/4, n_list }) {
                test_cases.emplace_back(new test_sketch_scan({ 16, 0, 0, 16, 0, 2 }, 3, 3, hs, n_list, n_list - 5, 7, n_selected));
            }
            test_cases.emplace_back(new test_sketch_scan({ 4, 12, 24, 0, 16, 2 }, 3, 3, hs, n_list, n_list, 3, 100, 0.01f));
        }
    }
    test_cases.emplace_back(new test_sketch_scan({ 16, 0, 0, 16, 0, 2 }, 2, 3, 64, 272, 261, 20, 40, 0.0f, 2.0f));
    test_cases.emplace_back(new test_sketch_scan({ 4, 12, 24, 0, 16, 2 }, 2, 3, 64, 4112, 4100, 20, 1000, 0.002f));
    test_cases.emplace_back(new test_sketch_scan({ 4, 12, 24, 0, 16, 2 }, 2, 2, 64, 272, 0, 20, 40));
    test_cases.emplace_back(new test_sketch_scan({ 8, 80, 0, 0, 32, 2 }, 2, 4, 128, 9216, 9100, 20, 64, 0.0003f));
    test_cases.emplace_back(new test_sketch_scan({ 4, 40, 0, 0, 16, 1 }, 2, 3, 64, 4112, 4100, 20, 1000, 0.002f));
    test_cases.emplace_back(new test_sketch_scan({ 4, 40, 0, 0, 16, 1 }, 2, 2, 64, 272, 0, 20, 40));
    test_cases.emplace_back(new test_sketch_scan({ 16, 0, 0, 16, 0, 2 }, 1, 2, 64, 33008, 33001, 20, 300)); // large chunks of cells
    test_cases.emplace_back(new test_sketch_scan({ 16, 32, 0, 64, 64, 1 }, 2, 8, 128)); // as many components of V as a GPU's kernel takes

    // what is looked at again is a part
    for (float second_look : { 0.5f, 1.0f, 2.0f, 1000.0f }) {
        for (int nr : { 1, 2, 3, 8 }) {
            test_cases.emplace_back(new test_sketch_scan({ 8, 48, 0, 0, 16, 2 }, 2, nr, 64, 1040, 1029, 20, 200, 0.002f, 0.0f, second_look));
        }
        test_cases.emplace_back(new test_sketch_scan({ 8, 80, 0, 0, 32, 3 }, 2, 4, 128, 9216, 9100, 20, 64, 0.0003f, 0.0f, second_look));
        test_cases.emplace_back(new test_sketch_scan({ 4, 40, 0, 0, 16, 1 }, 1, 2, 64, 33008, 33001, 20, 300, 0.0001f, 0.0f, second_look));
        test_cases.emplace_back(new test_sketch_scan({ 4, 12, 24, 0, 16, 2 }, 2, 3, 64, 1040, 1029, 20, 200, 0.002f, 5.0f, second_look));
    }
    // what is not finite
    for (float least : { 0.0f, 0.002f }) {
        for (int nr : { 1, 3, 8 }) {
            test_cases.emplace_back(new test_sketch_scan({ 16, 0, 0, 16, 0, 2 }, 2, nr, 64, 1040, 1029, 20, 64, least, 0.0f, 0.0f, true));
            test_cases.emplace_back(new test_sketch_scan({ 8, 48, 0, 0, 16, 2 }, 3, nr, 64, 4112, 4100, 20, 200, least, 0.0f, 0.5f, true));
        }
    }
}
