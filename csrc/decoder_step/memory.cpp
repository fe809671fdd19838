#include "memory.h"

#include <cstring>

#include "../common/check.h"
#include "../common/parallel.h"

namespace fused::cpu {

void place_memory(const PlaceMemory& args) {
  FT_REQUIRE(args.parts >= 0 && args.B >= 0 && args.H >= 0 && args.S >= 0 && args.D >= 0, "sizes must not be negative");
  const int64_t row = args.parts * args.H * args.D, head = args.S * args.D;
  const size_t bytes = size_t(args.D) * sizeof(float);
  // A task is one part of one sequence: what it reads, a few hundred bytes of each token, stays in the second cache.
  parallel_for(args.B * args.parts, args.B * args.S * row, [&](int64_t task) {
    const int64_t b = task / args.parts, part = task % args.parts;
    const int64_t first = args.offsets ? args.offsets[b] : b * args.S;
    const int64_t tokens = args.offsets ? args.offsets[b + 1] - first : args.S;
    const float* from = args.rows + first * row + part * args.H * args.D;
    float* to = args.out + (part * args.B + b) * args.H * head;
    for (int64_t h = 0; h < args.H; ++h)
      for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + h * head + t * args.D, from + t * row + h * args.D, bytes);
  });
}

}  // namespace fused::cpu
