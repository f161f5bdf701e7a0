#include "sketch-fit.h"

#include "sketch.h"
#include "wide-loops.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// ---- symmetric eigenproblem: Householder tridiagonalisation, then implicit QL -------------------------------------------
//
// Matrices are [n, n] by rows. `w` collects the transformations by rows, so that every inner loop runs along a row.

namespace {

using matrix = std::vector<double>;

LLAMA_WIDE_LOOP inline double dot(const double * a, const double * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += a[i]*b[i];
    }
    return sum;
}

// a -> tridiagonal with diagonal d and off-diagonal e (e[i] between i and i + 1); rows of w: the new base
LLAMA_WIDE_LOOP inline void tridiagonalise(matrix & a, int64_t n, matrix & w, std::vector<double> & d, std::vector<double> & e) {
    w.assign(n*n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        w[i*n + i] = 1.0;
    }
    std::vector<double> v(n), p(n);
    for (int64_t k = 0; k + 2 < n; ++k) {
        // the reflection I - 2 v v^T that clears row k beyond k + 1
        std::fill(v.begin(), v.end(), 0.0);
        std::copy(&a[k*n + k + 1], &a[k*n] + n, v.begin() + k + 1);
        const double norm = std::sqrt(dot(v.data(), v.data(), n));
        if (norm == 0.0) {
            continue;
        }
        v[k + 1] += v[k + 1] < 0.0 ? -norm : norm;
        const double length = std::sqrt(dot(v.data(), v.data(), n));
        for (double & x : v) {
            x /= length;
        }
        // a <- (I - 2 v v^T) a (I - 2 v v^T) = a - v p^T - p v^T with p = 2 (a v - v (v . a v))
        for (int64_t i = k; i < n; ++i) {
            p[i] = 2.0*dot(&a[i*n + k], &v[k], n - k);
        }
        const double c = dot(&p[k], &v[k], n - k);
        for (int64_t i = k; i < n; ++i) {
            p[i] -= c*v[i];
        }
        for (int64_t i = k; i < n; ++i) {
            for (int64_t j = k; j < n; ++j) {
                a[i*n + j] -= v[i]*p[j] + p[i]*v[j];
            }
        }
        // w <- (I - 2 v v^T) w
        std::fill(p.begin(), p.end(), 0.0);
        for (int64_t i = k + 1; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                p[j] += v[i]*w[i*n + j];
            }
        }
        for (int64_t i = k + 1; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                w[i*n + j] -= 2.0*v[i]*p[j];
            }
        }
    }
    d.resize(n);
    e.assign(n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        d[i] = a[i*n + i];
        e[i] = i + 1 < n ? a[i*n + i + 1] : 0.0;
    }
}

// diagonalises the tridiagonal matrix (d, e); rows of w become its eigenvectors
LLAMA_WIDE_LOOP inline void diagonalise(int64_t n, std::vector<double> & d, std::vector<double> & e, matrix & w) {
    for (int64_t l = 0; l < n; ++l) {
        for (int round = 0; round < 60; ++round) {
            int64_t m = l;
            while (m + 1 < n && std::fabs(e[m]) > 1e-15*(std::fabs(d[m]) + std::fabs(d[m + 1]))) {
                ++m;
            }
            if (m == l) {
                break;
            }
            // Wilkinson's shift, then one sweep of rotations from m up to l
            double g = (d[l + 1] - d[l])/(2.0*e[l]);
            double r = std::hypot(g, 1.0);
            g = d[m] - d[l] + e[l]/(g + std::copysign(r, g));
            double s = 1.0, c = 1.0, p = 0.0;
            int64_t i = m - 1;
            for (; i >= l; --i) {
                double f = s*e[i];
                const double b = c*e[i];
                r = std::hypot(f, g);
                e[i + 1] = r;
                if (r == 0.0) {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    break;
                }
                s = f/r;
                c = g/r;
                g = d[i + 1] - p;
                r = (d[i] - g)*s + 2.0*c*b;
                p = s*r;
                d[i + 1] = g + p;
                g = c*r - b;
                double * upper = &w[(i + 1)*n], * lower = &w[i*n];
                for (int64_t j = 0; j < n; ++j) {
                    f = upper[j];
                    upper[j] = s*lower[j] + c*f;
                    lower[j] = c*lower[j] - s*f;
                }
            }
            if (r == 0.0 && i >= l) {
                continue;
            }
            d[l] -= p;
            e[l] = g;
            e[m] = 0.0;
        }
    }
}

} // namespace

