#pragma once
// Memory that every decoding step reads whole, weights and caches: on 2 MiB pages where the system gives them, since
// with 4 KiB pages the walk through the page tables takes up to a third of the time.

#include <cstddef>
#include <memory>

namespace fused::cpu {

// `bytes` of zeros, aligned to 64 bytes. Small pieces share pages; what they share is freed with the last of them.
std::shared_ptr<void> allocate_pages(size_t bytes);

// `bytes` of whatever lies there, aligned to a page, for as long as somebody holds them. Memory that was given back is
// handed out again: what the system gives is zeroed by it, page by page at the first touch, and that took 1.0 s of the
// 4.6 s of a translation (256 hypotheses, whose logits alone are 32 MB a step). Kept is no more than was ever in use at
// once, and the system may take that back when it runs short.
std::shared_ptr<void> reused_pages(size_t bytes);

}  // namespace fused::cpu
