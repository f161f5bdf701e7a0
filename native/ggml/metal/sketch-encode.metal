// SKETCH_ENCODE on Metal.
//
// A threadgroup takes a few of the listed cells and one KV head: their rows lie in threadgroup memory, a thread computes a
// component of all of them. Codes of other cells share a byte with ours, so bits are set by atomics on words; each bit has
// one writer.

#include "gpu.metal"

struct encode_shared {
    float x[encode_cells*encode_head_size];
    int   cells[encode_cells];
};

static inline void put_code(device char * head, sketch_place at, int bits, uint code) {
    device atomic_uint * word = (device atomic_uint *) (head + at.byte/4*4);
    const int shift = at.shift + 8*(int) (at.byte % 4);
    atomic_fetch_and_explicit(word, ~(((1u << bits) - 1) << shift), memory_order_relaxed);
    atomic_fetch_or_explicit(word, code << shift, memory_order_relaxed);
}

template <typename T>
static inline void load_centred(device const char * rows, long nb1, int d, device const float * mean, threadgroup encode_shared & sh, int tid) {
    const int parts = d/8;
    for (int j = tid; j < encode_cells*parts; j += encode_threads) {
        const int c = j/parts, i = j % parts;
        T o;
        o.clear();
        if (sh.cells[c] >= 0) {
            o.load(rows + sh.cells[c]*nb1, i);
        }
        float y[8];
        o.get(y);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            sh.x[c*d + 8*i + e] = y[e] - mean[8*i + e];
        }
    }
}

static inline void encode_components(constant encode_args & a, device char * head, bool of_v, int d, device const float * enc,
        threadgroup const encode_shared & sh, int tid) {
    const ggml_sketch_format f = a.format;
    const int n = of_v ? sketch_n_v(f) : sketch_n_k(f);
    for (int j = tid; j < n; j += encode_threads) {
        float sum[encode_cells];
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            sum[c] = 0.0f;
        }
        for (int e = 0; e < d; ++e) {
            const float w = enc[j*d + e];
#pragma unroll
            for (int c = 0; c < encode_cells; ++c) {
                sum[c] = fma(w, sh.x[c*d + e], sum[c]);
            }
        }
        const int   bits = of_v ? sketch_bits_v(f, j) : sketch_bits_k(f, j);
        const float most = (float) ((1 << bits) - 1);
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            if (sh.cells[c] >= 0) {
                const sketch_place at = of_v ? sketch_place_v(f, a.n_blocks, sh.cells[c], j) : sketch_place_k(f, a.n_blocks, sh.cells[c], j);
                put_code(head, at, bits, (uint) min(max(rint(sum[c] + 0.5f*most), 0.0f), most));
            }
        }
    }
}

template <typename T>
[[max_total_threads_per_threadgroup(encode_threads)]] kernel void sfi_sketch_encode(
        constant encode_args & a       [[buffer(0)]],
        device char        * codes     [[buffer(1)]],
        device const float * basis_all [[buffer(2)]],
        device const char  * k         [[buffer(3)]],
        device const char  * v         [[buffer(4)]],
        device const int   * cells     [[buffer(5)]],
        SFI_POSITION) {
    SFI_SHARED(encode_shared, sh);
    const int h_kv = block.y;
    if (tid < encode_cells) {
        const int i = block.x*encode_cells + tid, cell = i < a.n_listed ? cells[i] : -1;
        sh.cells[tid] = cell < a.n_cells ? cell : -1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    device char        * head  = codes + h_kv*a.head_bytes;
    device const float * basis = basis_all + (long) h_kv*a.basis_size;

    load_centred<T>(k + h_kv*a.k_nb2, a.k_nb1, a.d_k, basis, sh, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    encode_components(a, head, false, a.d_k, basis + sketch_enc_at(a.d_k), sh, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sketch_n_v(a.format) > 0) {
        basis += sketch_half_size(sketch_n_k(a.format), a.d_k);
        load_centred<T>(v + h_kv*a.v_nb2, a.v_nb1, a.d_v, basis, sh, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        encode_components(a, head, true, a.d_v, basis + sketch_enc_at(a.d_v), sh, tid);
    }
}

SFI_KERNEL_AS("sfi_sketch_encode_f16",  sfi_sketch_encode<octet_f16>)
SFI_KERNEL_AS("sfi_sketch_encode_bf16", sfi_sketch_encode<octet_bf16>)
SFI_KERNEL_AS("sfi_sketch_encode_q8_0", sfi_sketch_encode<octet_q8_0>)
SFI_KERNEL_AS("sfi_sketch_encode_q4_0", sfi_sketch_encode<octet_q4_0>)
