#pragma once
// cp.async: the copies that a thread has on their way, in groups, oldest first.

#include <cstddef>
#include <vector>

namespace emu {

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes;  // what is beyond valid_bytes becomes 0
};

// Of the running thread.
void issue_copy(const Copy& copy);
void commit_copies();
void wait_for_copies(int groups_left);  // until no more than that many groups are on their way

class Copies {
 public:
  void clear();
  bool pending() const { return !copies_.empty(); }

  void issue(const Copy& copy);
  void commit();
  void wait(int groups_left);

 private:
  std::vector<Copy> copies_;
  std::vector<std::size_t> group_ends_;  // where each committed group ends in copies_
};

}  // namespace emu
