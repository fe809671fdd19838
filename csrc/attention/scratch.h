#pragma once
// Sizes of the CPU kernels' tiles, and with them of the scratch memory the caller must bring.

#include <cstdint>

namespace fused::cpu {

constexpr int kKeys = 64;      // keys in a block
constexpr int kMaxVecs = 3;    // vectors of queries in a tile
constexpr int kMaxLanes = 48;  // queries in the widest tile of any instruction set
constexpr int kQueries = 192;  // in a chunk, at most: of 4 such tiles, or more that are narrower

constexpr int64_t kTileFloats = kKeys * kMaxLanes;  // one tile of scores

// One block's keep bytes, beside a tile of queries.
struct MaskTile {
  uint8_t keep[kKeys][kMaxLanes];  // 0 = masked
  bool has_keep;                   // whether this block needs them
};
constexpr int64_t kMaskTileFloats = (sizeof(MaskTile) + 63) / 64 * 16;

constexpr int64_t row_floats(int64_t D) { return (D + 15) / 16 * 16; }           // a row, in whole vectors
constexpr int64_t panel_floats(int64_t D) { return row_floats(D) * kMaxLanes; }  // [D][lanes] or [lanes][D]
constexpr int64_t block_floats(int64_t D) { return 4 * kKeys * row_floats(D); }  // keys, values and their safe twins
constexpr int64_t forward_state_floats(int64_t D) { return 2 * panel_floats(D) + 2 * kMaxLanes; }
constexpr int64_t backward_state_floats(int64_t D) { return 5 * panel_floats(D) + 2 * kMaxLanes; }

// Floats that each thread needs.
constexpr int64_t forward_scratch(int64_t D) {
  return kQueries / kMaxLanes * forward_state_floats(D) + block_floats(D) + kTileFloats + kMaskTileFloats;
}
constexpr int64_t backward_scratch(int64_t D) {
  return kQueries / kMaxLanes * backward_state_floats(D) + block_floats(D) + 3 * kTileFloats + kMaskTileFloats;
}
constexpr int64_t weights_scratch(int64_t D) {
  return block_floats(D) + kTileFloats + kMaskTileFloats + 2 * panel_floats(D) + kMaxLanes;
}

}  // namespace fused::cpu
