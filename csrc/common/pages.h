#pragma once
// Memory for weights that every decoding step reads whole: on 2 MiB pages where the system gives them, since with 4 KiB
// pages the walk through the page tables takes up to a third of the time.

#include <cstddef>
#include <memory>

namespace fused::cpu {

// `bytes` of zeros, aligned to 64 bytes. Small pieces share pages; what they share is freed with the last of them.
std::shared_ptr<void> allocate_pages(size_t bytes);

}  // namespace fused::cpu
