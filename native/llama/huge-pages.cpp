#include "huge-pages.h"

#if defined(__linux__)

#include <sys/mman.h>

#include <cstdint>

#if !defined(MADV_COLLAPSE)
#    define MADV_COLLAPSE 25 // Linux 6.1; older kernels answer EINVAL
#endif

void llama_use_huge_pages(void * data, size_t size) {
    const uintptr_t page  = llama_huge_page;
    const uintptr_t begin = ((uintptr_t) data + page - 1) & ~(page - 1);
    const uintptr_t end   = ((uintptr_t) data + size) & ~(page - 1);
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);
        madvise((void *) begin, end - begin, MADV_COLLAPSE);
    }
}

#else

void llama_use_huge_pages(void *, size_t) {}

#endif

void llama_use_huge_pages(ggml_backend_buffer_t buffer) {
    if (ggml_backend_buffer_is_host(buffer)) {
        llama_use_huge_pages(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    }
}
