#pragma once
// C (+)= A B on small tiles that live in the first two caches: the matrix product of all attention kernels.
//
// B and C are row-major with NV vectors a row; A is read one element at a time and broadcast, so it may be stored
// either way round and needs no packing. MR rows of C stay in registers while k runs: each step is NV loads, MR
// broadcasts and MR * NV fused multiply-adds. With 16 registers four steps stand side by side: 20 instructions for 12
// multiply-adds and not 24, which is 3 to 12 % of the time on a Zen 3 whose core has another one at work. Every element
// is summed over k in order, whatever group of rows it falls into, and then added to C: so long sums are sums of short
// ones, and results don't depend on how rows are grouped.

#include "../common/simd.h"

namespace fused::cpu::FT_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Rows of C held in registers beside NV vectors of B and one broadcast; no more than 12 addresses. (With 16 registers
// and 3 vectors that is all of them: 4 rows, where 3 take 10 % longer.)
template <int NV>
constexpr int rows_in_registers() {
  constexpr int rows = (kRegisters - NV - 1) / NV;
  return rows > 12 ? 12 : rows;
}

// kRowMajor: A(m, k) = A[m * lda + k]; otherwise A(m, k) = A[k * lda + m].
template <int MR, int NV, bool kRowMajor>
FT_INLINE void product_rows(int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                            bool accumulate) {
  Vec c[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) c[m][n] = Vec{};
  const int64_t along = kRowMajor ? 1 : lda;
  const auto step = [&]() __attribute__((always_inline)) {
    Vec b[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) b[n] = load(B + n * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec a = splat(A[kRowMajor ? m * lda : m]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) c[m][n] = add_product(c[m][n], a, b[n]);
    }
    A += along, B += ldb;
  };
  if constexpr (kRegisters == 16) {
    const float* const end = B + K / 4 * 4 * ldb;
#pragma GCC unroll 1
    while (B != end) {
      step(), loads_wait();
      step(), loads_wait();
      step(), loads_wait();
      step(), loads_wait();
    }
    if (K & 2) step(), loads_wait(), step();
    if (K & 1) step();
  } else {
    for (int k = 0; k < K; ++k) step();
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* to = C + m * ldc + n * kWidth;
      store(to, accumulate ? load(to) + c[m][n] : c[m][n]);
    }
}

// The same for a number of rows that is known only now, at most MR.
template <int MR, int NV, bool kRowMajor>
FT_INLINE void product_any(int rows, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                           int64_t ldc, bool accumulate) {
  if (rows == MR) {
    product_rows<MR, NV, kRowMajor>(K, A, lda, B, ldb, C, ldc, accumulate);
  } else if constexpr (MR > 1) {
    product_any<MR - 1, NV, kRowMajor>(rows, K, A, lda, B, ldb, C, ldc, accumulate);
  }
}

// C[M][NV vectors] (+)= A[M][K] B[K][NV vectors]; `between` is called before each group of rows.
template <int NV, bool kRowMajor, class F>
__attribute__((noinline)) void product(int M, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                                       int64_t ldc, bool accumulate, const F& between) {
  constexpr int MR = rows_in_registers<NV>();
  const int64_t a_step = kRowMajor ? lda : 1;
  // Groups of nearly equal size: a last group of one or two rows would wait for its own additions.
  const int groups = (M + MR - 1) / MR;
  for (int g = 0; g < groups; ++g) {
    const int m = M * g / groups, rows = M * (g + 1) / groups - m;
    between();
    product_any<MR, NV, kRowMajor>(rows, K, A + m * a_step, lda, B, ldb, C + m * ldc, ldc, accumulate);
  }
}

// The same for rows of any whole number of vectors.
template <bool kRowMajor, class F>
void product_wide(int M, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                  int vectors, bool accumulate, const F& between) {
  constexpr int NV = kRegisters == 32 ? 4 : 2;
  int n = 0;
  for (; n + NV <= vectors; n += NV)
    product<NV, kRowMajor>(M, K, A, lda, B + n * kWidth, ldb, C + n * kWidth, ldc, accumulate, between);
  for (; n < vectors; ++n)
    product<1, kRowMajor>(M, K, A, lda, B + n * kWidth, ldb, C + n * kWidth, ldc, accumulate, between);
}

struct Nothing {
  FT_INLINE void operator()() const {}
};
template <int NV, bool kRowMajor>
FT_INLINE void product(int M, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                       bool accumulate) {
  product<NV, kRowMajor>(M, K, A, lda, B, ldb, C, ldc, accumulate, Nothing());
}
template <bool kRowMajor>
FT_INLINE void product_wide(int M, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                            int64_t ldc, int vectors, bool accumulate) {
  product_wide<kRowMajor>(M, K, A, lda, B, ldb, C, ldc, vectors, accumulate, Nothing());
}

}  // namespace fused::cpu::FT_ISA
