#include "linear_argmax.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "screen.h"

namespace fused::cpu {
namespace {

// Most panels of Q that are one task: 256 KB at K = 512, and 128 KB of results of 64 rows, which don't leave the
// second-level cache.
constexpr int64_t kPanelsTogether = 8;

// A block of columns that may hold the largest result of row m; and then that result and its column.
struct Candidate {
  int64_t column, m;
  float value = 0.0f;
};

// No less than x; float32's own rounding takes a third off the smallest numbers.
float above(double x) { return std::nextafter(float(x), HUGE_VALF); }

// The largest of `count` results: the first NaN if there is one, else the first of the largest.
int64_t first_of_the_largest(const float* y, int64_t count) {
  int64_t best = 0;
  for (int64_t n = 0; n < count && y[best] == y[best]; ++n)
    if (y[n] > y[best] || y[n] != y[n]) best = n;
  return best;
}

// The largest result of each candidate from the one at `from` on.
void compute(const LinearArgmax& args, std::vector<Candidate>& candidates, int64_t from) {
  const Screen& screen = *args.screen;
  const int64_t count = int64_t(candidates.size()) - from, together = screen.weight.columns;
  parallel_for(count, count * together * screen.weight.K, [&](int64_t i) {
    Candidate& c = candidates[size_t(from + i)];
    const PackedWeight weight = columns_of(screen.weight, c.column, together);
    alignas(64) float y[kPanel];
    Linear exact;
    exact.weight = &weight;
    exact.M = 1, exact.x = args.x + c.m * args.x_stride, exact.x_stride = args.x_stride;
    exact.bias = screen.bias == nullptr ? nullptr : screen.bias + c.column;
    exact.y = y, exact.y_stride = kPanel;
    linear(exact);
    const int64_t best = first_of_the_largest(y, weight.N);
    c.value = y[best], c.column += best;
  });
}

// All results, of some columns at a time, which stay in the cache until their largest is found.
int64_t argmax_of_all(const LinearArgmax& args, int64_t together) {
  const Screen& screen = *args.screen;
  const int64_t M = args.M, K = screen.weight.K, groups = (screen.weight.N + together - 1) / together;
  using Room = Scratch<LinearArgmax>;
  Room room(Room::room(M * groups * 4) + Room::room(M * groups * 8));
  float* const values = room.take<float>(M * groups);
  int64_t* const places = room.take<int64_t>(M * groups);
  parallel_tasks(groups, M * screen.weight.N * K / 4, [&](int64_t group) {
    const PackedWeight some = columns_of(screen.weight, group * together, together);
    using Room = Scratch<Results>;
    const int64_t scratch = linear_scratch(some, M);
    Room room(Room::room(M * together * 4) + Room::room(scratch));
    Linear all;
    all.weight = &some;
    all.M = M, all.x = args.x, all.x_stride = args.x_stride;
    all.bias = screen.bias == nullptr ? nullptr : screen.bias + group * together;
    float* const results = room.take<float>(M * together);
    all.y = results, all.y_stride = together;
    all.scratch = room.take<char>(scratch);
    linear(all);
    const Results found{M, some.N, together, results, values + group * M, places + group * M};
    FT_DISPATCH_ISA(find_largest, found)
  });
  for (int64_t m = 0; m < M; ++m) {
    int64_t best = 0;
    const auto value = [&](int64_t group) { return values[group * M + m]; };
    for (int64_t group = 1; group < groups && value(best) == value(best); ++group)
      if (!(value(group) <= value(best))) best = group;
    args.values[m] = value(best), args.places[m] = best * together + places[best * M + m];
  }
  return M * screen.blocks();
}

}  // namespace

Screen make_screen(const PackedWeight& weight, const PackedWeight& rounded, const float* bias) {
  FT_REQUIRE(weight.form == WeightForm::f32 && rounded.form == WeightForm::int8 && weight.N == rounded.N &&
                 weight.K == rounded.K,
             "a screen is a float32 weight and its int8 form");
  Screen screen;
  screen.weight = weight, screen.rounded = rounded, screen.bias = bias;
  screen.bounds = allocate_pages(size_t(2 * screen.columns()) * sizeof(float));
  const int64_t K = weight.K;
  parallel_for(weight.panels(), weight.N * K, [&](int64_t panel) {
    const PackedWeight exact = columns_of(weight, panel * kPanel, kPanel);
    const PackedWeight near = columns_of(rounded, panel * kPanel, kPanel);
    std::vector<float> w(size_t(exact.N * K)), q(w.size());
    unpack_weight(exact, w.data());
    unpack_weight(near, q.data());
    for (int64_t n = 0; n < exact.N; ++n) {
      double error = 0.0, size = 0.0;
      for (int64_t k = 0; k < K; ++k) {
        const double value = w[size_t(n * K + k)], off = value - double(q[size_t(n * K + k)]);
        error += off * off, size += value * value;
      }
      screen.error()[panel * kPanel + n] = above(std::sqrt(error));
      screen.size()[panel * kPanel + n] = above(std::sqrt(size) + std::sqrt(error));
    }
  });
  screen.largest = *std::max_element(screen.size(), screen.size() + weight.N);
  return screen;
}

int64_t linear_argmax(const LinearArgmax& args) {
  FT_REQUIRE(args.screen != nullptr, "the screen is missing");
  FT_REQUIRE(0 <= args.levels && args.levels <= 2, "levels must be 0, 1 or 2, got " << args.levels);
  const Screen& screen = *args.screen;
  const int64_t M = args.M, K = screen.weight.K, blocks = screen.blocks();
  const int64_t levels = args.levels > 0 ? args.levels : screen.weight.columns < kPanel ? 1 : 2;
  const int64_t fair = screen.weight.panels() / (4 * omp_get_max_threads());
  const int64_t together = std::clamp(fair, int64_t(1), kPanelsTogether) * kPanel,
                groups = (screen.weight.N + together - 1) / together;
  if (args.levels == 0 && M > screen.most_screened()) return argmax_of_all(args, together);
  using Room = Scratch<LinearArgmax>;
  Room room(Room::room(levels * M * K * 4) + Room::room(2 * M * 4) + Room::room(M * blocks * 4) +
            Room::room(M * groups * 4) + Room::room(linear_scratch(screen.rounded, levels * M)));
  Screening s{};
  s.screen = &screen, s.M = M, s.levels = levels, s.x = args.x, s.x_stride = args.x_stride;
  s.steps = levels == 1 && isa() == Isa::avx2 ? kFewLevels : kLevels;
  s.rows = room.take<float>(levels * M * K);
  s.reach = room.take<float>(2 * M);
  s.upper = room.take<float>(M * blocks);
  float* const lowest = room.take<float>(M * groups);

  [&] { FT_DISPATCH_ISA(split_rows, s) }();
  const PackedWeight none = columns_of(screen.rounded, 0, 0);
  Linear rough;
  rough.weight = &none;
  rough.M = levels * M, rough.x = s.rows, rough.x_stride = K;
  rough.levels = s.steps;
  rough.scratch = room.take<char>(linear_scratch(screen.rounded, levels * M));
  linear(rough);  // x is rounded once, and then multiplied by each group
  rough.rounded = true;
  parallel_tasks(groups, levels * M * screen.weight.N * K / 4, [&](int64_t group) {
    const PackedWeight some = columns_of(screen.rounded, group * together, together);
    using Room = Scratch<Screening>;
    Room room(Room::room(levels * M * together * 4));
    float* const results = room.take<float>(levels * M * together);
    Linear product = rough;
    product.weight = &some;
    product.y = results, product.y_stride = together;
    linear(product);
    const Bounding bounding{&s, group * together, some.N, results, together, lowest + group * M};
    FT_DISPATCH_ISA(bound_columns, bounding)
  });

  std::vector<float> least(lowest, lowest + M);  // of a row: what is below it is not the largest
  for (int64_t m = 0; m < M; ++m) {
    if (s.reach[2 * m] != s.reach[2 * m]) least[size_t(m)] = s.reach[2 * m];
    for (int64_t group = 1; group < groups; ++group)
      if (lowest[group * M + m] > least[size_t(m)]) least[size_t(m)] = lowest[group * M + m];
  }
  // First of each row the block that may hold most: its largest result leaves less to be computed than any bound.
  std::vector<int64_t> highest(size_t(M), 0);
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t m = 0; m < M; ++m)
      if (s.upper[block * M + m] > s.upper[highest[size_t(m)] * M + m]) highest[size_t(m)] = block;
  std::vector<Candidate> candidates;
  for (int64_t m = 0; m < M; ++m) candidates.push_back({highest[size_t(m)] * screen.weight.columns, m});
  compute(args, candidates, 0);
  for (const Candidate& c : candidates)
    if (c.value > least[size_t(c.m)]) least[size_t(c.m)] = c.value;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t m = 0; m < M; ++m)
      if (!(s.upper[block * M + m] < least[size_t(m)]) && block != highest[size_t(m)])
        candidates.push_back({block * screen.weight.columns, m});
  // A block for one row waits for memory; where they are too many (on a Zen 3, with 16 columns), all rows share each.
  if (args.levels == 0 && int64_t(candidates.size()) > blocks + blocks * M / 12) return argmax_of_all(args, together);
  compute(args, candidates, M);
  for (int64_t m = 0; m < M; ++m) args.places[m] = -1;
  for (const Candidate& c : candidates) {
    const float best = args.values[c.m];
    const bool nan = c.value != c.value, first = c.column < args.places[c.m];
    // Of NaN, and of what is equal, the first in the row.
    const bool better = best != best ? nan && first : nan || c.value > best || (c.value == best && first);
    if (args.places[c.m] < 0 || better) args.values[c.m] = c.value, args.places[c.m] = c.column;
  }
  return int64_t(candidates.size());
}

}  // namespace fused::cpu
