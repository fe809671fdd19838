#include "memory.h"

#include <cstring>

#include "../common/check.h"
#include "../common/parallel.h"

namespace fused::cpu {

void place_memory(const PlaceMemory& args) {
  const int64_t H = args.H, S = args.S, D = args.D, row = args.layers * 2 * H * D;
  FT_REQUIRE(args.layers >= 0 && args.B >= 0 && H >= 0 && S >= 0 && D >= 0, "sizes must not be negative");
  const size_t bytes = size_t(D) * sizeof(float);
  // A task is one layer of one sequence: what it reads, a few KiB of each token, stays in the second cache.
  parallel_for(args.B * args.layers, args.B * S * row, [&](int64_t task) {
    const int64_t b = task / args.layers, layer = task % args.layers;
    const int64_t first = args.offsets ? args.offsets[b] : b * S;
    const int64_t tokens = args.offsets ? args.offsets[b + 1] - first : S;
    const float* keys = args.rows + first * row + layer * 2 * H * D;
    float* to = args.out + (layer * args.B + b) * H * S * 2 * D;
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < tokens; ++t) {
        std::memcpy(to + (h * S + t) * 2 * D, keys + t * row + h * D, bytes);
        std::memcpy(to + (h * S + t) * 2 * D + D, keys + t * row + (H + h) * D, bytes);
      }
  });
}

}  // namespace fused::cpu
