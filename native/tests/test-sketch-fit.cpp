// The basis of a sketch: eigenvectors are eigenvectors, and what is said of the error is what is measured.
// Prints every failure; exit code 1 if there was one.

#include "llama/sketch-error.h"
#include "llama/sketch-fit.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

static int failures = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAILED: %s\n", what.c_str());
        ++failures;
    }
}

static void check_near(double a, double b, double tolerance, const std::string & what) {
    check(std::fabs(a - b) <= tolerance, what + ": " + std::to_string(a) + ", expected " + std::to_string(b));
}

// ---- eigenvectors ----------------------------------------------------------------------------------------------------

// a symmetric matrix of a given rank
static std::vector<double> symmetric(int64_t n, int64_t rank, std::mt19937 & rng) {
    std::normal_distribution<double> normal;
    std::vector<double> a(n*n, 0.0), x(n);
    for (int64_t r = 0; r < rank; ++r) {
        for (double & v : x) {
            v = normal(rng)*(r + 1);
        }
        for (int64_t i = 0; i < n*n; ++i) {
            a[i] += x[i/n]*x[i % n];
        }
    }
    return a;
}

static void test_eigen(int64_t n, int64_t rank) {
    std::mt19937 rng(2603);
    const auto a = symmetric(n, rank, rng);
    auto destroyed = a;
    std::vector<double> u, values;
    llama_symmetric_eigen(destroyed, n, u, values);

    const std::string name = "n " + std::to_string(n) + ", rank " + std::to_string(rank);
    double trace = 0.0, sum = 0.0, wrong = 0.0, skew = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        trace += a[i*n + i];
        sum   += values[i];
        check(i == 0 || values[i] <= values[i - 1], name + ": eigenvalues do not fall");
        for (int64_t j = 0; j < n; ++j) {
            double av = 0.0, dot = 0.0;
            for (int64_t m = 0; m < n; ++m) {
                av  += a[j*n + m]*u[i*n + m];
                dot += u[i*n + m]*u[j*n + m];
            }
            wrong = std::max(wrong, std::fabs(av - values[i]*u[i*n + j]));
            skew  = std::max(skew, std::fabs(dot - (i == j)));
        }
    }
    check_near(sum, trace, 1e-9*std::fabs(trace) + 1e-12, name + ": sum of eigenvalues");
    check(wrong <= 1e-9*trace + 1e-12, name + ": a v is not lambda v, off by " + std::to_string(wrong));
    check(skew <= 1e-10, name + ": eigenvectors are not orthonormal, off by " + std::to_string(skew));
}

// ---- fit -------------------------------------------------------------------------------------------------------------

// rows whose coordinates have falling scales, around a mean, in a base that is not the axes
static llama_sketch_rows rows_like(int64_t n, int64_t d, double falloff, double mean, std::mt19937 & rng) {
    std::normal_distribution<double> normal;
    llama_sketch_rows rows;
    rows.n = n;
    for (int64_t r = 0; r < n; ++r) {
        std::vector<double> x(d);
        for (int64_t i = 0; i < d; ++i) {
            x[i] = normal(rng)*std::pow(falloff, i);
        }
        for (int64_t i = 0; i < d; ++i) {
            rows.data.push_back((float) (mean + x[i] + 0.5*x[(i + 7) % d]));
        }
    }
    return rows;
}

// bits of the components of K or V
static std::vector<int> bits_of(int n4, int n2, int n1) {
    std::vector<int> bits(n4, 4);
    bits.insert(bits.end(), n2, 2);
    bits.insert(bits.end(), n1, 1);
    return bits;
}

// of K or V; followed by what comes next in the basis
struct part {
    const float * mean, * enc, * next;
    std::vector<float> dec;
    std::vector<int> bits;

    part(const float * basis, int64_t d, std::vector<int> bits_of_all) : mean(basis), enc(basis + d), bits(std::move(bits_of_all)) {
        const float * halves = enc + bits.size()*d;
        dec.resize(bits.size()*d);
        ggml_fp16_to_fp32_row((const ggml_fp16_t *) halves, dec.data(), dec.size());
        next = halves + dec.size()/2;
    }
};

