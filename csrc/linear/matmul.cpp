// The checked entry of matmul, and where it is worth calling.

#include "matmul.h"

#include <memory>

#include "../common/check.h"
#include "../common/pages.h"
#include "parts.h"

namespace fused::cpu {
namespace {
constexpr size_t kFewFloats = 1 << 18;  // which malloc has at hand
}

// torch's float32 product is MKL's, which on AMD's processors leaves half of AVX-512 unused: 105 to 113 GFLOP/s on one
// thread of a Zen 5 that does 263, where this one reaches 225 to 250. On Intel's MKL is at 91 % of the peak.
bool matmul_is_quicker() { return isa() == Isa::avx512 && is_amd(); }

// With AVX2 MKL's does there what the processor can, where many rows share the weights. On a Zen 3 its time over ours
// is, for 4 to 256 rows and 4 M weights or more (8,000 x 512, 32,000 x 512, 4,096 x 1,024 and the other way
// round), 1.14 to 1.5 forward on one thread, and 1.01 to 3.1 on two; with gradients 0.99 to 1.24, and 1.06 to 1.75.
bool matmul_is_quicker_for_few_rows() { return isa() == Isa::avx2 && is_amd(); }

void matmul(const Matmul& args) {
  FT_REQUIRE(args.M >= 0 && args.N >= 0 && args.K >= 1, "sizes must not be negative, nor K 0");
  FT_REQUIRE((args.x.row == 1 || args.x.column == 1) && (args.w.row == 1 || args.w.column == 1),
             "the rows or the columns of a matrix must be contiguous");
  FT_REQUIRE(args.y_dtype == DType::f32 || args.y_dtype == args.dtype, "y must be float32 or of the dtype of x and w");
  if (args.M == 0 || args.N == 0) return;
  Matmul with_memory = args;
  std::unique_ptr<float[]> sums;
  if (args.y_dtype != DType::f32 && args.K > kMostCopied) {
    sums.reset(new float[size_t(args.M) * size_t(args.N)]);
    with_memory.sums = sums.get();
  }
  std::shared_ptr<void> rows;
  if (gathers()) {
    const size_t count = size_t(args.M) * size_t(args.K < kMostCopied ? args.K : kMostCopied);
    rows = count < kFewFloats ? std::shared_ptr<void>(new float[count], std::default_delete<float[]>())
                              : reused_pages(count * sizeof(float));
    with_memory.gathered = static_cast<float*>(rows.get());
  }
  FT_DISPATCH_ISA(matmul_panels, with_memory);
}

}  // namespace fused::cpu
