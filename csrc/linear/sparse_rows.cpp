// Which products of many rows are done place by place, and in what working memory. See sparse_rows.h.

#include "sparse_rows.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "parts.h"

namespace fused::cpu {
namespace {

constexpr int64_t kLeastRows = 32;       // below, reading the weights is all
constexpr int64_t kSeen = 128;           // of K
constexpr int64_t kMostDepth = 1 << 16;  // a place is 16 bits
constexpr int64_t kRowsTogether = 384;   // whose places are held at a time: 4.7 MB at K = 2048

// Above so many of the places it isn't worth it: half of them, as random weights leave, took as long as all.
constexpr int64_t most_places(int64_t places) { return places * 3 / 8; }

// Some places of two rows tell, since most products have no 0 at all.
bool worth_looking(const Linear& args) {
  const PackedWeight& w = *args.weight;
  if (isa() != Isa::avx2 || args.M < kLeastRows || !w.finite || w.K > kMostDepth || w.K < kSeen) return false;
  int64_t places = 0;
  for (const int64_t m : {int64_t(0), args.M / 2})
    for (int64_t k = 0; k < kSeen; ++k) places += args.x[m * args.x_stride + k] != 0.0f;
  return places <= most_places(2 * kSeen);
}

void find(const PlacesOfRows& some) { FT_DISPATCH_ISA(find_places, some); }

void multiply(const SparsePanels& some) { FT_DISPATCH_ISA(multiply_places, some); }

}  // namespace

bool linear_of_sparse_rows(const Linear& args) {
  if (!worth_looking(args)) return false;
  const PackedWeight& w = *args.weight;
  const int64_t most = args.M < kRowsTogether ? args.M : kRowsTogether;
  SparseRows rows{};
  rows.product = &args;
  rows.room = (w.K + 15) / 8 * 8, rows.chunks = (w.K + kSparseChunk - 1) / kSparseChunk;
  using Room = Scratch<SparseRows>;
  Room room(Room::room(most * rows.room * 4) + Room::room(most * rows.room * 2) + Room::room(most * rows.chunks * 4));
  rows.values = room.take<float>(most * rows.room);
  rows.places = room.take<uint16_t>(most * rows.room);
  rows.ends = room.take<int32_t>(most * rows.chunks);
  for (; rows.first < args.M; rows.first += most) {
    rows.count = args.M - rows.first < most ? args.M - rows.first : most;
    parallel_runs(rows.count, rows.count * w.K, [&](int64_t begin, int64_t end) { find({&rows, begin, end}); });
    int64_t places = 0;
    for (int64_t r = 0; r < rows.count; ++r) places += rows.ends[(r + 1) * rows.chunks - 1];
    if (rows.first == 0 && places > most_places(rows.count * w.K)) return false;
    parallel_runs(w.panels(), places * w.N / 4, [&](int64_t begin, int64_t end) { multiply({&rows, begin, end}); });
  }
  return true;
}

}  // namespace fused::cpu
