// Decode attention on CUDA: the keys of a head split over blocks, a block's keys over its lanes, parts merged in order.
//
// A block has up to kMaxRows query rows (the L queries of the query heads that share a key head) and one split of that
// head's keys. A key is read by as many lanes as its columns need, eight columns a lane, 16 bytes a load; so a warp has
// 32 / kLanes keys side by side, each group of lanes with an online softmax of its own (Milakov and Gimelshein 2018)
// for every row. Keys and values are loaded once for all rows. At the end the groups' sums meet in shared memory; where
// there are several splits, a second kernel merges theirs. Both go through the parts in order: always the same bits.
//
// Reads 2 * length * D * sizeof(T) bytes a key head, and nothing else worth counting: bound by memory, up to about
// eight rows a block. That is why a product goes element by element: tensor cores would have 16 rows for these.

#include "../common/exp2.cuh"
#include "../common/integers.cuh"
#include "../common/reduce.cuh"
#include "../common/vector_width.cuh"
#include "decode_attention.h"

namespace fused::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;         // of a lane
constexpr int kMaxRows = 8;         // query rows of a block: 16 floats a lane each
constexpr int kMergeThreads = 128;  // of the block that merges a query's splits
constexpr int kMaxHeadWidth = 256;  // 32 lanes of eight columns
constexpr int kNarrowest = 8;       // lanes of a key; a head of fewer than 64 columns leaves some of them idle

// A number out of memory, in 0 ... highest: whatever it is, it does not lead out of the cache.
FT_DEVICE int64_t clamped(const DecodeAttention::Integers& x, int64_t index, int64_t highest) {
  const int64_t number = integer_at(x.data, x.wide, index);
  return number < 0 ? 0 : number > highest ? highest : number;
}

FT_DEVICE int keys_of(const DecodeAttention& args, int64_t b) {
  return int(args.lengths.data == nullptr ? args.C : clamped(args.lengths, b, args.C));
}

template <class T>
FT_DEVICE T* element(const DecodeAttention::Tensor& x, int64_t i0, int64_t i1, int64_t i2) {
  return static_cast<T*>(x.data) + i0 * x.stride[0] + i1 * x.stride[1] + i2 * x.stride[2];
}

// What to subtract from scores that may all be -inf, so that exp gives 0 and not NaN.
FT_DEVICE float not_minus_infinity(float x) { return x == -INFINITY ? 0.0f : x; }

// The columns of this lane, of kLanes that share a row of D: pieces of kVec, those of neighbouring lanes side by side.
template <int kLanes, int kVec>
FT_DEVICE int column(int piece) {
  return (piece * kLanes + int(threadIdx.x) % kLanes) * kVec;
}

// They become float32; 0 beyond D, and everywhere where the row is not `present`.
template <int kLanes, int kVec, class T>
FT_DEVICE void load_columns(const T* row, int D, bool present, float (&out)[kColumns]) {
#pragma unroll
  for (int piece = 0; piece < kColumns / kVec; ++piece) {
    const int col = column<kLanes, kVec>(piece);
    float part[kVec] = {};
    if (present && col < D) load(row + col, part);  // D is a multiple of kVec
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[piece * kVec + i] = part[i];
  }
}

// The sum over the kLanes lanes of a group, in each of them.
template <int kLanes>
FT_DEVICE float group_sum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kWholeWarp, v, offset);
  return v;
}

// The query rows of a block. Row m is query m % L of the group's head m / L.
struct Rows {
  int64_t b, hk;
  int first, count;

  FT_DEVICE int64_t head(const DecodeAttention& args, int m) const {
    return hk * (args.H / args.Hk) + (first + m) / args.L;
  }
  FT_DEVICE int query(const DecodeAttention& args, int m) const { return (first + m) % int(args.L); }
  FT_DEVICE int64_t index(const DecodeAttention& args, int m) const {  // in lse
    return (b * args.H + head(args, m)) * args.L + query(args, m);
  }
};

// Where the keys and values of a sequence's head lie.
template <class T>
struct Cache {
  const T *k, *v;
  bool table;

