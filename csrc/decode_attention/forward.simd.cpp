// Decode attention on the CPU: one pass over the cache with an online softmax, 64 keys at a time.
//
// A task is up to 16 query rows (the L queries of the query heads that share a key head) beside up to kSplit keys of
// that head. Each key and value is read once, where it lies, and serves all rows of the task while it is in the first
// cache. Per key and row that is 2 D multiply-adds, per key 2 D elements of the cache: with one row a multiply-add an
// element, so the cache's memory bounds the time: 2 * length * D * sizeof(element) bytes a key head.
//
// Splits are cut at multiples of kSplit and merged in order, whatever the threads and the other sequences: the same
// bits always. A cache of one split writes its outputs at once.

#include "../common/parallel.h"
#include "block.h"

namespace fused::cpu::FT_ISA {
namespace {

using namespace decode;
using Integers = DecodeAttention::Integers;

FT_INLINE int64_t at(const Integers& x, int64_t index) {
  return x.wide ? static_cast<const int64_t*>(x.data)[index] : static_cast<const int32_t*>(x.data)[index];
}

FT_INLINE int64_t keys_of(const DecodeAttention& args, int64_t b) {
  return args.lengths.data == nullptr ? args.C : at(args.lengths, b);
}

template <class T>
FT_INLINE T* element(const DecodeAttention::Tensor& x, int64_t i0, int64_t i1, int64_t i2) {
  return static_cast<T*>(x.data) + i0 * x.stride[0] + i1 * x.stride[1] + i2 * x.stride[2];
}

// Query rows `first` ... `first + rows` of one sequence and key head; row i is query i % L of the group's head i / L.
struct Rows {
  int64_t b, hk, first;
  int rows;

  FT_INLINE int64_t head(const DecodeAttention& args, int m) const {
    return hk * (args.H / args.Hk) + (first + m) / args.L;
  }
  FT_INLINE int64_t query(const DecodeAttention& args, int m) const { return (first + m) % args.L; }
};

// Row m of the part that split `split` has in the partial results: D sums, padded to vectors; the maximum; the sum.
FT_INLINE float* part(const DecodeAttention& args, int64_t b, int64_t h, int64_t i, int64_t split) {
  const int64_t splits = (args.C + kSplit - 1) / kSplit, width = (args.D + 15) / 16 * 16;
  return args.partial + (((b * args.H + h) * args.L + i) * splits + split) * (width + 2);
}

FT_INLINE void write(const DecodeAttention& args, int64_t b, int64_t h, int64_t i, const float* sums, Softmax softmax) {
  const int D = int(args.D);
  const Vec factor = splat(softmax.sum == 0.0f ? 0.0f : 1.0f / softmax.sum);
  with_storage(args.dtype, [&](auto tag) {
    auto* out = element<typename decltype(tag)::type>(args.out, b, h, i);
    for (int d = 0; d < D; d += kWidth) store(out + d, load(sums + d) * factor, int(smaller(kWidth, D - d)));
  });
  if (args.lse == nullptr) return;
  args.lse[(b * args.H + h) * args.L + i] = softmax.sum == 0.0f ? -kInf : softmax.maximum + __builtin_logf(softmax.sum);
}

// The keys first ... first + block.count of a sequence.
template <class T>
FT_INLINE void locate(const DecodeAttention& args, const Rows& r, int64_t first, int64_t stop, Block<T>& block) {
  block.count = int(smaller(kBlock, stop - first));
  for (int j = 0; j < block.count; ++j) {
    const int64_t position = first + j;
    const int64_t row =
        args.rows.data == nullptr ? r.b : at(args.rows, r.b * args.rows_batch + position * args.rows_position);
    block.rows[2 * j] = element<const T>(args.k, row, r.hk, position);
    block.rows[2 * j + 1] = element<const T>(args.v, row, r.hk, position);
  }
}

// The same keys of a sequence, that many heads further.
template <class T>
FT_INLINE void move(const DecodeAttention& args, int64_t heads, const Block<T>& from, Block<T>& to) {
  const int64_t keys = heads * args.k.stride[1], values = heads * args.v.stride[1];
  to.count = from.count;
  for (int j = 0; j < from.count; ++j) {
    to.rows[2 * j] = from.rows[2 * j] + keys;
    to.rows[2 * j + 1] = from.rows[2 * j + 1] + values;
  }
}

// A task's place among all: the sequences one after another, the heads of one, tiles of rows, splits of keys. The heads
// of a sequence are neighbours in memory; and what beams, which follow each other, share is in the second cache still.
struct Task {
  Rows rows;
  int64_t split, start, stop;  // the keys start ... stop

  Task(const DecodeAttention& args, int64_t index, int64_t tiles, int64_t splits) : split(index % splits) {
    const int64_t head = index / splits / tiles;
    rows = {head / args.Hk, head % args.Hk, index / splits % tiles * kRows, 0};
    complete(args);
  }

  // The one that follows. There must be one.
  void advance(const DecodeAttention& args, int64_t tiles, int64_t splits) {
    if (++split == splits) {
      split = 0;
      if ((rows.first += kRows) >= tiles * kRows) {
        rows.first = 0;
        if (++rows.hk == args.Hk) rows.hk = 0, ++rows.b;
      }
    }
    complete(args);
  }

 private:
  void complete(const DecodeAttention& args) {
    rows.rows = int(smaller(kRows, args.H / args.Hk * args.L - rows.first));
    start = split * kSplit;
    stop = smaller(keys_of(args, rows.b), start + kSplit);
  }
};

// The blocks of keys of one task after another. Each is located while the one before it is computed, so that its keys
// and values can be asked for: a cache of few tokens is one block a task, and each would wait for them otherwise.
template <class T>
struct Blocks {
  Block<T> two[2];
  int turn = 0;