// x' of a row, by its codes
static std::vector<double> coded(const float * x, const part & of, int64_t d) {
    const auto & [mean, enc, next, dec, bits] = of;
    std::vector<double> out(mean, mean + d);
    for (size_t j = 0; j < bits.size(); ++j) {
        const double top = (1 << bits[j]) - 1, centre = top/2;
        double z = centre;
        for (int64_t i = 0; i < d; ++i) {
            z += enc[j*d + i]*(x[i] - mean[i]);
        }
        const double code = std::min(std::max(std::round(z), 0.0), top);
        for (int64_t i = 0; i < d; ++i) {
            out[i] += (code - centre)*dec[j*d + i];
        }
    }
    return out;
}

static void test_fit(int64_t d, const ggml_sketch_format & f) {
    std::mt19937 rng(2604);
    const auto k = rows_like(3000, d, 0.93, 2.0, rng), v = rows_like(3000, d, 0.9, -1.0, rng), q = rows_like(192, d, 1.03, 0.0, rng);
    std::vector<float> basis(ggml_sketch_basis_size(&f, d, d));
    const double said = llama_sketch_fit(k, v, q, d, d, f, basis.data());

    const part of_k(basis.data(), d, bits_of(f.n_k4, f.n_k2, f.n_k1)), of_v(of_k.next, d, bits_of(f.n_v4, f.n_v2, 0));
    check(of_v.next == basis.data() + basis.size(), "the parts of a basis do not fill it");

    double logit_error = 0.0, logit_size = 0.0, value_error = 0.0, value_size = 0.0;
    for (int64_t r = 0; r < k.n; r += 5) {
        const auto k2 = coded(&k.data[r*d], of_k, d), v2 = coded(&v.data[r*d], of_v, d);
        for (int64_t i = 0; i < d; ++i) {
            value_error += std::pow(v.data[r*d + i] - v2[i], 2);
            value_size  += std::pow(v.data[r*d + i] - of_v.mean[i], 2);
        }
        for (int64_t s = 0; s < q.n; s += 3) {
            double error = 0.0, size = 0.0;
            for (int64_t i = 0; i < d; ++i) {
                error += q.data[s*d + i]*(k.data[r*d + i] - k2[i]);
                size  += q.data[s*d + i]*(k.data[r*d + i] - of_k.mean[i]);
            }
            logit_error += error*error;
            logit_size  += size*size;
        }
    }
    const int64_t pairs = (k.n + 4)/5*((q.n + 2)/3);
    const double measured = std::sqrt(logit_error/pairs);
    const std::string name = "head size " + std::to_string(d) + ", " + std::to_string(of_k.bits.size()) + " components";
    check(measured > 0.6*said && measured < 1.25*said, name + ": error of a logit " + std::to_string(measured) + ", said " + std::to_string(said));
    check(logit_error < 0.2*logit_size, name + ": a sketched logit says too little: " + std::to_string(logit_error/logit_size));
    check(value_error < 0.5*value_size, name + ": a sketched value says too little: " + std::to_string(value_error/value_size));
}

// attention of one query over rows of k and v, of which `own` take part; adds to out
static void attend(const std::vector<double> & logits, const std::vector<std::vector<double>> & v, const std::vector<bool> & own, std::vector<double> & out) {
    double sum = 0.0;
    for (const double x : logits) {
        sum += std::exp(x);
    }
    for (size_t r = 0; r < v.size(); ++r) {
        for (size_t i = 0; own[r] && i < out.size(); ++i) {
            out[i] += std::exp(logits[r])/sum*v[r][i];
        }
    }
}