  FT_DEVICE Cache(const DecodeAttention& args, const Rows& rows) {
    table = args.rows.data != nullptr && args.rows_position != 0;
    int64_t row = rows.b;
    if (table)
      row = 0;
    else if (args.rows.data != nullptr)
      row = clamped(args.rows, rows.b * args.rows_batch, args.R - 1);
    k = element<const T>(args.k, row, rows.hk, 0);
    v = element<const T>(args.v, row, rows.hk, 0);
  }

  // Of the key at `position`, which the sequence has.
  FT_DEVICE void locate(const DecodeAttention& args, int64_t b, int position, const T*& key, const T*& value) const {
    const int64_t row = table ? clamped(args.rows, b * args.rows_batch + position * args.rows_position, args.R - 1) : 0;
    key = k + row * args.k.stride[0] + position * args.k.stride[2];
    value = v + row * args.v.stride[0] + position * args.v.stride[2];
  }
};

// The softmax of one row over some of its keys, and the sums of this lane's columns.
struct Running {
  float maximum = -INFINITY, sum = 0.0f, acc[kColumns] = {};

  // Folds kCount keys in. kEdge: seen(x) says whether the row sees key x. One that it does not see is left out, not
  // multiplied by 0, which would keep its NaN.
  template <bool kEdge, int kCount, class F>
  FT_DEVICE void fold(float (&scores)[kCount], const float (&values)[kCount][kColumns], F&& seen) {
    float top = maximum;
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
      if (kEdge && !seen(x)) scores[x] = -INFINITY;
      top = fmaxf(top, scores[x]);
    }
    const float shift = not_minus_infinity(top), decay = exp2_fast(maximum - shift);
    maximum = top;
    sum *= decay;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) acc[i] *= decay;
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
      const float weight = exp2_fast(scores[x] - shift);
      sum += weight;
      const bool all = !kEdge || seen(x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) acc[i] = fmaf(weight, all ? values[x][i] : 0.0f, acc[i]);
    }
  }
};

// The merged softmax of `count` parts: sum over parts of exp2(maximum - highest) * value, in order.
struct Merged {
  float highest = -INFINITY, shift = 0.0f;

  template <class F>
  FT_DEVICE Merged(int count, F&& maximum) {
    for (int part = 0; part < count; ++part) highest = fmaxf(highest, maximum(part));
    shift = not_minus_infinity(highest);
  }
  template <class F, class G>
  FT_DEVICE float sum(int count, F&& maximum, G&& value) const {
    float total = 0.0f;
    for (int part = 0; part < count; ++part) total = fmaf(exp2_fast(maximum(part) - shift), value(part), total);
    return total;
  }
  FT_DEVICE float lse(float sum) const { return sum == 0.0f ? -INFINITY : (highest + log2f(sum)) * kLn2; }
};

FT_DEVICE float ratio(float acc, float sum) { return sum == 0.0f ? 0.0f : acc / sum; }

// ---------------------------------------------------------------- kernels

