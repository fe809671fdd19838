#pragma once
// Which instruction set a CPU kernel runs with, chosen once per process.
//
// A file named <op>.simd.cpp is compiled once for each instruction set, each time with FT_ISA defined as one
// of the names below; its code lives in namespace fused::cpu::FT_ISA. <op>.cpp, compiled once, calls the best
// one through FT_DISPATCH_ISA. "baseline" is 128-bit vectors: SSE2 on x86-64, NEON on aarch64, plain scalars
// elsewhere.

#include <string>

namespace fused::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best this processor and its operating system run; FUSED_TRANSFORMER_ISA=baseline|avx2|avx512 asks for a
// lesser one (a greater one than there is raises std::invalid_argument).
Isa isa();
std::string isa_name();

// Whether the processor is one of AMD's, where some choices fall otherwise.
bool is_amd();

}  // namespace fused::cpu

#if defined(__x86_64__)
#define FT_DECLARE_ISA(function, Args) \
  namespace baseline {                 \
  void function(const Args&);          \
  }                                    \
  namespace avx2 {                     \
  void function(const Args&);          \
  }                                    \
  namespace avx512 {                   \
  void function(const Args&);          \
  }
#define FT_DISPATCH_ISA(function, args) \
  switch (::fused::cpu::isa()) {        \
    case ::fused::cpu::Isa::avx512:     \
      return avx512::function(args);    \
    case ::fused::cpu::Isa::avx2:       \
      return avx2::function(args);      \
    case ::fused::cpu::Isa::baseline:   \
      return baseline::function(args);  \
  }
#else
#define FT_DECLARE_ISA(function, Args) \
  namespace baseline {                 \
  void function(const Args&);          \
  }
#define FT_DISPATCH_ISA(function, args) return baseline::function(args)
#endif
