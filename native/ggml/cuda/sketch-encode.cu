// SKETCH_ENCODE on CUDA.
//
// A block takes a few of the listed cells and one KV head: their rows lie in shared memory, a thread computes a component
// of all of them. Codes of other cells share a byte with ours, so bits are set by atomics on words; each bit has one writer.

#include "gpu.cuh"

namespace sfi_cuda {

constexpr int encode_threads = 128;

struct encode_task : encode_args {
    uint8_t * codes;
    const float * basis;
    const char * k, * v;
    const int32_t * cells;
};

static __device__ void put_code(uint8_t * head, sketch_place at, int bits, unsigned code) {
    unsigned * word = (unsigned *) (head + (at.byte & ~(int64_t) 3));
    const int shift = at.shift + 8*(int) (at.byte & 3);
    atomicAnd(word, ~(((1u << bits) - 1) << shift));
    atomicOr(word, code << shift);
}

template <ggml_type T>
static __device__ void load_centred(const char * rows, int64_t nb1, const int * cells, int d, const float * mean, float * x) {
    const int parts = d/8;
    for (int j = threadIdx.x; j < encode_cells*parts; j += encode_threads) {
        const int c = j/parts, i = j % parts;
        octet<T> o;
        o.clear();
        if (cells[c] >= 0) {
            o.load(rows + cells[c]*nb1, i);
        }
        float y[8];
        o.get(y);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            x[c*d + 8*i + e] = o.scale()*y[e] - mean[8*i + e];
        }
    }
}

static __device__ void encode_components_of(const encode_task & a, uint8_t * head, const int * cells, bool of_v, int d, const float * enc,
        const float * x) {
    const int n = of_v ? sketch_n_v(a.format) : sketch_n_k(a.format);
    for (int j = threadIdx.x; j < n; j += encode_threads) {
        float sum[encode_cells];
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            sum[c] = 0.0f;
        }
        for (int e = 0; e < d; ++e) {
            const float w = enc[j*d + e];
#pragma unroll
            for (int c = 0; c < encode_cells; ++c) {
                sum[c] = fmaf(w, x[c*d + e], sum[c]);
            }
        }
        const int   bits = of_v ? sketch_bits_v(a.format, j) : sketch_bits_k(a.format, j);
        const float most = (float) ((1 << bits) - 1);
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            if (cells[c] >= 0) {
                const sketch_place at = of_v ? sketch_place_v(a.format, a.n_blocks, cells[c], j) : sketch_place_k(a.format, a.n_blocks, cells[c], j);
                put_code(head, at, bits, (unsigned) fminf(fmaxf(rintf(sum[c] + 0.5f*most), 0.0f), most));
            }
        }
    }
}

template <ggml_type T>
static __global__ void __launch_bounds__(encode_threads) sketch_encode_kernel(const encode_task a) {
    follow_previous();
    __shared__ float x[encode_cells*encode_head_size];
    __shared__ int   cells[encode_cells];
    const int h_kv = blockIdx.y;
    if (threadIdx.x < encode_cells) {
        const int i = blockIdx.x*encode_cells + threadIdx.x, cell = i < a.n_listed ? a.cells[i] : -1;
        cells[threadIdx.x] = cell < a.n_cells ? cell : -1;
    }
    __syncthreads();
    uint8_t     * head  = a.codes + h_kv*a.head_bytes;
    const float * basis = a.basis + (int64_t) h_kv*a.basis_size;

    load_centred<T>(a.k + h_kv*a.k_nb2, a.k_nb1, cells, a.d_k, basis, x);
    __syncthreads();
    encode_components_of(a, head, cells, false, a.d_k, basis + sketch_enc_at(a.d_k), x);
    __syncthreads();
    if (sketch_n_v(a.format) > 0) {
        basis += sketch_half_size(sketch_n_k(a.format), a.d_k);
        load_centred<T>(a.v + h_kv*a.v_nb2, a.v_nb1, cells, a.d_v, basis, x);
        __syncthreads();
        encode_components_of(a, head, cells, true, a.d_v, basis + sketch_enc_at(a.d_v), x);
    }
}

bool sketch_encode_supported(const ggml_tensor * dst) {
    return encode_supported(dst);
}

size_t sketch_encode_scratch(const ggml_tensor *, int) {
    return 0;
}

template <ggml_type T>
static void launch_encode(const gpu & g, const encode_task & a, dim3 grid) {
    SFI_LAUNCH(sketch_encode_kernel<T>, grid, dim3(encode_threads), g.stream, a);
}

void sketch_encode(const gpu & g, const ggml_tensor * dst) {
    encode_task a = {};
    static_cast<encode_args &>(a) = encode_args_of(dst);
    a.codes = (uint8_t *) dst->src[0]->data;
    a.basis = (const float *) dst->src[1]->data;
    a.k     = (const char *) dst->src[2]->data;
    a.v     = (const char *) dst->src[3]->data;
    a.cells = (const int32_t *) dst->src[4]->data;
    if (a.n_listed == 0) {
        return;
    }
    const dim3 grid((unsigned) n_chunks(a.n_listed, encode_cells), (unsigned) dst->src[2]->ne[2]);
    with_kv_type(dst->src[2]->type, [&](auto type) { launch_encode<decltype(type)::value>(g, a, grid); });
}

} // namespace sfi_cuda
