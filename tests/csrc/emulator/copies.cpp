#include "copies.h"

#include <cstdint>

#include "block.h"
#include "memory.h"

namespace emu {

void Copies::clear() {
  copies_.clear();
  group_ends_.clear();
}

void Copies::issue(const Copy& copy) {
  const uintptr_t either = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (either % uintptr_t(copy.bytes) != 0)
    fail("cp.async of %d bytes between addresses that are not multiples of it", copy.bytes);
  if (!block.lazy) copy_with_zeros(copy.to, copy.from, copy.bytes, copy.valid_bytes);
  copies_.push_back(copy);
}

void Copies::commit() { group_ends_.push_back(copies_.size()); }

void Copies::wait(int groups_left) {
  if (groups_left < 0) fail("cp.async.wait_group takes no negative number");
  if (group_ends_.size() <= size_t(groups_left)) return;
  const size_t groups = group_ends_.size() - size_t(groups_left), count = group_ends_[groups - 1];
  land(count);
  group_ends_.erase(group_ends_.begin(), group_ends_.begin() + long(groups));
  for (size_t& end : group_ends_) end -= count;
}

void Copies::wait_all() {
  land(copies_.size());
  group_ends_.clear();
}

void Copies::land(size_t count) {
  if (block.lazy)
    for (size_t i = 0; i < count; ++i)
      copy_with_zeros(copies_[i].to, copies_[i].from, copies_[i].bytes, copies_[i].valid_bytes);
  copies_.erase(copies_.begin(), copies_.begin() + long(count));
}

}  // namespace emu
