// Huge pages for the KV cache: rows gathered from all over it miss the TLB far less often.

#pragma once

#include <cstddef>

constexpr size_t llama_huge_page = 2u << 20;

// Asks the system to back this memory by huge pages, what is in use already included. A hint: no effect where
// the system has none.
void llama_use_huge_pages(void * data, size_t size);
