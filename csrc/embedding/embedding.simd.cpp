// Forward: one task a token, E columns each. It moves 2 E elements a token (a row of the table in, a row of out),
// and the positions' rows, which stay in cache; so it is bound by memory. Prefetching the next token's row and
// stores that bypass the cache were measured and made no difference (4096 tokens of width 512, AVX-512).
//
// Backward: tokens are sorted by a counting sort, so that each row of dtable is the sum of one segment of rows of
// dout. A task is kColumns columns of kVocabulary rows: its sums stay in registers, and the segment of a frequent
// token is spread over several threads. Each element of dtable is written once, by one thread.

#include "embedding.h"

#include "../common/parallel.h"
#include "../common/row_dropout.h"

namespace fused::cpu::FT_ISA {

namespace {

constexpr int kParts = 8;                  // vectors a task of the backward keeps in registers
constexpr int kColumns = kParts * kWidth;  // a multiple of kDropoutColumns
constexpr int64_t kVocabulary = 256;       // rows of dtable a task writes

FT_INLINE int64_t token_at(const void* tokens, bool wide, int64_t n) {
  return wide ? static_cast<const int64_t*>(tokens)[n] : static_cast<const int32_t*>(tokens)[n];
}

FT_INLINE RowDropout row_dropout_of(const EmbeddingDropout& d) {
  return {d.seed ? uint64_t(*d.seed) : 0, d.threshold, d.keep_scale};
}

FT_INLINE int smaller(int64_t a, int b) { return a < b ? int(a) : b; }

// Columns col ... col + kDropoutColumns - 1 of one output row, as far as they exist.
template <bool kPositions, bool kDropout, bool kWhole, class T>
FT_INLINE void forward_columns(const T* in, const float* position, T* out, float scale, const RowDropout& dropout,
                               int64_t row, int64_t col, int64_t E) {
  RowFactors factors;
  if constexpr (kDropout) factors = row_dropout(dropout, row, col);
  for (int i = 0; i < 4; ++i) {
    const int64_t c = col + i * kWidth;
    const int count = kWhole ? kWidth : smaller(E - c, kWidth);
    if (!kWhole && count <= 0) break;
    Vec x = (kWhole ? load(in + c) : load(in + c, count)) * splat(scale);
    if constexpr (kPositions) x = x + (kWhole ? load(position + c) : load(position + c, count));
    if constexpr (kDropout) x = (factors.part[i] > Vec{}) ? x * factors.part[i] : Vec{};
    if (kWhole) {
      store(out + c, x);
    } else {
      store(out + c, x, count);
    }
  }
}

template <class T, bool kPositions, bool kDropout>
void forward_rows(const EmbeddingForward& a) {
  const T* table = static_cast<const T*>(a.table);
  const RowDropout dropout = row_dropout_of(a.dropout);
  const int64_t whole = a.E / kDropoutColumns * kDropoutColumns;
  // A copied element is a quarter of the work that kParallelWork counts: below 256 tokens of width 512, one thread.
  parallel_for(a.N, a.N * a.E / 4, [&](int64_t n) {
    T* out = static_cast<T*>(a.out) + n * a.E;
    const int64_t token = token_at(a.tokens, a.wide_tokens, n);
    if (token < 0 || token >= a.V) {
#pragma omp critical(embedding_first_bad)
      if (*a.first_bad < 0 || n < *a.first_bad) *a.first_bad = n;
      return;
    }
    if (token == a.padding_idx) {
      std::memset(out, 0, size_t(a.E) * sizeof(T));
      return;
    }
    const T* in = table + token * a.table_stride;
    const float* position = nullptr;
    if constexpr (kPositions) {
      const int64_t p =
          a.position_ids != nullptr ? a.position_ids[n] : (a.starts != nullptr ? a.starts[n / a.L] : a.start) + n % a.L;
      position = a.positions + p * a.E;
    }
    for (int64_t c = 0; c < whole; c += kDropoutColumns) {
      forward_columns<kPositions, kDropout, true>(in, position, out, a.scale, dropout, n, c, a.E);
    }
    if (whole < a.E) forward_columns<kPositions, kDropout, false>(in, position, out, a.scale, dropout, n, whole, a.E);
  });
}

// order = 0 ... N - 1 sorted by token, ascending within one token, without padding. ends[v] is where the segment
// of token v ends in it; it begins where the one before ends.
void sort_by_token(const EmbeddingBackward& a) {
  std::memset(a.ends, 0, size_t(a.V + 1) * sizeof(int64_t));
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t token = token_at(a.tokens, a.wide_tokens, n);
    if (token != a.padding_idx) ++a.ends[token + 1];
  }
  for (int64_t v = 0; v < a.V; ++v) a.ends[v + 1] += a.ends[v];
  // Now ends[v] is where the segment begins; each number placed moves it, in the end to the segment's end.
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t token = token_at(a.tokens, a.wide_tokens, n);
    if (token != a.padding_idx) a.order[a.ends[token]++] = n;
  }
}