void llama_symmetric_eigen(std::vector<double> & a, int64_t n, std::vector<double> & vectors, std::vector<double> & values) {
    matrix w;
    std::vector<double> d, e;
    llama_loop_widely([&]() LLAMA_WIDE_LOOP {
        tridiagonalise(a, n, w, d, e);
        diagonalise(n, d, e, w);
    });

    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
    vectors.resize(n*n);
    values.resize(n);
    for (int64_t i = 0; i < n; ++i) {
        values[i] = d[order[i]];
        std::copy_n(&w[order[i]*n], n, &vectors[i*n]);
    }
}

// ---- moments -------------------------------------------------------------------------------------------------------------

namespace {

std::vector<double> mean_of(const llama_sketch_rows & rows, int64_t n_embd) {
    std::vector<double> mean(n_embd, 0.0);
    for (int64_t r = 0; r < rows.n; ++r) {
        for (int64_t i = 0; i < n_embd; ++i) {
            mean[i] += rows.data[r*n_embd + i];
        }
    }
    for (double & x : mean) {
        x /= std::max<int64_t>(rows.n, 1);
    }
    return mean;
}

// part += the lower triangle of x x^T for each of n_rows rows of x, in their order
LLAMA_WIDE_LOOP inline void add_products(const float * __restrict x, int64_t n_rows, int64_t n, float * __restrict part) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const float * x0 = x + r*n, * x1 = x0 + n, * x2 = x1 + n, * x3 = x2 + n;
        for (int64_t i = 0; i < n; ++i) {
            float * to = part + i*n;
            for (int64_t j = 0; j <= i; ++j) {
                to[j] = (((to[j] + x0[i]*x0[j]) + x1[i]*x1[j]) + x2[i]*x2[j]) + x3[i]*x3[j];
            }
        }
    }
    for (; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                part[i*n + j] += x[r*n + i]*x[r*n + j];
            }
        }
    }
}

// mean of (x - center)(x - center)^T
matrix moment_of(const llama_sketch_rows & rows, int64_t n_embd, const std::vector<double> & center) {
    constexpr int64_t run = 64; // rows summed in F32 before they go to F64
    matrix sum(n_embd*n_embd, 0.0);
    std::vector<float> part(n_embd*n_embd), x(run*n_embd), middle(center.begin(), center.end());
    for (int64_t r0 = 0; r0 < rows.n; r0 += run) {
        const int64_t n = std::min(run, rows.n - r0);
        std::fill(part.begin(), part.end(), 0.0f);
        llama_loop_widely([&]() LLAMA_WIDE_LOOP {
            for (int64_t r = 0; r < n; ++r) {
                for (int64_t i = 0; i < n_embd; ++i) {
                    x[r*n_embd + i] = rows.data[(r0 + r)*n_embd + i] - middle[i];
                }
            }
            add_products(x.data(), n, n_embd, part.data());
        });
        for (size_t i = 0; i < sum.size(); ++i) {
            sum[i] += part[i];
        }
    }
    for (int64_t i = 0; i < n_embd; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            sum[i*n_embd + j] /= std::max<int64_t>(rows.n, 1);
            sum[j*n_embd + i]  = sum[i*n_embd + j];
        }
    }
    return sum;
}

// lower triangle with a = l l^T; a is positive definite
matrix cholesky(const matrix & a, int64_t n) {
    matrix l(n*n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            const double x = a[i*n + j] - dot(&l[i*n], &l[j*n], j);
            l[i*n + j] = i == j ? std::sqrt(std::max(x, 1e-30)) : x/l[j*n + j];
        }
    }
    return l;
}

// ---- quantisation --------------------------------------------------------------------------------------------------------

// uniform quantisers of a normal variable of variance 1: the best step, and the mean square error it leaves
struct quantiser { double step, error; };

quantiser quantiser_of(int bits) {
    switch (bits) {
        case 4:  return { 0.3352, 0.01154 };
        case 2:  return { 0.9957, 0.1188 };
        default: return { 1.5958, 0.3634 };
    }
}

// a floor for components that the rows hardly have: their codes are the middle, and nothing is divided by 0
double step_of(double variance, double largest, int bits) {
    return quantiser_of(bits).step*std::sqrt(std::max(variance, 1e-12*largest + 1e-30));
}

// of finite values even where K is larger than F16 holds
ggml_fp16_t half(double x) {
    return ggml_fp32_to_fp16((float) std::clamp(x, -65504.0, 65504.0));
}

} // namespace

