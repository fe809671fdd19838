#pragma once
// sm_90's asynchronous hardware: mbarrier, TMA and wgmma.
//
// Lazy copies of TMA land when no thread can run any more, and lazy products of wgmma are done at their wait: the
// latest that a device could do them. Eager ones are done where they are issued.

#include <cstdint>

#include "block.h"

namespace emu {

void begin_hopper();
bool progress_hopper();  // nothing else can run: lets a copy land; false if there is none

// ---------------------------------------------------------------- mbarrier

void init_mbarrier(const void* barrier, int arrivals);
void arrive_mbarrier(const void* barrier, int expected_bytes);
void wait_mbarrier(const void* barrier, int parity, const Where& where);

// ---------------------------------------------------------------- TMA

// What cuTensorMapEncodeTiled makes: a tensor of rank 4 with elements of two bytes, of which a copy takes a box of 64
// columns (128 bytes, swizzled) and `box_rows` rows. What lies outside of the tensor is read as 0.
struct TensorMap {
  const char* base = nullptr;
  int64_t sizes[4] = {};    // elements, innermost first
  int64_t strides[3] = {};  // bytes, of axes 1, 2 and 3
  int box_rows = 0;
};

constexpr int kBoxColumns = 64;

void load_box(void* shared, const TensorMap& map, const void* barrier, const int (&at)[4]);

// Where a byte of a tile with 128-byte rows stands under the 128-byte swizzle; both are offsets in shared memory.
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// ---------------------------------------------------------------- wgmma

enum class WideKind { f16, bf16 };

// d (64 x columns) = a (64 x 16) b (16 x columns), added to d if `accumulate`, by the warpgroup of 128 threads. `a` is
// in registers, or nullptr: then it is the tile that a_tile describes.
struct Product {
  float* d;
  const uint32_t* a;
  uint64_t a_tile, b_tile;
  int columns;
  bool b_rows_are_k;  // b is stored as (16, columns) and not as (columns, 16)
  bool accumulate;
  WideKind kind;
};

uint64_t describe_tile(const void* shared, int leading_bytes);
void fence_products();
void issue_product(const Product& product, const Where& where);
void commit_products(const Where& where);
void wait_for_products(int groups_left, const Where& where);

}  // namespace emu