  FT_INLINE Block<T>& current() { return two[turn % 2]; }
  FT_INLINE Block<T>& next() { return two[(turn + 1) % 2]; }
};

// `after`: the task that comes next, or nullptr.
template <class T>
void run(const DecodeAttention& args, const Task& task, const Task* after, Blocks<T>& blocks) {
  const int D = int(args.D);
  const Rows& r = task.rows;
  const int64_t n = keys_of(args, r.b), start = task.start, stop = task.stop;
  const auto locate_after = [&]() -> Block<T>* {
    if (after == nullptr || after->start >= after->stop) return nullptr;
    if (after->rows.b == r.b && after->start == start && stop - start <= kBlock)
      move(args, after->rows.hk - r.hk, blocks.current(), blocks.next());
    else
      locate(args, after->rows, after->start, after->stop, blocks.next());
    return &blocks.next();
  };
  if (stop <= start) {
    locate_after();
    ++blocks.turn;
    if (task.split > 0) return;
  }

  float q[kRows * kLd], sums[kRows * kLd];
  Softmax softmax[kRows];
  int64_t seen[kRows];  // keys that a row sees
  for (int m = 0; m < r.rows; ++m) {
    const int64_t i = r.query(args, m);
    const T* row = element<const T>(args.q, r.b, r.head(args, m), i);
    for (int d = 0; d < D; d += kWidth) {
      store(q + m * kLd + d, load(row + d, int(smaller(kWidth, D - d))) * splat(args.scale));
      store(sums + m * kLd + d, Vec{});
    }
    seen[m] = args.causal ? n - (args.L - 1 - i) : n;
  }

  for (int64_t j = start; j < stop; j += kBlock, ++blocks.turn) {
    const Block<T>& block = blocks.current();
    Block<T>* next = &blocks.next();
    if (j + kBlock < stop)
      locate(args, r, j + kBlock, stop, *next);
    else
      next = locate_after();
    int counts[kRows];
    for (int m = 0; m < r.rows; ++m) {
      const int64_t count = smaller(seen[m] - j, block.count);
      counts[m] = count < 0 ? 0 : int(count);
    }
    const int groups = r.rows / kGroup + (r.rows % kGroup + 1) / 2;  // as fold_group() takes them
    Ahead<T> ahead(next, groups, D);
    for (int m = 0, step = 0; m < r.rows; m += step)
      step = fold_group(r.rows - m, q + m * kLd, block, ahead, counts + m, D, softmax + m, sums + m * kLd);
    ahead.ask_for_the_rest();
  }

  for (int m = 0; m < r.rows; ++m) {
    const int64_t h = r.head(args, m), i = r.query(args, m);
    if (args.C <= kSplit) {
      write(args, r.b, h, i, sums + m * kLd, softmax[m]);
    } else {
      float* to = part(args, r.b, h, i, task.split);
      for (int d = 0; d < D; d += kWidth) store(to + d, load(sums + m * kLd + d));
      to[(D + 15) / 16 * 16] = softmax[m].maximum;
      to[(D + 15) / 16 * 16 + 1] = softmax[m].sum;
    }
  }
}

// The parts of one query, in order.
void merge(const DecodeAttention& args, int64_t b, int64_t h, int64_t i) {
  const int D = int(args.D), width = (D + 15) / 16 * 16;
  const int64_t splits = (keys_of(args, b) + kSplit - 1) / kSplit;
  Softmax total;
  for (int64_t s = 0; s < splits; ++s) {
    const float maximum = part(args, b, h, i, s)[width];
    if (maximum > total.maximum) total.maximum = maximum;
  }
  const Vec shift = splat(total.maximum == -kInf ? 0.0f : total.maximum);
  float sums[kLd];
  for (int d = 0; d < D; d += kWidth) store(sums + d, Vec{});
  for (int64_t s = 0; s < splits; ++s) {
    const float* from = part(args, b, h, i, s);
    const Vec factor = exp_shifted(splat(from[width]) - shift);
    for (int d = 0; d < D; d += kWidth) store(sums + d, load(sums + d) + load(from + d) * factor);
    total.sum += from[width + 1] * factor[0];
  }
  write(args, b, h, i, sums, total);
}

}  // namespace

void decode_attention(const DecodeAttention& args) {
  const int64_t rows = args.H / args.Hk * args.L, tiles = (rows + kRows - 1) / kRows;
  const int64_t splits = args.C <= kSplit ? 1 : (args.C + kSplit - 1) / kSplit;
  int64_t keys = 0;
  for (int64_t b = 0; b < args.B; ++b) keys += keys_of(args, b);
  parallel_runs(args.Hk * args.B * tiles * splits, keys * args.H * args.L * args.D, [&](int64_t begin, int64_t end) {
    with_storage(args.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      Blocks<T> blocks;
      Task task(args, begin, tiles, splits);
      if (task.start < task.stop) locate(args, task.rows, task.start, task.stop, blocks.current());
      for (int64_t index = begin; index < end; ++index) {
        Task after = task;
        if (index + 1 < end) after.advance(args, tiles, splits);
        run(args, task, index + 1 < end ? &after : nullptr, blocks);
        task = after;
      }
    });
  });
  if (splits == 1) return;
  const int64_t queries = args.B * args.H * args.L;
  parallel_for(queries, queries * splits * args.D,
               [&](int64_t index) { merge(args, index / args.L / args.H, index / args.L % args.H, index % args.L); });
}

}  // namespace fused::cpu::FT_ISA
