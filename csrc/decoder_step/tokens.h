#pragma once
// The tokens that a step begins with, embedded as csrc/embedding does it.

#include <cstdint>

#include "../embedding/embedding.h"

namespace fused::cpu {

struct TokenTable {
  const float* table = nullptr;      // (V, E) contiguous; nullptr: there is none
  const float* positions = nullptr;  // (P, E) contiguous; nullptr: none are added
  int64_t V = 0, P = 0;
  int64_t padding_idx = -1;  // -1: none
  float scale = 1.0f;
};

// out (count, E): tokens at `position` each, or at position_ids (count,). Returns the number of the first token that is
// not in the table, and out is not complete then; -1: all are.
inline int64_t embed_tokens(const TokenTable& table, int64_t E, const int64_t* tokens, int64_t count, int64_t position,
                            const int64_t* position_ids, float* out) {
  int64_t first_bad = -1;
  EmbeddingForward args{};
  args.tokens = tokens, args.wide_tokens = true;
  args.table = table.table, args.table_stride = E;
  args.positions = table.positions, args.start = position, args.position_ids = position_ids;
  args.out = out, args.first_bad = &first_bad;
  args.N = count, args.L = 1, args.V = table.V, args.E = E;
  args.padding_idx = table.padding_idx, args.scale = table.scale;
  args.dropout = {nullptr, 0, 1.0f};
  args.dtype = DType::f32;
  embedding_forward(args);
  return first_bad;
}

}  // namespace fused::cpu
