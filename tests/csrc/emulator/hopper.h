#pragma once
// mbarrier, TMA and wgmma: what a block has of sm_90's asynchronous hardware.

namespace emu {

void begin_hopper();
bool progress_hopper();  // nothing else can run: lets a copy land; false if there is none

}  // namespace emu
