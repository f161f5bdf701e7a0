// The basis of a sketch (ggml-sfi.h), fitted to the K, V and queries of one KV head. Pure.
//
// K: the components minimise E[(q . (k - k'))^2], the error of a logit: with C_q = L L^T the second moment of the queries,
// they are the leading eigenvectors of L^T C_k L. V: plain principal components. A component is quantised uniformly with
// the step that is best for a normal distribution.

#pragma once

#include "ggml-sfi.h"

#include <cstdint>
#include <vector>

// Rows of one head, in F32, one after the other.
struct llama_sketch_rows {
    std::vector<float> data;
    int64_t n = 0;
};

// Leave out the rows that are not finite (or so large that their squares are not) in one of these, which have equally many, and
// with a row all of its group of n.
void llama_sketch_keep_finite(const std::vector<llama_sketch_rows *> & rows, int64_t n);

// basis: as ggml_sketch_basis_size() says; finite if the rows are. Returns the expected error of a sketched logit for one of the queries, in
// units of q.k (root of the mean square).
float llama_sketch_fit(const llama_sketch_rows & k, const llama_sketch_rows & v, const llama_sketch_rows & q,
                       int64_t n_embd_k, int64_t n_embd_v, const ggml_sketch_format & format, float * basis);

// Eigenvectors of a symmetric matrix a [n, n], one per row of `vectors`, by falling eigenvalue. a is destroyed.
void llama_symmetric_eigen(std::vector<double> & a, int64_t n, std::vector<double> & vectors, std::vector<double> & values);
