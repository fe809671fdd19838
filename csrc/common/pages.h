#pragma once
// Memory that every decoding step reads whole, weights and caches: on 2 MiB pages where the system gives them, since
// with 4 KiB pages the walk through the page tables takes up to a third of the time.

#include <cstddef>
#include <memory>

namespace fused::cpu {

// `bytes` of zeros, aligned to 64 bytes. Small pieces share pages; what they share is freed with the last of them.
std::shared_ptr<void> allocate_pages(size_t bytes);

// Asks for such pages under memory that somebody else has allocated and nobody has touched.
void advise_pages(void* address, size_t bytes);

}  // namespace fused::cpu
