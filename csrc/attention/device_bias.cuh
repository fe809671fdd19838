#pragma once
// The bias of a tile of scores, in shared memory: it comes by cp.async like the tiles of rows, in its own dtype.

#include "device_mask.cuh"

namespace fused::cuda {

// kRows queries by kCols keys. A float32's size each, so that the dtype need not be known when memory is laid out.
template <int kRows, int kCols>
struct BiasTile {
  char* data;

  static constexpr int kBytes = kRows * kCols * int(sizeof(float));

  // bfloat16 moves as float16 does: the bits are what counts.
  FT_DEVICE Tile<float, kCols> floats() const { return {reinterpret_cast<float*>(data)}; }
  FT_DEVICE Tile<__half, kCols> halves() const { return {reinterpret_cast<__half*>(data)}; }

  // Starts to copy the bias of queries row ... and keys key ...
  template <int kThreads>
  FT_DEVICE void load(const Attention& args, const Sequence& s, int head, int row, int key) const {
    const int64_t* stride = args.bias.stride;
    const int64_t at = s.b * stride[0] + head * stride[1] + row * stride[2] + key * stride[3];
    const auto copy = [&](const auto& tile, auto* data) {
      using B = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      load_tile<kRows, kThreads>(tile,
                                 Source<B>{data + at, stride[2], s.L - row, s.S - key, args.bias_vectors, stride[3]});
    };
    if (args.bias_dtype == DType::f32)
      copy(floats(), static_cast<const float*>(args.bias.data));
    else
      copy(halves(), static_cast<const __half*>(args.bias.data));
  }

  FT_DEVICE float halves_to_float(const Attention& args, uint32_t bits) const {
    if (args.bias_dtype == DType::bf16) return __uint_as_float(bits << 16);
    const uint16_t half = uint16_t(bits);
    __half value;
    memcpy(&value, &half, sizeof value);
    return to_float(value);
  }

  FT_DEVICE float one(const Attention& args, int row, int key) const {
    if (args.bias_dtype == DType::f32) return *floats().at(row, key);
    return halves_to_float(args, *reinterpret_cast<const uint16_t*>(halves().at(row, key)));
  }
};

// scale * score + bias, and -inf where the bias is.
FT_DEVICE float biased(float score, float scale, float bias) {
  return bias == -INFINITY ? -INFINITY : fmaf(score, scale, bias);
}

// Queries as rows, which begin at `tile_row` (a multiple of 16) of the tile.
template <int R, int N, int kRows, int kCols>
FT_DEVICE void add_bias(const Attention& args, const BiasTile<kRows, kCols>& bias, int tile_row, float scale,
                        float (&scores)[R][N][4]) {
  const auto add = [&](const auto& tile, const auto& two) {
    constexpr int kChunk = std::decay_t<decltype(tile)>::kChunk;
    const int place = tile.place(group(), pair() / kChunk) + tile_row * kCols + pair() % kChunk;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto* from = tile.data + tile.further(place, n * 8 / kChunk) + (r * 16 + half * 8) * kCols;
          const float2 each = two(from);
          scores[r][n][half * 2] = biased(scores[r][n][half * 2], scale, each.x);
          scores[r][n][half * 2 + 1] = biased(scores[r][n][half * 2 + 1], scale, each.y);
        }
  };
  if (args.bias_dtype == DType::f32)
    add(bias.floats(), [](const float* from) { return *reinterpret_cast<const float2*>(from); });
  else
    add(bias.halves(), [&](const __half* from) -> float2 {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
      return {bias.halves_to_float(args, both & 0xffffu), bias.halves_to_float(args, both >> 16)};
    });
}

// Keys as rows, which begin at column `tile_col` of the tile; its queries are the columns of the scores.
template <int R, int kRows, int kCols>
FT_DEVICE void add_bias_columns(const Attention& args, const BiasTile<kRows, kCols>& bias, int tile_col, float scale,
                                float (&scores)[R][kRows / 8][4]) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[r][n][i] = biased(scores[r][n][i], scale,
                                 bias.one(args, n * 8 + pair() + i % 2, tile_col + r * 16 + i / 2 * 8 + group()));
}

}  // namespace fused::cuda
