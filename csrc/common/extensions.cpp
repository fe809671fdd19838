#include "extensions.h"

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused::cpu {
namespace {

#if defined(__x86_64__)
// Linux saves the 8 KiB of tile registers only for processes that asked it to.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Extensions find() {
  Extensions found;
  unsigned a, b, c, d;
  if (isa() != Isa::avx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned amx = (1u << 22) | (1u << 24) | (1u << 25);  // bfloat16, tiles, int8
#if defined(FT_WITH_DOTS)
  found.int8_dots = (c >> 11) & 1u;
#endif
#if defined(FT_WITH_TILES)
  found.tiles = (d & amx) == amx && may_use_tiles();
#endif
  (void)amx;
#if defined(FT_WITH_DOTS)
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.bf16_dots = (a >> 5) & 1u;
#endif
  return found;
}
#else
Extensions find() { return {}; }
#endif

}  // namespace

const Extensions& extensions() {
  static const Extensions found = find();
  return found;
}

}  // namespace fused::cpu
