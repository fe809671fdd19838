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

// A panel as a weight of its own, which keeps nothing alive.
PackedWeight only(const PackedWeight& w, int64_t panel) {
  PackedWeight one;
  one.N = w.N - panel * kPanel < kPanel ? w.N - panel * kPanel : kPanel;
  one.K = w.K, one.form = w.form, one.columns = w.columns, one.finite = w.finite;
  const auto view = [](void* p) { return std::shared_ptr<void>(std::shared_ptr<void>(), p); };
  one.data = view(static_cast<char*>(w.data.get()) + panel * kPanel * w.depth() * w.element_bytes());
  // unpack_weight reads scales alone, and these come first; the sums behind them would be those of another panel
  if (w.form == WeightForm::int8) one.scales = view(const_cast<float*>(w.scale()) + panel * kPanel);
  return one;
}

// The columns of one block of a float32 weight, likewise.
PackedWeight block_of(const PackedWeight& w, int64_t block) {
  PackedWeight one;
  one.N = w.N - block * w.columns < w.columns ? w.N - block * w.columns : w.columns;
  one.K = w.K, one.columns = w.columns, one.finite = w.finite;
  one.data =
      std::shared_ptr<void>(std::shared_ptr<void>(), static_cast<float*>(w.data.get()) + block * w.columns * w.K);
  return one;
}

// No less than x; float32's own rounding takes a third off the smallest numbers.
float above(double x) { return std::nextafter(float(x), HUGE_VALF); }

// The largest of `count` results: the first NaN if there is one, else the first of the largest.
int64_t first_of_the_largest(const float* y, int64_t count) {
  int64_t best = 0;
  for (int64_t n = 0; n < count && y[best] == y[best]; ++n)
    if (y[n] > y[best] || y[n] != y[n]) best = n;
  return best;
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
    const PackedWeight exact = only(weight, panel), near = only(rounded, panel);
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
  using Room = Scratch<LinearArgmax>;
  const int64_t rounded_bytes = linear_scratch(screen.rounded, levels * M);
  Room room(Room::room(levels * M * K * 4) + Room::room(levels * M * screen.columns() * 4) + Room::room(2 * M * 4) +
            Room::room(M * blocks) + Room::room(M * blocks * 8) + 2 * Room::room(M * blocks * 4) +
            Room::room(rounded_bytes));
  Screening s{};
  s.screen = &screen, s.M = M, s.levels = levels, s.x = args.x, s.x_stride = args.x_stride;
  s.rows = room.take<float>(levels * M * K);
  s.results = room.take<float>(levels * M * screen.columns());
  s.reach = room.take<float>(2 * M);
  s.wanted = room.take<uint8_t>(M * blocks);
  int64_t* const tasks = room.take<int64_t>(M * blocks);  // block * M + m, in order: a block is read once for all rows
  float* const values = room.take<float>(M * blocks);     // of each task
  int32_t* const places = room.take<int32_t>(M * blocks);

  [&] { FT_DISPATCH_ISA(split_rows, s) }();
  Linear rough;
  rough.weight = &screen.rounded;
  rough.M = levels * M, rough.x = s.rows, rough.x_stride = K;
  rough.y = s.results, rough.y_stride = screen.columns();
  rough.scratch = room.take<char>(rounded_bytes);
  linear(rough);
  [&] { FT_DISPATCH_ISA(mark_blocks, s) }();

  int64_t count = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t m = 0; m < M; ++m)
      if (s.wanted[m * blocks + block]) tasks[count++] = block * M + m;
  parallel_for(count, count * screen.weight.columns * K, [&](int64_t i) {
    const int64_t block = tasks[i] / M, m = tasks[i] % M;
    const PackedWeight weight = block_of(screen.weight, block);
    alignas(64) float y[kPanel];
    Linear exact;
    exact.weight = &weight;
    exact.M = 1, exact.x = args.x + m * args.x_stride, exact.x_stride = args.x_stride;
    exact.bias = screen.bias == nullptr ? nullptr : screen.bias + block * weight.columns;
    exact.y = y, exact.y_stride = kPanel;
    linear(exact);
    const int64_t best = first_of_the_largest(y, weight.N);
    values[i] = y[best], places[i] = int32_t(best);
  });
  for (int64_t m = 0; m < M; ++m) args.places[m] = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t m = tasks[i] % M;
    const float best = args.values[m], value = values[i];
    if (args.places[m] >= 0 && (best != best || !(value > best || value != value))) continue;
    args.values[m] = value;
    args.places[m] = tasks[i] / M * screen.weight.columns + places[i];
  }
  return count;
}

}  // namespace fused::cpu