// grid (B * Hk * tiles, splits), block (kThreads). A group of kLanes lanes takes a key; kRows: query rows held.
template <class T, int kVec, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads)
    decode_attention_split_kernel(const DecodeAttention args, const int tiles, const int split_keys) {
  constexpr int kGroups = kThreads / kLanes;   // keys side by side
  constexpr int kAtOnce = kRows == 1 ? 4 : 2;  // keys under way in a group
  constexpr int kStep = kGroups * kAtOnce;     // keys of a round
  constexpr int kWidth = kLanes * kColumns;
  FT_SHARED(float, sums, [kGroups][kRows][kWidth]);
  FT_SHARED(float, maxima, [kGroups][kRows]);
  FT_SHARED(float, totals, [kGroups][kRows]);
  const int D = int(args.D), queries = int(args.L), group = threadIdx.x / kLanes;
  Rows rows;
  rows.b = blockIdx.x / tiles / args.Hk, rows.hk = blockIdx.x / tiles % args.Hk;
  rows.first = int(blockIdx.x % tiles) * kRows;
  rows.count = min(kRows, int(args.H / args.Hk) * queries - rows.first);

  const int keys = keys_of(args, rows.b), splits = gridDim.y;
  const int64_t begin = int64_t(blockIdx.y) * split_keys;
  const int start = int(begin < keys ? begin : keys), stop = min(keys - start, split_keys) + start;
  if (splits > 1 && start == stop) return;  // the whole block; the merge does not look at this part

  // Row m sees the keys below limit(m); all rows see those below `common`.
  const int fewer = args.causal ? queries - 1 : 0;
  const auto limit = [&](int m) { return min(stop, args.causal ? keys - (queries - 1 - rows.query(args, m)) : keys); };
  const int common = min(stop, keys - fewer);

  float q[kRows][kColumns];
  Running running[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const T* row = element<const T>(args.q, rows.b, rows.head(args, m < rows.count ? m : 0),
                                    rows.query(args, m < rows.count ? m : 0));
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int col = column<kLanes, kVec>(i / kVec) + i % kVec;
      q[m][i] = col < D ? to_float(row[col]) * (args.scale * kLog2E) : 0.0f;
    }
  }

  const Cache<T> cache(args, rows);
  for (int round = start; round < stop; round += kStep) {
    float k[kAtOnce][kColumns], v[kAtOnce][kColumns];
    const auto key = [&](int x) { return round + x * kGroups + group; };
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) {
      const T *from_k = nullptr, *from_v = nullptr;
      const bool present = key(x) < stop;
      if (present) cache.locate(args, rows.b, key(x), from_k, from_v);
      load_columns<kLanes, kVec>(from_k, D, present, k[x]);
      load_columns<kLanes, kVec>(from_v, D, present, v[x]);
    }
    const bool edge = round + kStep > common;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (kRows > 1 && m >= rows.count) continue;
      float scores[kAtOnce];
#pragma unroll
      for (int x = 0; x < kAtOnce; ++x) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) dot = fmaf(q[m][i], k[x][i], dot);
        scores[x] = group_sum<kLanes>(dot);
      }
      if (edge) {
        const int end = limit(m);
        running[m].template fold<true>(scores, v, [&](int x) { return key(x) < end; });
      } else {
        running[m].template fold<false>(scores, v, [](int) { return true; });
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[group][m][column<kLanes, kVec>(i / kVec) + i % kVec] = running[m].acc[i];
    if (threadIdx.x % kLanes == 0) {
      maxima[group][m] = running[m].maximum;
      totals[group][m] = running[m].sum;
    }
  }
  __syncthreads();
  for (int id = threadIdx.x; id < rows.count * D; id += kThreads) {
    const int m = id / D, col = id % D;
    const auto maximum = [&](int part) { return maxima[part][m]; };
    const Merged merged(kGroups, maximum);
    const float sum = merged.sum(kGroups, maximum, [&](int part) { return totals[part][m]; });
    const float acc = merged.sum(kGroups, maximum, [&](int part) { return sums[part][m][col]; });
    const int64_t row = rows.index(args, m);
    if (splits == 1) {
      from_float(ratio(acc, sum), element<T>(args.out, rows.b, rows.head(args, m), rows.query(args, m))[col]);
      if (col == 0 && args.lse) args.lse[row] = merged.lse(sum);
    } else {
      float* part = args.partial + (row * splits + blockIdx.y) * (D + 2);
      part[col] = acc;
      if (col == 0) part[D] = merged.highest, part[D + 1] = sum;
    }
  }
}

// grid (B * H * L), block (kMergeThreads): the splits of one query, those that have keys.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    decode_attention_merge_kernel(const DecodeAttention args, const int splits, const int split_keys) {
  const int64_t row = blockIdx.x, b = row / args.L / args.H;
  const int D = int(args.D), used = (keys_of(args, b) + split_keys - 1) / split_keys;
  const float* parts = args.partial + row * splits * (D + 2);
  const auto maximum = [&](int split) { return parts[int64_t(split) * (D + 2) + D]; };
  const Merged merged(used, maximum);
  const float sum = merged.sum(used, maximum, [&](int split) { return parts[int64_t(split) * (D + 2) + D + 1]; });
  T* out = element<T>(args.out, b, row / args.L % args.H, row % args.L);
  for (int col = threadIdx.x; col < D; col += kMergeThreads) {
    const float acc = merged.sum(used, maximum, [&](int split) { return parts[int64_t(split) * (D + 2) + col]; });
    from_float(ratio(acc, sum), out[col]);
  }
  if (threadIdx.x == 0 && args.lse) args.lse[row] = merged.lse(sum);
}

