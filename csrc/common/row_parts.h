#pragma once
// Sums over rows on the CPU are taken in groups of rows, each into its own partial sums, which are then added in order.

#include <algorithm>
#include <cstdint>

namespace fused::cpu {

// Into how many groups M rows are cut: M alone decides, so that the number of threads can't show in the result.
inline int64_t row_parts(int64_t M) {
  constexpr int64_t kFewestRows = 4, kMostRows = 32, kFewParts = 16;
  const int64_t rows = std::clamp(M / kFewParts, kFewestRows, kMostRows);
  return std::max<int64_t>(1, (M + rows - 1) / rows);
}

}  // namespace fused::cpu
