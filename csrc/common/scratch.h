#pragma once
// Working memory that a thread keeps from call to call: fresh pages for each would cost as much as a small kernel does.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused::cpu {

// Pieces of it, aligned to 64 bytes. `Use` is whose memory it is: a kernel that calls another has its own.
template <class Use>
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    static thread_local std::vector<char> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    next_ = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  }
  static size_t room(int64_t bytes) { return size_t(bytes + 63) / 64 * 64; }
  template <class T>
  T* take(int64_t count) {
    char* const here = next_;
    next_ += room(count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(here);
  }

 private:
  char* next_;
};

}  // namespace fused::cpu
