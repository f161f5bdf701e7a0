// GGML_OP_SKETCH_ENCODE on CUDA.
//
// A block takes a few of the listed cells and one KV head: their rows lie in shared memory, a thread computes a component
// of all of them. Codes of other cells share a byte with ours, so bits are set by atomics on words; each bit has one writer.

#include "gpu.cuh"
#include "sketch.h"

namespace sfi_cuda {

constexpr int encode_threads    = 128;
constexpr int encode_cells      = 16;  // of a block
constexpr int encode_head_size  = 256; // at most

struct encode_args {
    uint8_t * codes;
    const float * basis;
    const char * k, * v;
    const int32_t * cells;
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, head_bytes, records_at;
    int d_k, d_v, n_k, n_v, n_k4, n_k2, n_v4, n_listed, n_cells, basis_size, k_planes, first_planes, block_bytes, record_bytes;
};

static __device__ __forceinline__ int bits_of_k(const encode_args & a, int j) { return j < a.n_k4 ? 4 : j < a.n_k4 + a.n_k2 ? 2 : 1; }
static __device__ __forceinline__ int bits_of_v(const encode_args & a, int j) { return j < a.n_v4 ? 4 : 2; }

// bits of a byte that lie before component j of K
static __device__ __forceinline__ int bit_of_k(const encode_args & a, int j) {
    const int g = j/4, g4 = a.n_k4/4, g2 = a.n_k2/4;
    return 4*min(g, g4) + 2*min(max(g - g4, 0), g2) + max(g - g4 - g2, 0);
}

static __device__ void put_bits(uint8_t * head, int64_t byte, int shift, int bits, unsigned code) {
    unsigned * word = (unsigned *) (head + (byte & ~(int64_t) 3));
    shift += 8*(int) (byte & 3);
    atomicAnd(word, ~(((1u << bits) - 1) << shift));
    atomicOr(word, code << shift);
}

// Where a sketch is looked at twice, what the first look leaves lies in the record of the cell.
static __device__ void put_code(const encode_args & a, uint8_t * head, int cell, bool of_v, int j, unsigned code) {
    const int64_t block = (int64_t) (cell/16)*a.block_bytes, record = a.records_at + (int64_t) cell*a.record_bytes;
    const int     i     = cell % 16;
    if (!of_v) {
        const int bit = bit_of_k(a, j), plane = bit/8;
        const int64_t byte = plane < a.first_planes ? block + plane*64 + 4*i : record + 4*(plane - a.first_planes);
        put_bits(head, byte + j % 4, bit % 8, bits_of_k(a, j), code);
        return;
    }
    const int group = j/16, g4 = a.n_v4/16, bits = bits_of_v(a, j);
    const int plane = a.k_planes + 2*min(group, g4) + max(group - g4, 0);
    if (a.record_bytes > 0) {
        const int bit = bits*(j % 16);
        put_bits(head, record + 4*(plane - a.first_planes) + bit/8, bit % 8, bits, code);
    } else {
        const int bit = bits*(i/4);
        put_bits(head, block + (plane + bit/8)*64 + 4*(j % 16) + i % 4, bit % 8, bits, code);
    }
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

static __device__ void encode_components_of(const encode_args & a, uint8_t * head, const int * cells, bool of_v, int d, const float * enc,
        const float * x) {
    const int n = of_v ? a.n_v : a.n_k;
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
        const float most = (float) ((1 << (of_v ? bits_of_v(a, j) : bits_of_k(a, j))) - 1);
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            if (cells[c] >= 0) {
                put_code(a, head, cells[c], of_v, j, (unsigned) fminf(fmaxf(rintf(sum[c] + 0.5f*most), 0.0f), most));
            }
        }
    }
}

template <ggml_type T>
static __global__ void __launch_bounds__(encode_threads) sketch_encode_kernel(const encode_args a) {
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
    encode_components_of(a, head, cells, false, a.d_k, basis + a.d_k, x);
    __syncthreads();
    if (a.n_v > 0) {
        basis += (int64_t) a.d_k*(1 + a.n_k + a.n_k/2);
        load_centred<T>(a.v + h_kv*a.v_nb2, a.v_nb1, cells, a.d_v, basis, x);
        __syncthreads();
        encode_components_of(a, head, cells, true, a.d_v, basis + a.d_v, x);
    }
}

bool sketch_encode_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[2], * v = dst->src[3];
    return sfi::sketch_layout::supported(dst) && is_kv_type(k->type) && k->type == v->type
        && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 && k->ne[0] <= encode_head_size && v->ne[0] <= encode_head_size
        && k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0
        && has_aligned_rows(k) && has_aligned_rows(v) && k->ne[2] <= 65535;
}

size_t sketch_encode_scratch(const ggml_tensor *, int) {
    return 0;
}

template <ggml_type T>
static void launch_encode(const gpu & g, const encode_args & a, dim3 grid) {
    SFI_LAUNCH(sketch_encode_kernel<T>, grid, dim3(encode_threads), g.stream, a);
}

void sketch_encode(const gpu & g, ggml_tensor * dst) {
    const ggml_tensor * codes = dst->src[0], * basis = dst->src[1], * k = dst->src[2], * v = dst->src[3], * cells = dst->src[4];
    const ggml_sketch_format f = sfi::sketch_layout::format_of(dst);
    const sfi::sketch_layout layout(dst);
    encode_args a = {};
    a.codes = (uint8_t *) codes->data;
    a.basis = (const float *) basis->data;
    a.k = (const char *) k->data; a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.v = (const char *) v->data; a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2];
    a.cells = (const int32_t *) cells->data;
    a.head_bytes = codes->nb[2];
    a.d_k = (int) k->ne[0];
    a.d_v = (int) v->ne[0];
    a.n_k = layout.n_k;
    a.n_v = layout.n_v;
    a.n_k4 = f.n_k4;
    a.n_k2 = f.n_k2;
    a.n_v4 = f.n_v4;
    a.n_listed    = (int) cells->ne[0];
    a.n_cells     = (int) k->ne[1];
    a.basis_size  = (int) basis->ne[0];
    a.k_planes    = layout.k_planes;
    a.first_planes = layout.first_planes;
    a.block_bytes  = (int) layout.block_bytes();
    a.record_bytes = layout.record_bytes;
    a.records_at   = codes->ne[1]*layout.block_bytes();
    if (a.n_listed == 0) {
        return;
    }
    const dim3 grid((unsigned) n_chunks(a.n_listed, encode_cells), (unsigned) k->ne[2]);
    with_kv_type(k->type, [&](auto type) { launch_encode<decltype(type)::value>(g, a, grid); });
}

} // namespace sfi_cuda
