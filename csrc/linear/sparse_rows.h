#pragma once
// A float32 product of many rows, of whose factors many are 0, as ReLU leaves them: half with random weights, nine of
// ten in a trained model. Each row is multiplied by the weights of its own places alone (of few rows sparse.h leaves
// out what none needs). Sums are the same, but for the sign of a 0.
//
// In turns with block(), 2048 x 512 weights from memory, one thread of a Zen 3 beside other guests: with 62, 75 and 90
// % zeros 32 rows at 1.15, 1.4 and 1.5 to 1.8 times the speed, 64 rows at 1.1 to 1.3, 1.5 and 2.2, 256 rows at 1.1, 1.4
// and 2.1; with half of them 0.95 to 1.1, and 16 rows no sooner below 90 %. Only from 62 % on, with 32 rows and AVX2.

#include "../common/isa.h"
#include "linear.h"

namespace fused::cpu {

constexpr int64_t kSparseChunk = 64;  // of K

// Of some rows the factors that are not 0 and their places, in order.
struct SparseRows {
  const Linear* product;
  int64_t first, count;  // of the product's rows
  int64_t room;          // of a row in the lists: K, to full vectors and one more
  int64_t chunks;        // of K
  float* values;         // (count, room)
  uint16_t* places;      // (count, room)
  int32_t* ends;         // (count, chunks): where a chunk's places end
};

struct PlacesOfRows {
  const SparseRows* rows;
  int64_t begin, end;  // of rows.count
};

struct SparsePanels {
  const SparseRows* rows;
  int64_t begin, end;  // panels of the weight
};

FT_DECLARE_ISA(find_places, PlacesOfRows)      // values, places, ends
FT_DECLARE_ISA(multiply_places, SparsePanels)  // y

// The whole product; false where too little is 0, and then nothing has been written.
bool linear_of_sparse_rows(const Linear& args);

}  // namespace fused::cpu
