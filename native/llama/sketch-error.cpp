#include "sketch-error.h"

#include "sketch.h"
#include "wide-loops.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace {

constexpr int64_t exact_part = 50; // one row of so many is exact
constexpr int64_t some_rows  = 24; // of queries are enough

std::vector<float> floats(const ggml_fp16_t * x, int64_t n) {
    std::vector<float> y(n);
    ggml_fp16_to_fp32_row(x, y.data(), n);
    return y;
}

// rows less their mean, [n, n_embd]
std::vector<float> centred(const llama_sketch_rows & rows, int64_t n_embd, const float * mean) {
    std::vector<float> x(rows.data);
    for (int64_t r = 0; r < rows.n; ++r) {
        for (int64_t i = 0; i < n_embd; ++i) {
            x[r*n_embd + i] -= mean[i];
        }
    }
    return x;
}

std::vector<float> transposed(const std::vector<float> & x, int64_t n, int64_t n_columns) {
    constexpr int64_t some = 16; // rows, whose part of the result is written together
    std::vector<float> t(x.size());
    for (int64_t r0 = 0; r0 < n; r0 += some) {
        for (int64_t i = 0; i < n_columns; ++i) {
            for (int64_t r = r0; r < std::min(r0 + some, n); ++r) {
                t[i*n + r] = x[r*n_columns + i];
            }
        }
    }
    return t;
}

// sum_i weight_i x_i of the rows of x [n_rows, n], four at a time; an inner loop over columns need not reorder sums
void combine(const float * weight, const float * x, int64_t n_rows, int64_t n, float * out) {
    std::fill(out, out + n, 0.0f);
    llama_loop_widely([&]() LLAMA_WIDE_LOOP {
        int64_t i = 0;
        for (; i + 4 <= n_rows; i += 4) {
            const float * x0 = x + i*n, * x1 = x0 + n, * x2 = x1 + n, * x3 = x2 + n;
            for (int64_t c = 0; c < n; ++c) {
                out[c] += (weight[i]*x0[c] + weight[i + 1]*x1[c]) + (weight[i + 2]*x2[c] + weight[i + 3]*x3[c]);
            }
        }
        for (; i < n_rows; ++i) {
            for (int64_t c = 0; c < n; ++c) {
                out[c] += weight[i]*x[i*n + c];
            }
        }
    });
}

// codes less their centres, [n_components, n], of the columns of x [n_embd, n]
std::vector<float> codes_of(const std::vector<float> & x, int64_t n_embd, int64_t n, const float * enc, int64_t n_components, int32_t n4, int32_t n2) {
    std::vector<float> codes(n_components*n);
    for (int64_t j = 0; j < n_components; ++j) {
        float * code = &codes[j*n];
        combine(enc + j*n_embd, x.data(), n_embd, n, code);
        const float centre = 0.5f*(float) ((1 << sketch_bits(j, n4, n2)) - 1);
        llama_loop_widely([&]() LLAMA_WIDE_LOOP {
            for (int64_t r = 0; r < n; ++r) {
                code[r] = std::min(std::max(std::nearbyint(code[r] + centre), 0.0f), 2.0f*centre) - centre;
            }
        });
    }
    return codes;
}

void softmax(std::vector<float> & x) {
    const float top = *std::max_element(x.begin(), x.end());
    double sum = 0.0;
    for (float & t : x) {
        t = std::exp(t - top);
        sum += t;
    }
    for (float & t : x) {
        t = (float) (t/sum);
    }
}

double square(const std::vector<float> & x) {
    double sum = 0.0;
    for (float t : x) {
        sum += (double) t*t;
    }
    return sum;
}

} // namespace

float llama_sketch_output_error(const llama_sketch_rows & k, const llama_sketch_rows & v, const llama_sketch_rows & q,
                                int64_t n_embd_k, int64_t n_embd_v, const ggml_sketch_format & format, const float * basis, int64_t group, float kq_scale) {
    const int64_t n = k.n, n_k = format.n_k4 + format.n_k2 + format.n_k1, n_v = format.n_v4 + format.n_v2;
    if (n == 0 || q.n == 0) {
        return 0.0f;
    }
    const auto of_k = sfi::sketch_basis::at(basis, n_k, n_embd_k), of_v = sfi::sketch_basis::at(basis + sketch_half_size(n_k, n_embd_k), n_v, n_embd_v);
    const auto dec_k = floats(of_k.dec, n_k*n_embd_k), dec_v = floats(of_v.dec, n_v*n_embd_v);
    const auto k_columns = transposed(centred(k, n_embd_k, of_k.mean), n, n_embd_k), v_rows = centred(v, n_embd_v, of_v.mean);
    const auto k_codes = codes_of(k_columns, n_embd_k, n, of_k.enc, n_k, format.n_k4, format.n_k2);
    const auto v_codes = transposed(codes_of(transposed(v_rows, n, n_embd_v), n_embd_v, n, of_v.enc, n_v, format.n_v4, format.n_v2), n_v, n);

    double error = 0.0, size = 0.0;
    std::vector<float> query(n_embd_k), by_code(n_k), exact(n), sketched(n), order(n), rest(n), o(n_embd_v), o_exact(n_embd_v), z(n_v), off(n_embd_v);
    const int64_t n_tokens = q.n/group, n_used = std::min(n_tokens, std::max<int64_t>(some_rows/group, 1));
    for (int64_t i = 0; i < n_used*group; ++i) {
        const int64_t row = i/group*n_tokens/n_used*group + i % group;
        for (int64_t c = 0; c < n_embd_k; ++c) {
            query[c] = kq_scale*q.data[row*n_embd_k + c];
        }
        for (int64_t j = 0; j < n_k; ++j) {
            by_code[j] = 0.0f;
            for (int64_t c = 0; c < n_embd_k; ++c) {
                by_code[j] += dec_k[j*n_embd_k + c]*query[c];
            }
        }
        combine(query.data(), k_columns.data(), n_embd_k, n, exact.data()); // less q . mean_k, like the sketched ones
        combine(by_code.data(), k_codes.data(), n_k, n, sketched.data());
        order = sketched;
        const auto last = order.begin() + std::max<int64_t>(n/exact_part, 1) - 1;
        std::nth_element(order.begin(), last, order.end(), std::greater<float>());
        const float least = *last;
        std::vector<bool> is_exact(n);
        for (int64_t r = 0; r < n; ++r) {
            is_exact[r] = sketched[r] >= least;
            sketched[r] = is_exact[r] ? exact[r] : sketched[r];
        }
        softmax(exact);
        softmax(sketched);
        for (int64_t r = 0; r < n; ++r) {
            rest[r]     = is_exact[r] ? 0.0f : sketched[r];
            sketched[r] = is_exact[r] ? sketched[r] : 0.0f;
        }
        combine(exact.data(),    v_rows.data(),  n, n_embd_v, o.data());
        combine(sketched.data(), v_rows.data(),  n, n_embd_v, o_exact.data());
        combine(rest.data(),     v_codes.data(), n, n_v, z.data());
        combine(z.data(), dec_v.data(), n_v, n_embd_v, off.data());
        for (int64_t c = 0; c < n_embd_v; ++c) {
            off[c] += o_exact[c] - o[c];
        }
        error += square(off);
        size  += square(o);
    }
    return size > 0.0 ? (float) (error/size) : 0.0f;
}