// what is said of the outputs is what comes out when everything is written down
static void test_output_error(int64_t d, int64_t group, const ggml_sketch_format & f) {
    std::mt19937 rng(2605);
    const auto k = rows_like(200, d, 0.93, 1.0, rng), v = rows_like(200, d, 0.9, -1.0, rng), q = rows_like(4*group, d, 1.0, 0.0, rng);
    const float scale = 1.0f/std::sqrt((float) d);
    std::vector<float> basis(ggml_sketch_basis_size(&f, d, d));
    llama_sketch_fit(k, v, q, d, d, f, basis.data());
    const double said = llama_sketch_output_error(k, v, q, d, d, f, basis.data(), group, scale);

    const part of_k(basis.data(), d, bits_of(f.n_k4, f.n_k2, f.n_k1)), of_v(of_k.next, d, bits_of(f.n_v4, f.n_v2, 0));
    std::vector<std::vector<double>> k2, v1, v2;
    for (int64_t r = 0; r < k.n; ++r) {
        v1.emplace_back(&v.data[r*d], &v.data[r*d] + d);
        k2.push_back(coded(&k.data[r*d], of_k, d));
        v2.push_back(coded(&v.data[r*d], of_v, d));
    }
    double error = 0.0, size = 0.0;
    for (int64_t s = 0; s < q.n; ++s) {
        std::vector<double> exact(k.n, 0.0), mixed(k.n, 0.0);
        for (int64_t r = 0; r < k.n; ++r) {
            for (int64_t i = 0; i < d; ++i) {
                exact[r] += scale*q.data[s*d + i]*k.data[r*d + i];
                mixed[r] += scale*q.data[s*d + i]*k2[r][i];
            }
        }
        auto order = mixed;
        std::sort(order.begin(), order.end());
        std::vector<bool> best(k.n), others(k.n), all(k.n, true);
        for (int64_t r = 0; r < k.n; ++r) {
            best[r]   = mixed[r] >= order[k.n - k.n/50]; // the best four of 200
            others[r] = !best[r];
            mixed[r]  = best[r] ? exact[r] : mixed[r];
        }
        std::vector<double> o(d, 0.0), o2(d, 0.0);
        attend(exact, v1, all, o);
        attend(mixed, v1, best, o2);
        attend(mixed, v2, others, o2);
        for (int64_t i = 0; i < d; ++i) {
            error += std::pow(o2[i] - o[i], 2);
            size  += std::pow(o[i] - of_v.mean[i], 2);
        }
    }
    check_near(said, error/size, 1e-3*error/size, "error of the outputs, head size " + std::to_string(d));
    check(error > 0.0 && error < size, "error of the outputs: " + std::to_string(error/size));
    check(llama_sketch_output_error({}, {}, q, d, d, f, basis.data(), group, scale) == 0.0f, "no rows, but an error");
}

// few rows, all alike: nothing is divided by zero
static void test_degenerate() {
    const int64_t d = 32;
    const ggml_sketch_format f = { 8, 0, 0, 16, 0, 0 };
    llama_sketch_rows same, none;
    same.n = 3;
    same.data.assign(3*d, 1.5f);
    std::vector<float> basis(ggml_sketch_basis_size(&f, d, d));
    const double error = llama_sketch_fit(same, same, none, d, d, f, basis.data());
    const part of_k(basis.data(), d, bits_of(8, 0, 0)), of_v(of_k.next, d, bits_of(16, 0, 0));
    bool finite = std::isfinite(error);
    for (const part * of : { &of_k, &of_v }) {
        const auto all_finite = [](const float * x, size_t n) { return std::all_of(x, x + n, [](float y) { return std::isfinite(y); }); };
        finite = finite && all_finite(of->mean, d) && all_finite(of->enc, of->dec.size()) && all_finite(of->dec.data(), of->dec.size());
    }
    check(finite, "a basis of equal rows is not finite");
    const auto back = coded(same.data.data(), of_k, d);
    for (int64_t i = 0; i < d; ++i) {
        check_near(back[i], 1.5, 1e-5, "equal rows come back");
    }
}

int main() {
    for (const auto & [n, rank] : std::vector<std::pair<int64_t, int64_t>>{ {1, 1}, {2, 2}, {3, 1}, {16, 16}, {64, 80}, {64, 5}, {80, 100}, {128, 128} }) {
        test_eigen(n, rank);
    }
    test_eigen(8, 0);
    test_fit(64, { 16, 0, 0, 16, 0 });
    test_fit(64, { 4, 16, 16, 16, 0 });
    test_fit(128, { 8, 32, 32, 32, 0 });
    test_fit(32, { 32, 0, 0, 32, 0 });
    test_output_error(64, 3, { 4, 40, 0, 0, 16, 1 });
    test_output_error(32, 1, { 32, 0, 0, 32, 0, 0 });
    test_degenerate();
    printf("%d failures\n", failures);
    return failures > 0;
}
