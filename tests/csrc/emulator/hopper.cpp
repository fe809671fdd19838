#include "hopper.h"

namespace emu {
void begin_hopper() {}
bool progress_hopper() { return false; }
}  // namespace emu
