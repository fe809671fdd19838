#pragma once
// The encoder's output as the decoder's attention reads it. One product makes keys and values of all layers, a row for
// each token; here each head's are put side by side, where a step finds them one after another:
//
//   rows (T, layers, 2, H, D), packed: sequence b is tokens offsets[b] ... offsets[b + 1] - 1; nullptr: T = B * S
//   out  (layers, B, H, S, 2, D) contiguous, of which what lies beyond a sequence's tokens is not written
//
// Moves 8 bytes a number; bound by memory.

#include <cstdint>

namespace fused::cpu {

struct PlaceMemory {
  const float* rows = nullptr;
  const int64_t* offsets = nullptr;  // (B + 1,)
  float* out = nullptr;
  int64_t layers = 0, B = 0, H = 0, S = 0, D = 0;
};

void place_memory(const PlaceMemory& args);

}  // namespace fused::cpu