template <class T, bool kDropout>
void backward_rows(const EmbeddingBackward& a) {
  sort_by_token(a);
  const RowDropout dropout = row_dropout_of(a.dropout);
  const int64_t blocks = (a.E + kColumns - 1) / kColumns, chunks = (a.V + kVocabulary - 1) / kVocabulary;
  parallel_tasks(blocks * chunks, a.V * a.E, [&](int64_t task) {
    const int64_t chunk = task / blocks, block = task % blocks, col = block * kColumns;
    const int columns = smaller(a.E - col, kColumns);
    const int64_t last = (chunk + 1) * kVocabulary < a.V ? (chunk + 1) * kVocabulary : a.V;
    for (int64_t v = chunk * kVocabulary; v < last; ++v) {
      T* dtable = static_cast<T*>(a.dtable) + v * a.E;
      const int64_t begin = v == 0 ? 0 : a.ends[v - 1], end = a.ends[v];
      if (begin == end) {  // rows of zeros, as many as follow one another, once
        int64_t next = v + 1;
        while (next < last && a.ends[next] == end) ++next;
        if (block == 0) std::memset(dtable, 0, size_t((next - v) * a.E) * sizeof(T));
        v = next - 1;
        continue;
      }
      Vec sum[kParts] = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = a.order[i];
        const T* dout = static_cast<const T*>(a.dout) + n * a.dout_stride + col;
        for (int half = 0; half < kParts; half += 4) {
          RowFactors factors;
          if constexpr (kDropout) factors = row_dropout(dropout, n, col + half * kWidth);
          for (int part = half; part < half + 4; ++part) {
            const int rest = columns - part * kWidth;
            if (rest <= 0) break;
            const Vec x = rest >= kWidth ? load(dout + part * kWidth) : load(dout + part * kWidth, rest);
            if constexpr (kDropout) {
              const Vec factor = factors.part[part - half];
              sum[part] = sum[part] + ((factor > Vec{}) ? x * factor : Vec{});
            } else {
              sum[part] = sum[part] + x;
            }
          }
        }
      }
      for (int part = 0; part < kParts; ++part) {
        const int rest = columns - part * kWidth;
        if (rest <= 0) break;
        store(dtable + col + part * kWidth, sum[part] * splat(a.scale), smaller(rest, kWidth));
      }
    }
  });
}

}  // namespace

void embedding_forward_rows(const EmbeddingForward& a) {
  dispatch(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.positions != nullptr) {
      a.dropout.seed != nullptr ? forward_rows<T, true, true>(a) : forward_rows<T, true, false>(a);
    } else {
      a.dropout.seed != nullptr ? forward_rows<T, false, true>(a) : forward_rows<T, false, false>(a);
    }
  });
}

void embedding_backward_rows(const EmbeddingBackward& a) {
  dispatch(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.dropout.seed != nullptr ? backward_rows<T, true>(a) : backward_rows<T, false>(a);
  });
}

}  // namespace fused::cpu::FT_ISA
