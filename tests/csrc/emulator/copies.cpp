#include "copies.h"

#include <cstdint>

#include "memory.h"
#include "thread.h"

namespace emu {

void issue_copy(const Copy& copy) { running().copies.issue(copy); }
void commit_copies() { running().copies.commit(); }
void wait_for_copies(int groups_left) { running().copies.wait(groups_left); }

void Copies::clear() {
  copies_.clear();
  group_ends_.clear();
}

void Copies::issue(const Copy& copy) {
  if (copy.valid_bytes < 0 || copy.valid_bytes > copy.bytes)
    fail("cp.async of %d bytes of %d", copy.valid_bytes, copy.bytes);
  const uintptr_t either = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (either % uintptr_t(copy.bytes) != 0)
    fail("cp.async of %d bytes between addresses that are not multiples of it", copy.bytes);
  if (!block.lazy) copy_with_zeros(copy.to, copy.from, copy.bytes, copy.valid_bytes);
  copies_.push_back(copy);
}

void Copies::commit() { group_ends_.push_back(copies_.size()); }

void Copies::wait(int groups_left) {
  if (group_ends_.size() <= size_t(groups_left)) return;
  const size_t groups = group_ends_.size() - size_t(groups_left), count = group_ends_[groups - 1];
  if (block.lazy)
    for (size_t i = 0; i < count; ++i)
      copy_with_zeros(copies_[i].to, copies_[i].from, copies_[i].bytes, copies_[i].valid_bytes);
  copies_.erase(copies_.begin(), copies_.begin() + long(count));
  group_ends_.erase(group_ends_.begin(), group_ends_.begin() + long(groups));
  for (size_t& end : group_ends_) end -= count;
}

}  // namespace emu
