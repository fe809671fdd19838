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

class Copies {
 public:
  void clear();
  bool pending() const { return !copies_.empty(); }

  void issue(const Copy& copy);
  void commit();
  void wait(int groups_left);  // until no more than that many groups are on their way
  void wait_all();

 private:
  void land(std::size_t count);

  std::vector<Copy> copies_;
  std::vector<std::size_t> group_ends_;  // where each committed group ends in copies_
};

}  // namespace emu