// ---------------------------------------------------------------- launchers

// Whether every row of x, (R, Hk, C, D), can be read 16 bytes at a time. The stride of an axis of one is never used.
template <class T>
bool is_aligned(const DecodeAttention& args, const DecodeAttention::Tensor& x) {
  const int64_t sizes[3] = {args.R, args.Hk, args.C};
  bool aligned = is_whole_vectors<T>(args.D) && is_vector_aligned<T>(x.data, 0);
  for (int axis = 0; axis < 3; ++axis)
    aligned = aligned && (sizes[axis] <= 1 || is_vector_aligned<T>(nullptr, x.stride[axis]));
  return aligned;
}

template <class T, int kVec, int kLanes, int kRows>
void launch_split(const DecodeAttention& args, int splits, int split_keys, void* stream) {
  const int64_t rows = args.H / args.Hk * args.L, tiles = (rows + kRows - 1) / kRows;
  launch(decode_attention_split_kernel<T, kVec, kLanes, kRows>, Grid{args.B * args.Hk * tiles, splits}, kThreads, 0,
         stream, args, int(tiles), split_keys);
}

template <class T, int kVec, int kLanes>
void launch_rows(const DecodeAttention& args, int splits, int split_keys, void* stream) {
  if (args.H / args.Hk * args.L == 1) return launch_split<T, kVec, kLanes, 1>(args, splits, split_keys, stream);
  launch_split<T, kVec, kLanes, kMaxRows>(args, splits, split_keys, stream);
}

template <class T>
void launch_all(const DecodeAttention& args, int splits, int split_keys, void* stream) {
  constexpr int kVec = kVectorBytes / int(sizeof(T));
  if (!is_aligned<T>(args, args.k) || !is_aligned<T>(args, args.v))
    launch_split<T, 1, kWarp, kMaxRows>(args, splits, split_keys, stream);  // one kernel for what is rare
  else if (args.D <= kNarrowest * kColumns)
    launch_rows<T, kVec, kNarrowest>(args, splits, split_keys, stream);
  else if (args.D <= 2 * kNarrowest * kColumns)
    launch_rows<T, kVec, 2 * kNarrowest>(args, splits, split_keys, stream);
  else
    launch_rows<T, kVec, 4 * kNarrowest>(args, splits, split_keys, stream);
  if (splits > 1)
    launch(decode_attention_merge_kernel<T>, args.B * args.H * args.L, kMergeThreads, stream, args, splits, split_keys);
}

}  // namespace

void decode_attention(const DecodeAttention& args, int64_t split_keys, void* stream) {
  constexpr int64_t kMost = int64_t(1) << 30;
  if (args.B == 0 || args.H == 0 || args.L == 0) return;
  FT_REQUIRE(args.D >= 1 && args.D <= kMaxHeadWidth, "the head width must be 1 ... 256, got " << args.D);
  FT_REQUIRE(args.Hk >= 1 && args.H % args.Hk == 0, "H must be a multiple of Hk, got " << args.H << " and " << args.Hk);
  FT_REQUIRE(args.rows.data != nullptr || args.R == args.B, "without rows, R must be B");
  FT_REQUIRE(args.C < kMost && args.H * args.L < kMost, "a sequence must have fewer than 2^30 keys and queries");
  FT_REQUIRE(split_keys >= 1 && split_keys < kMost, "a split must have 1 ... 2^30 keys, got " << split_keys);
  const int64_t splits = args.C <= split_keys ? 1 : (args.C + split_keys - 1) / split_keys;
  FT_REQUIRE(splits == 1 || args.partial != nullptr, "working memory is missing");
  dispatch_on_device(args.dtype, [&](auto tag) {
    launch_all<typename decltype(tag)::type>(args, int(splits), int(split_keys), stream);
  });
}

}  // namespace fused::cuda
