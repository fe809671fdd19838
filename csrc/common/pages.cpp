#include "pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
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

// Mappings that wait for their next user, by size.
class Waiting {
 public:
  Mapping* take(size_t bytes) {
    const size_t size = with_slack(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = mappings_.lower_bound(size);
    Mapping* mapping = nullptr;
    if (found != mappings_.end() && found->first <= size + size / 2) {  // a larger one is for a larger request
      mapping = found->second;
      waiting_ -= found->first;
      mappings_.erase(found);
    }
    if (!mapping) {
      while (!mappings_.empty() && used_ + waiting_ + size > most_) drop_largest();
      mapping = new Mapping(size);
    }
    used_ += mapping->bytes;
    most_ = std::max(most_, used_);
    return mapping;
  }

  void give_back(Mapping* mapping) noexcept {
    // Advice again: taken back or not, the memory can be written to.
    madvise(mapping->address, mapping->bytes, MADV_FREE);
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= mapping->bytes;
    waiting_ += mapping->bytes;
    mappings_.emplace(mapping->bytes, mapping);
  }

 private:
  // A quarter more at most, so that batches of about a size share their memory. What is not touched takes none.
  static size_t with_slack(size_t bytes) {
    size_t step = kPage;
    while (step * 8 <= bytes) step *= 2;
    return rounded(bytes, step);
  }

  void drop_largest() {
    const auto last = std::prev(mappings_.end());
    waiting_ -= last->first;
    delete last->second;
    mappings_.erase(last);
  }

  std::mutex mutex_;
  std::multimap<size_t, Mapping*> mappings_;
  size_t used_ = 0, waiting_ = 0, most_ = 0;
};

}  // namespace

std::shared_ptr<void> reused_pages(size_t bytes) {
  static Waiting& waiting = *new Waiting;  // never destroyed: tensors may outlive what is static
  Mapping* const mapping = waiting.take(bytes == 0 ? 1 : bytes);
  return std::shared_ptr<void>(mapping->address, [mapping](void*) { waiting.give_back(mapping); });
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
