#pragma once
// Which sequence of the batch a block of threads works at, where its rows lie, and which keys its queries may see.
//
// A query may see the keys of an interval (causal, window, length) that moves with its position; `keep` and a bias of
// -inf punch holes into it. Intervals decide which tiles are computed at all and which of them need a test per element.

#include "../common/launch.cuh"
#include "attention.h"

namespace fused::cuda {

// One sequence of the batch. Lengths are below 2^30 (the launchers check): positions and their differences fit 32 bits.
struct Sequence {
  int b;
  int L, S;         // its queries and its keys, after k_lengths
  int shift;        // query i stands at key position i + shift
  int left, right;  // query i sees keys i + shift - left ... i + shift + right
  int64_t q0, k0;   // first token, for packed batches
};

constexpr int kFar = 0x3fffffff;

FT_DEVICE int own_keys(const Attention& args, int b) {
  return args.k_offsets == nullptr ? int(args.S) : int(args.k_offsets[b + 1] - args.k_offsets[b]);
}

FT_DEVICE Sequence make_sequence(const Attention& args, int b) {
  Sequence s;
  s.b = b;
  s.L = int(args.L), s.S = own_keys(args, b);
  s.q0 = s.k0 = 0;
  if (args.q_offsets != nullptr) {
    s.q0 = args.q_offsets[b], s.k0 = args.k_offsets[b];
    s.L = int(args.q_offsets[b + 1] - s.q0);
  }
  if (args.k_lengths != nullptr) {
    const int64_t length = args.k_lengths[b];
    s.S = length < 0 ? 0 : (length < s.S ? int(length) : s.S);
  }
  s.shift = args.causal == Causal::bottom_right ? s.S - s.L : 0;
  s.left = args.window_left >= 0 && args.window_left < kFar ? int(args.window_left) : kFar;
  s.right = args.window_right >= 0 && args.window_right < kFar ? int(args.window_right) : kFar;
  if (args.causal != Causal::none) s.right = 0;
  return s;
}

// Row `row` of one sequence and one head of x, which holds queries or keys.
template <class T>
FT_DEVICE T* query_row(const Attention& args, const Rows& x, const Sequence& s, int head, int row) {
  const int64_t first = args.q_offsets == nullptr ? s.b * x.batch : s.q0 * x.row;
  return static_cast<T*>(x.data) + (first + head * x.head + row * x.row);
}
template <class T>
FT_DEVICE T* key_row(const Attention& args, const Rows& x, const Sequence& s, int head, int row) {
  const int64_t first = args.q_offsets == nullptr ? s.b * x.batch : s.k0 * x.row;
  return static_cast<T*>(x.data) + (first + head * x.head + row * x.row);
}
// The key head that a query head reads.
FT_DEVICE int key_head(const Attention& args, int head) { return head / int(args.H / args.Hk); }

// Keys outside [low, high) are seen by none of some queries, keys inside [full_low, full_high) by all of them, as far
// as intervals go.
struct KeyRange {
  int low, high, full_low, full_high;

  FT_DEVICE bool touches(int first, int count) const { return first < high && first + count > low; }
  FT_DEVICE bool cuts(int first, int count) const { return first < full_low || first + count > full_high; }
};

// For queries first ... first + count - 1, of which those beyond the end don't count.
FT_DEVICE KeyRange visible_keys(const Sequence& s, int first, int count) {
  const int last = min(first + count, s.L) - 1;
  KeyRange range;
  if (last < first) return {0, 0, 0, 0};
  range.low = max(0, first + s.shift - s.left);
  range.full_low = max(0, last + s.shift - s.left);
  range.high = min(s.S, last + s.shift + s.right + 1);
  range.full_high = min(s.S, first + s.shift + s.right + 1);
  return range;
}

// Queries outside [low, high) see none of keys first ... first + count - 1.
struct QueryRange {
  int low, high;
};
FT_DEVICE QueryRange queries_that_see(const Sequence& s, int first, int count) {
  const int last = min(first + count, s.S) - 1;
  if (last < first) return {0, 0};
  return {max(0, first - s.shift - s.right), min(s.L, last - s.shift + s.left + 1)};
}

FT_DEVICE bool has_holes(const Attention& args) { return args.keep.data != nullptr || args.bias.data != nullptr; }

}  // namespace fused::cuda
