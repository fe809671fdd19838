#pragma once
// wgmma's state, for the emulator's own files.

namespace emu {

void begin_products();  // of a block

}  // namespace emu
