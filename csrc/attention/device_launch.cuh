#pragma once
// What the launchers of attention share: checks, and the choice of a kernel by head width.

#include "../common/check.h"
#include "../common/launch.cuh"
#include "attention.h"

namespace fused::cuda {

inline void check(const Attention& args) {
  constexpr int64_t kLongest = int64_t(1) << 30;
  FT_REQUIRE(args.D >= 1 && args.D <= kMaxHeadWidth, "the head width must be 1 ... 256, got " << args.D);
  FT_REQUIRE(args.Hk >= 1 && args.H % args.Hk == 0, "H must be a multiple of Hk, got " << args.H << " and " << args.Hk);
  FT_REQUIRE(args.L < kLongest && args.S < kLongest, "sequences must be shorter than 2^30");
  FT_REQUIRE(args.keep.data == nullptr || args.keep_bits != nullptr, "memory for the bits of keep is missing");
}

// Whether 16 bytes at a time can be moved from or to x, which has `heads` heads.
inline bool is_aligned(const Attention& args, const Rows& x, int64_t heads) {
  const int64_t bytes = args.dtype == DType::f32 ? 4 : 2;
  const bool batches = args.B > 1 && args.q_offsets == nullptr;
  int64_t all = int64_t(reinterpret_cast<uintptr_t>(x.data));
  if (batches) all |= x.batch * bytes;
  if (heads > 1) all |= x.head * bytes;
  all |= x.row * bytes;  // even of a single row: what lies beyond is not read, but must be aligned
  return all % 16 == 0;
}

inline bool bias_is_aligned(const Attention& args) {
  const int64_t *stride = args.bias.stride, bytes = args.bias_dtype == DType::f32 ? 4 : 2;
  const int64_t all =
      int64_t(reinterpret_cast<uintptr_t>(args.bias.data)) | (stride[0] | stride[1] | stride[2]) * bytes;
  return stride[3] == 1 && all % 16 == 0;
}

template <int kCount>
struct Columns {
  static constexpr int value = kCount;
};

// f(Columns<kCols>{}) with the columns of the tiles for head width D: what lies beyond D is zeros and wasted work, but
// each width is a kernel to compile.
template <class T, class F>
void with_columns(int64_t D, F&& f) {
  if (D <= 32) return f(Columns<32>{});
  if (D <= 64) return f(Columns<64>{});
  if constexpr (sizeof(T) == 2)
    if (D <= 96) return f(Columns<96>{});
  if (D <= 128) return f(Columns<128>{});
  f(Columns<256>{});
}

// Packs `keep` into args.keep_bits, where device_mask.cuh looks for it; nothing if there is none.
void pack_keep_bits(Attention& args, void* stream);

// What every launcher does first: sets the fields that are the launchers' to set. `vectors` is about q, k and v.
inline void prepare(Attention& args, void* stream) {
  args.vectors =
      is_aligned(args, args.q, args.H) && is_aligned(args, args.k, args.Hk) && is_aligned(args, args.v, args.Hk);
  args.bias_vectors = bias_is_aligned(args);
  pack_keep_bits(args, stream);
}

}  // namespace fused::cuda
