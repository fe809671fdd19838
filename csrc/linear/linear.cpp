// The checked entry of linear, and which kernel multiplies.

#include "linear.h"

#include "../common/extensions.h"
#include "parts.h"
#include "sparse_rows.h"

namespace fused::cpu {
namespace {

// int8: from so many rows on tiles are ahead of dots (38 M weights on a Xeon: 1.34 against 1.6 ms for one row, 2.2
// against 1.8 ms for eight); sums are exact, so the results are the same. bfloat16: tiles for any number of rows, so
// that a row has the same bits in any batch (3.1 against 3.7 ms for one row).
constexpr int64_t kRowsForTiles = 6;

Multiplier chosen(const Linear& args) {
  if (args.multiplier != Multiplier::best) return args.multiplier;
  const WeightForm form = args.weight->form;
  const bool few = form == WeightForm::int8 && args.M < kRowsForTiles && has_multiplier(form, Multiplier::dots);
  if (!few && has_multiplier(form, Multiplier::tiles)) return Multiplier::tiles;
  if (has_multiplier(form, Multiplier::dots)) return Multiplier::dots;
  return Multiplier::vectors;
}

}  // namespace

bool has_multiplier(WeightForm form, Multiplier multiplier) {
  if (multiplier == Multiplier::dots && form == WeightForm::bf16) return extensions().bf16_dots;
  if (multiplier == Multiplier::dots && form == WeightForm::int8) return extensions().int8_dots;
  if (multiplier == Multiplier::tiles) return form != WeightForm::f32 && extensions().tiles;
  return multiplier != Multiplier::dots;
}

int64_t linear_scratch(const PackedWeight& w, int64_t M) {
  if (w.form == WeightForm::f32) return 0;
  const int64_t rows = (M + 15) / 16 * 16;
  return rows * w.depth() * (w.form == WeightForm::bf16 ? 4 : 2) + rows * 4;
}

void linear(const Linear& args) {
  FT_REQUIRE(args.weight != nullptr && args.weight->data != nullptr, "the weight is not packed");
  if (args.M == 0) return;
  const WeightForm form = args.weight->form;
  FT_REQUIRE(args.scratch != nullptr || linear_scratch(*args.weight, args.M) == 0, "working memory is missing");
  FT_REQUIRE(has_multiplier(form, args.multiplier), "this processor does not have the multiplier asked for");
  FT_REQUIRE(1 <= args.levels && args.levels <= kLevels, "levels must be 1 ... 127, got " << args.levels);
  FT_REQUIRE(!args.rounded || form == WeightForm::int8, "x is rounded beforehand for int8 weights alone");
  const Multiplier how = chosen(args);
  if (form == WeightForm::f32) {
    if (linear_of_sparse_rows(args)) return;
    FT_DISPATCH_ISA(linear_float32, args);
  }
#if defined(FT_WITH_TILES)
  if (how == Multiplier::tiles) return form == WeightForm::bf16 ? linear_bfloat16_tiles(args) : linear_int8_tiles(args);
#endif
#if defined(FT_WITH_DOTS)
  if (how == Multiplier::dots) return form == WeightForm::bf16 ? linear_bfloat16_dots(args) : linear_int8_dots(args);
#endif
  (void)how;
  if (form == WeightForm::bf16) {
    FT_DISPATCH_ISA(linear_bfloat16, args);
  } else {
    FT_DISPATCH_ISA(linear_int8, args);
  }
}

}  // namespace fused::cpu
