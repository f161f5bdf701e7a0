// Huge pages for the KV cache: rows gathered from all over it miss the TLB far less often.

#pragma once

#include "ggml-backend.h"

#include <cstddef>

constexpr size_t llama_huge_page = 2u << 20;

// Asks the system to back this memory by huge pages, what is in use already included. A hint: no effect where
// the system has none.
void llama_use_huge_pages(void * data, size_t size);
void llama_use_huge_pages(ggml_backend_buffer_t buffer); // of the host; others stay as they are

// Fills a new buffer of cells with zeros, on Linux without touching it: the system gives zeroed pages as cells are used, and those
// that never are take no memory and no time.
void llama_clear_cells(ggml_backend_buffer_t buffer);
