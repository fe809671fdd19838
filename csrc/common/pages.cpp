#include "pages.h"

#include <sys/mman.h>

#include <mutex>
#include <new>

namespace fused::cpu {
namespace {

constexpr size_t kPage = size_t(2) << 20, kArena = size_t(32) << 20, kAlignment = 64;

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

struct Mapping {
  char* address = nullptr;
  size_t bytes = 0, used = 0;

  explicit Mapping(size_t wanted) : bytes(rounded(wanted, kPage)) {
    // One page more, so that there is an address among them where a page can begin.
    const size_t all = bytes + kPage;
    void* raw = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(raw);
    address = begin + (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
    if (address > begin) munmap(begin, size_t(address - begin));
    if (begin + all > address + bytes) munmap(address + bytes, size_t(begin + all - address - bytes));
    madvise(address, bytes, MADV_HUGEPAGE);  // advice: where it is not taken, all still works
  }
  Mapping(const Mapping&) = delete;
  ~Mapping() { munmap(address, bytes); }
};

}  // namespace

void advise_pages(void* address, size_t bytes) {
  const auto begin = rounded(reinterpret_cast<uintptr_t>(address), kPage);
  const auto end = (reinterpret_cast<uintptr_t>(address) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

std::shared_ptr<void> allocate_pages(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Mapping> latest;  // that small pieces are cut from
  const size_t size = rounded(bytes == 0 ? 1 : bytes, kAlignment);
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Mapping> mapping = latest.lock();
  if (!mapping || mapping->bytes - mapping->used < size) {
    mapping = std::make_shared<Mapping>(size < kArena ? kArena : size);
    latest = mapping;
  }
  char* const piece = mapping->address + mapping->used;
  mapping->used += size;
  return std::shared_ptr<void>(mapping, piece);
}

}  // namespace fused::cpu
