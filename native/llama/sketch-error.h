// What a sketch does to the outputs of one KV head, estimated from the rows that its basis was fitted to. Pure.

#pragma once

#include "sketch-fit.h"

// Mean of |o' - o|^2 over the mean of |o - mean_v|^2, for some of the queries q, `group` rows a token: o is attention over the rows
// k and v, o' the same with a fiftieth of the rows, the best by their sketched logits, exact and the others as the sketch has them.
//
// It says how much a head needs exact cells, compared with other heads. Errors that are small beside V, but not beside the output,
// matter: a head that averages over much of the text gives little else than the mean, and what follows is made for that.
float llama_sketch_output_error(const llama_sketch_rows & k, const llama_sketch_rows & v, const llama_sketch_rows & q,
                                int64_t n_embd_k, int64_t n_embd_v, const ggml_sketch_format & format, const float * basis, int64_t group, float kq_scale);
