#pragma once
// Tiles of rows in shared memory, and the moves between them and global memory.
//
// A row is kCols elements, in chunks of 16 bytes whose places are exchanged by the row's number, so that the 8 rows of
// one chunk column lie in 8 different groups of banks: what ldmatrix and the float32 product read at once. Columns
// beyond the head width and rows beyond the sequence are 0, whatever memory holds there.

#include "../common/copy_async.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace fused::cuda {

template <class T, int kCols>
struct Tile {
  static constexpr int kChunk = kVectorBytes / int(sizeof(T));  // elements of a chunk
  static constexpr int kChunks = kCols / kChunk;                // of a row
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;       // chunks that change places with each other
  static_assert(kChunks % kGroup == 0, "rows of whole groups");

  T* data;

  // Which of its group's places chunk 0 of the row takes; it repeats every 8 rows.
  static FT_DEVICE int turn(int row) { return kGroup == 8 ? row & 7 : (row >> 1) & 3; }

  // Where chunk c of a row lies, in elements from `data`.
  static FT_DEVICE int place(int row, int c) { return row * kCols + (c ^ turn(row)) * kChunk; }

  // place(row, c + steps) out of place(row, c), where c and steps have no bit in common. For known steps that is one
  // instruction, and no register to keep an address in.
  static FT_DEVICE int further(int place, int steps) {
    return (place ^ (steps % kGroup * kChunk)) + steps / kGroup * kGroup * kChunk;
  }

  FT_DEVICE T* chunk(int row, int c) const { return data + place(row, c); }
  FT_DEVICE T* at(int row, int col) const { return chunk(row, col / kChunk) + col % kChunk; }

  static constexpr int bytes(int rows) { return rows * kCols * int(sizeof(T)); }
};

// Rows in global memory: `count` of them, `width` elements each. vectors: every row starts at a multiple of 16 bytes,
// and its elements are neighbours.
template <class T>
struct Source {
  const T* data;
  int64_t stride;
  int count, width;
  bool vectors;
  int64_t col_stride = 1;
};

// How kThreads threads share the chunks of kRows rows: thread (row, c) has the chunks (row + i kStep, c + j kAcross).
template <int kRows, int kChunks, int kThreads>
struct Share {
  static constexpr int kAcross =
      kChunks % 64 == 0 ? 64 : (kChunks % 32 == 0 ? 32 : (kChunks % 16 == 0 ? 16 : (kChunks % 8 == 0 ? 8 : 4)));
  static constexpr int kStep = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && kChunks % kAcross == 0, "threads in whole rows");

  int row = int(threadIdx.x) / kAcross, c = int(threadIdx.x) % kAcross;

  // Calls f(row, c) for this thread's chunks, one after another.
  template <class F>
  FT_DEVICE void for_each(F&& f) const {
#pragma unroll 1
    for (int r = row; r < kRows; r += kStep)
#pragma unroll 1
      for (int j = c; j < kChunks; j += kAcross) f(r, j);
  }
};

// Starts to copy kRows rows; they are there after copy_async_wait and a barrier.
template <int kRows, int kThreads, class T, int kCols>
FT_DEVICE void load_tile(const Tile<T, kCols>& tile, const Source<T>& from) {
  constexpr int kChunk = Tile<T, kCols>::kChunk, kChunks = Tile<T, kCols>::kChunks;
  using Mine = Share<kRows, kChunks, kThreads>;
  const Mine mine;
  if (from.vectors) {
    const T* source = from.data + mine.row * from.stride + mine.c * kChunk;
#pragma unroll
    for (int i = 0; i < kRows; i += Mine::kStep) {
      const int row = mine.row + i;
      if (kRows % Mine::kStep != 0 && row >= kRows) break;
#pragma unroll
      for (int j = 0; j < kChunks; j += Mine::kAcross) {
        const int valid = row < from.count ? max(0, min(kChunk, from.width - (mine.c + j) * kChunk)) : 0;
        copy_async<kVectorBytes>(tile.chunk(row, mine.c + j), source + j * kChunk, valid * int(sizeof(T)));
      }
      source += Mine::kStep * from.stride;
    }
  } else {  // element by element
    mine.for_each([&](int row, int c) {
      T* chunk = tile.chunk(row, c);
      const T* source = from.data + row * from.stride;
#pragma unroll 1
      for (int i = 0; i < kChunk; ++i) {
        const int col = c * kChunk + i;
        if (row < from.count && col < from.width)
          chunk[i] = source[col * from.col_stride];
        else
          from_float(0.0f, chunk[i]);
      }
    });
  }
}

// ---------------------------------------------------------------- NaN and infinity, which 0 does not wipe out

