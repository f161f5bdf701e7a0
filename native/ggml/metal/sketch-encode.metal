// GGML_OP_SKETCH_ENCODE on Metal.
//
// A threadgroup takes a few of the listed cells and one KV head: their rows lie in threadgroup memory, a thread computes a
// component of all of them. Codes of other cells share a byte with ours, so bits are set by atomics on words; each bit has
// one writer.

#include "gpu.metal"

struct encode_shared {
    float x[encode_cells*encode_head_size];
    int   cells[encode_cells];
};

static inline int bits_of_k(constant encode_args & a, int j) { return j < a.n_k4 ? 4 : j < a.n_k4 + a.n_k2 ? 2 : 1; }
static inline int bits_of_v(constant encode_args & a, int j) { return j < a.n_v4 ? 4 : 2; }

// bits of a byte that lie before component j of K
static inline int bit_of_k(constant encode_args & a, int j) {
    const int g = j/4, g4 = a.n_k4/4, g2 = a.n_k2/4;
    return 4*min(g, g4) + 2*min(max(g - g4, 0), g2) + max(g - g4 - g2, 0);
}

static inline void put_bits(device char * head, long byte, int shift, int bits, uint code) {
    device atomic_uint * word = (device atomic_uint *) (head + byte/4*4);
    const int at = shift + 8*(int) (byte % 4);
    atomic_fetch_and_explicit(word, ~(((1u << bits) - 1) << at), memory_order_relaxed);
    atomic_fetch_or_explicit(word, code << at, memory_order_relaxed);
}

// Where a sketch is looked at twice, what the first look leaves lies in the record of the cell.
static inline void put_code(constant encode_args & a, device char * head, int cell, bool of_v, int j, uint code) {
    const long block = (long) (cell/16)*a.block_bytes, record = a.records_at + (long) cell*a.record_bytes;
    const int  i     = cell % 16;
    if (!of_v) {
        const int  bit  = bit_of_k(a, j), plane = bit/8;
        const long byte = plane < a.first_planes ? block + plane*64 + 4*i : record + 4*(plane - a.first_planes);
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
    const int n = of_v ? a.n_v : a.n_k;
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
        const float most = (float) ((1 << (of_v ? bits_of_v(a, j) : bits_of_k(a, j))) - 1);
#pragma unroll
        for (int c = 0; c < encode_cells; ++c) {
            if (sh.cells[c] >= 0) {
                put_code(a, head, sh.cells[c], of_v, j, (uint) min(max(rint(sum[c] + 0.5f*most), 0.0f), most));
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
    encode_components(a, head, false, a.d_k, basis + a.d_k, sh, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (a.n_v > 0) {
        basis += (long) a.d_k*(1 + a.n_k + a.n_k/2);
        load_centred<T>(v + h_kv*a.v_nb2, a.v_nb1, a.d_v, basis, sh, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        encode_components(a, head, true, a.d_v, basis + a.d_v, sh, tid);
    }
}

SFI_KERNEL_AS("sfi_sketch_encode_f16",  sfi_sketch_encode<octet_f16>)
SFI_KERNEL_AS("sfi_sketch_encode_bf16", sfi_sketch_encode<octet_bf16>)
SFI_KERNEL_AS("sfi_sketch_encode_q8_0", sfi_sketch_encode<octet_q8_0>)
SFI_KERNEL_AS("sfi_sketch_encode_q4_0", sfi_sketch_encode<octet_q4_0>)
