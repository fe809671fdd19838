#include "embedding.h"

#include "../common/check.h"

namespace fused::cpu {

FT_DECLARE_ISA(embedding_forward_rows, EmbeddingForward)
FT_DECLARE_ISA(embedding_backward_rows, EmbeddingBackward)

void embedding_forward(const EmbeddingForward& a) {
  FT_REQUIRE(a.N >= 0 && a.V >= 0 && a.E >= 0 && a.L >= 1, "sizes must not be negative");
  FT_REQUIRE(a.waves == nullptr, "positions are looked up on the CPU, not computed");
  *a.first_bad = -1;
  if (a.N == 0) return;
  FT_DISPATCH_ISA(embedding_forward_rows, a);
}

void embedding_backward(const EmbeddingBackward& a) {
  FT_REQUIRE(a.N >= 0 && a.V >= 0 && a.E >= 0, "sizes must not be negative");
  if (a.V == 0 || a.E == 0) return;
  FT_DISPATCH_ISA(embedding_backward_rows, a);
}

}  // namespace fused::cpu
