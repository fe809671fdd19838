#pragma once
// What the next task reads and writes, asked for while this one is computed.
//
// A head of few queries and keys is little work for the memory it moves (27 of each, 64 wide: 2.3 us of multiply-adds
// and 27 KB, which take 2.7 us), and lies apart from the others, so that the hardware's own prefetcher begins anew at
// each of its tensors. Lines are asked for one by one between the products' groups of rows, for all of them at once
// would be waited for.

#include "tiles.h"

namespace fused::cpu::FT_ISA {

class Ahead {
 public:
  // `rows` rows from `row` on of a tensor of `args`.
  template <class A>
  void add(const A& args, const Rows& x, const Sequence& s, int64_t head, int64_t token0, int64_t row, int64_t rows) {
    if (rows <= 0) return;
    with_storage(args.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto* data = reinterpret_cast<const char*>(row_of<const T>(args, x, s, head, token0, row));
      parts_[count_++] = {data, x.row * int64_t(sizeof(T)), rows};
      lines_ = int((args.D * int64_t(sizeof(T)) + 63) / 64);
    });
    all_ += rows * lines_;
  }
  // ask() will be called about so often.
  void spread(int64_t asks) { each_ = asks > 0 ? int((all_ + asks - 1) / asks) : 0; }

  FT_INLINE void ask() {
    for (int n = each_; n > 0 && part_ < count_; --n) {
      __builtin_prefetch(parts_[part_].data + line_ * 64, 0, 2);
      if (++line_ < lines_) continue;
      line_ = 0;
      parts_[part_].data += parts_[part_].stride;
      if (--parts_[part_].rows == 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* data;
    int64_t stride, rows;
  };
  Part parts_[4];
  int count_ = 0, part_ = 0, line_ = 0, lines_ = 0, each_ = 0;
  int64_t all_ = 0;
};

}  // namespace fused::cpu::FT_ISA
