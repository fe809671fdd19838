#include "isa.h"

#include <cstdlib>

#include "check.h"

namespace fused::cpu {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  // Every processor with AVX2 and FMA also has F16C, which the half conversions use.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("FUSED_TRANSFORMER_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  const std::string name = asked;
  Isa wanted = Isa::baseline;
  if (name == "avx512") {
    wanted = Isa::avx512;
  } else if (name == "avx2") {
    wanted = Isa::avx2;
  } else {
    FT_REQUIRE(name == "baseline", "FUSED_TRANSFORMER_ISA must be baseline, avx2 or avx512, got " << name);
  }
  FT_REQUIRE(wanted <= best, "FUSED_TRANSFORMER_ISA=" << name << ", but this processor does not have it");
  return wanted;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

std::string isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

bool is_amd() {
#if defined(__x86_64__)
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
  return found;
#else
  return false;
#endif
}

}  // namespace fused::cpu