void llama_sketch_keep_finite(const std::vector<llama_sketch_rows *> & all, int64_t n) {
    const int64_t n_groups = all[0]->n/n;
    std::vector<bool> finite(n_groups, true);
    for (const auto * rows : all) {
        const int64_t size = n_groups ? (int64_t) rows->data.size()/n_groups : 0;
        for (int64_t g = 0; g < n_groups; ++g) {
            finite[g] = finite[g] && std::all_of(&rows->data[g*size], &rows->data[g*size] + size, [](float x) { return std::fabs(x) < 1e15f; });
        }
    }
    const int64_t n_kept = std::count(finite.begin(), finite.end(), true);
    for (auto * rows : all) {
        if (n_kept == n_groups) {
            return;
        }
        const int64_t size = (int64_t) rows->data.size()/n_groups;
        std::vector<float> kept;
        for (int64_t g = 0; g < n_groups; ++g) {
            if (finite[g]) {
                kept.insert(kept.end(), &rows->data[g*size], &rows->data[g*size] + size);
            }
        }
        rows->data = std::move(kept);
        rows->n    = n_kept*n;
    }
}

float llama_sketch_fit(const llama_sketch_rows & k, const llama_sketch_rows & v, const llama_sketch_rows & q,
                       int64_t n_embd_k, int64_t n_embd_v, const ggml_sketch_format & format, float * basis) {
    const int64_t n = n_embd_k, n_k = format.n_k4 + format.n_k2 + format.n_k1, n_v = format.n_v4 + format.n_v2;

    // the metric: queries not seen yet may point anywhere, so every direction gets a little
    matrix metric = moment_of(q, n, std::vector<double>(n, 0.0));
    double trace = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        trace += metric[i*n + i];
    }
    const double ridge = trace > 0.0 ? 0.05*trace/n : 1.0;
    for (int64_t i = 0; i < n; ++i) {
        metric[i*n + i] += ridge;
    }
    const matrix l = cholesky(metric, n);

    // c = L^T C_k L
    const auto   mean_k = mean_of(k, n);
    const matrix c_k    = moment_of(k, n, mean_k);
    matrix cl(n*n, 0.0), c(n*n, 0.0);
    llama_loop_widely([&]() LLAMA_WIDE_LOOP {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t m = 0; m < n; ++m) {
                for (int64_t j = 0; j <= m; ++j) {
                    cl[i*n + j] += c_k[i*n + m]*l[m*n + j];
                }
            }
        }
        for (int64_t m = 0; m < n; ++m) {
            for (int64_t i = 0; i <= m; ++i) {
                for (int64_t j = 0; j < n; ++j) {
                    c[i*n + j] += l[m*n + i]*cl[m*n + j];
                }
            }
        }
    });
    matrix u;
    std::vector<double> values;
    llama_symmetric_eigen(c, n, u, values);

    float * mean = basis, * enc = mean + n;
    ggml_fp16_t * dec = (ggml_fp16_t *) (enc + n_k*n);
    std::copy(mean_k.begin(), mean_k.end(), mean);
    double error = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        if (j >= n_k) {
            error += std::max(values[j], 0.0);
            continue;
        }
        const double step = step_of(values[j], values[0], sketch_bits(j, format.n_k4, format.n_k2));
        error += quantiser_of(sketch_bits(j, format.n_k4, format.n_k2)).error*std::max(values[j], 0.0);
        const double * uj = &u[j*n];
        std::vector<double> x(uj, uj + n);  // solves L^T x = u_j
        for (int64_t i = n - 1; i >= 0; --i) {
            for (int64_t m = i + 1; m < n; ++m) {
                x[i] -= l[m*n + i]*x[m];
            }
            x[i] /= l[i*n + i];
        }
        for (int64_t i = 0; i < n; ++i) {
            enc[j*n + i] = (float) (dot(&l[i*n], uj, i + 1)/step);
            dec[j*n + i] = half(x[i]*step);
        }
    }
    for (int64_t j = n; j < n_k; ++j) { // more components than dimensions
        std::fill_n(enc + j*n, n, 0.0f);
        std::fill_n(dec + j*n, n, half(0.0));
    }

    const auto mean_v = mean_of(v, n_embd_v);
    matrix c_v = moment_of(v, n_embd_v, mean_v);
    llama_symmetric_eigen(c_v, n_embd_v, u, values);
    mean = basis + sketch_half_size(n_k, n);
    enc  = mean + n_embd_v;
    dec  = (ggml_fp16_t *) (enc + n_v*n_embd_v);
    std::copy(mean_v.begin(), mean_v.end(), mean);
    for (int64_t j = 0; j < n_v; ++j) {
        const bool   real = j < n_embd_v;
        const double step = real ? step_of(values[j], values[0], j < format.n_v4 ? 4 : 2) : 1.0;
        for (int64_t i = 0; i < n_embd_v; ++i) {
            enc[j*n_embd_v + i] = real ? (float) (u[j*n_embd_v + i]/step) : 0.0f;
            dec[j*n_embd_v + i] = half(real ? u[j*n_embd_v + i]*step : 0.0);
        }
    }
    return (float) std::sqrt(error);
}
