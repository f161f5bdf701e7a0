#include "huge-pages.h"

#if defined(__linux__)

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

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

// Pages of private memory that are given back come again as zeros; false: not all of them were, the memory is to be written.
static bool zero_pages(char * data, size_t size) {
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) data + page - 1) & ~(page - 1);
    const uintptr_t end   = ((uintptr_t) data + size) & ~(page - 1);
    if (begin >= end || madvise((void *) begin, end - begin, MADV_DONTNEED) != 0) {
        return false;
    }
    memset(data, 0, begin - (uintptr_t) data);
    memset((void *) end, 0, (uintptr_t) data + size - end);
    return true;
}

#else

void llama_use_huge_pages(void *, size_t) {}

static bool zero_pages(char *, size_t) { return false; }

#endif

void llama_use_huge_pages(ggml_backend_buffer_t buffer) {
    if (ggml_backend_buffer_is_host(buffer)) {
        llama_use_huge_pages(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    }
}

void llama_clear_cells(ggml_backend_buffer_t buffer) {
    const bool from_malloc = ggml_backend_buffer_get_type(buffer) == ggml_backend_cpu_buffer_type();
    const bool zeroed = from_malloc && zero_pages((char *) ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    llama_use_huge_pages(buffer);
    if (!zeroed) {
        ggml_backend_buffer_clear(buffer, 0);
    }
}