// Exponent bits of the elements in a 32-bit word: all ones where not finite. `below` added to |x| carries into the sign
// bit exactly then.
template <class T>
struct FiniteBits;
template <>
struct FiniteBits<float> {
  static constexpr uint32_t magnitude = 0x7fffffffu, below = 0x00800000u, sign = 0x80000000u;
};
template <>
struct FiniteBits<__half> {
  static constexpr uint32_t magnitude = 0x7fff7fffu, below = 0x04000400u, sign = 0x80008000u;
};
template <>
struct FiniteBits<__nv_bfloat16> {
  static constexpr uint32_t magnitude = 0x7fff7fffu, below = 0x00800080u, sign = 0x80008000u;
};

template <class T>
FT_DEVICE bool is_finite(const uint4& chunk) {
  using Bits = FiniteBits<T>;
  const uint32_t carried = ((chunk.x & Bits::magnitude) + Bits::below) | ((chunk.y & Bits::magnitude) + Bits::below) |
                           ((chunk.z & Bits::magnitude) + Bits::below) | ((chunk.w & Bits::magnitude) + Bits::below);
  return (carried & Bits::sign) == 0;
}

// Whether the chunks that this thread moved are finite: to be asked after its wait, before or after a barrier.
template <int kRows, int kThreads, class T, int kCols>
FT_DEVICE bool own_chunks_are_finite(const Tile<T, kCols>& tile) {
  bool finite = true;
  Share<kRows, Tile<T, kCols>::kChunks, kThreads>().for_each(
      [&](int row, int c) { finite &= is_finite<T>(*reinterpret_cast<const uint4*>(tile.chunk(row, c))); });
  return finite;
}

// Replaces NaN and infinities by 0 in the chunks that this thread moved, in rows of which f(row) holds.
template <int kRows, int kThreads, class T, int kCols, class F>
FT_DEVICE void clean_own_chunks(const Tile<T, kCols>& tile, F&& f) {
  Share<kRows, Tile<T, kCols>::kChunks, kThreads>().for_each([&](int row, int c) {
    T* chunk = tile.chunk(row, c);
    if (is_finite<T>(*reinterpret_cast<const uint4*>(chunk)) || !f(row)) return;
#pragma unroll 1
    for (int i = 0; i < Tile<T, kCols>::kChunk; ++i)
      if (!(fabsf(to_float(chunk[i])) < INFINITY)) from_float(0.0f, chunk[i]);
  });
}

// ---------------------------------------------------------------- a warp's rows to global memory

// The warp's number, in a way that tells the compiler that the whole warp has the same one: branches on what follows
// from it then need no code for lanes that go different ways.
FT_DEVICE int warp_id() { return __shfl_sync(kWholeWarp, int(threadIdx.x) / kWarp, 0); }

// How a warp holds a 16 x 8 tile of float32 (common/mma.cuh): element i is (group + 8 (i / 2), pair + i % 2).
FT_DEVICE int lane_id() { return int(threadIdx.x) % kWarp; }
FT_DEVICE int group() { return lane_id() / 4; }
FT_DEVICE int pair() { return lane_id() % 4 * 2; }

// Two neighbours, rounded to T.
template <class T>
FT_DEVICE void store_pair(T* p, float first, float second) {
  Pack<T, 2> pack;
  from_float(first, pack.element[0]);
  from_float(second, pack.element[1]);
  *reinterpret_cast<Pack<T, 2>*>(p) = pack;
}

// Writes a warp's 16 * R rows of 8 * N columns, out[i] = factor[row's r][i / 2] * acc, to columns first_col ... of `to`
// (its first row is the warp's first). Goes through rows tile_row ... of `stage`, whose columns nobody else may use.
template <int R, int N, class T, int kCols>
FT_DEVICE void store_rows(const Tile<T, kCols>& stage, int tile_row, int first_col, const float (&acc)[R][N][4],
                          const float (&factor)[R][2], T* to, int64_t stride, int count, int width, bool vectors) {
  constexpr int kChunk = Tile<T, kCols>::kChunk, kChunks = N * 8 / kChunk;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(stage.at(tile_row + r * 16 + half * 8 + group(), first_col + n * 8 + pair()),
                   acc[r][n][half * 2] * factor[r][half], acc[r][n][half * 2 + 1] * factor[r][half]);
  __syncwarp();
  for (int id = lane_id(); id < 16 * R * kChunks; id += kWarp) {
    const int row = id / kChunks, col = first_col + id % kChunks * kChunk;
    if (row >= count || col >= width) continue;
    const T* from = stage.at(tile_row + row, col);
    T* out = to + row * stride + col;
    if (vectors && col + kChunk <= width) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk && col + i < width; ++i) out[i] = from[i];
    }
  }
  __syncwarp();
}

}  // namespace fused::cuda
