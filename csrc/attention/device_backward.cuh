#pragma once
// What the backward kernels share: a query's statistics, and the way from scores to d(scores).
//
//   P = exp(S - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = dO . out

#include "../common/exp2.cuh"
#include "device_bias.cuh"

namespace fused::cuda {

// Of one query, written by attention_backward_statistics. lse: in logarithms of 2 for 16-bit types; +inf where the
// query sees nothing, so that its weights become 0 and not NaN.
struct Statistics {
  float lse, delta;
};

FT_DEVICE Statistics* statistics_of(const AttentionBackward& args, const Sequence& s, int head, int row) {
  return reinterpret_cast<Statistics*>(query_row<float>(args, args.statistics, s, head, row));
}

// How scores become weights. Scores are scaled (and biased) beforehand for float32 and where there is a bias. kPlain: a
// kernel that takes neither bias nor dropout.
template <class T, bool kPlain = false>
struct Weights {
  bool biased, scaled, dropout;
  float unit;

  FT_DEVICE explicit Weights(const Attention& args)
      : biased(!kPlain && args.bias.data != nullptr),
        scaled(sizeof(T) == 4 || biased),
        dropout(!kPlain && args.dropout_p > 0.0f),
        unit(scaled ? kLog2E : args.scale * kLog2E) {}

  FT_DEVICE float operator()(float score, float lse) const {
    return exp2_fast(sizeof(T) == 4 ? (score - lse) * unit : fmaf(score, unit, -lse));
  }

  // score and dweight (dP) become the weight as dropout leaves it, and d(score). A masked score's dP may be NaN, from a
  // garbage value row: it must not meet its weight of 0.
  FT_DEVICE void differentiate(float& score, float& dweight, const Statistics& of_query, float dropout_factor) const {
    const bool masked = score == -INFINITY;
    const float weight = masked ? 0.0f : (*this)(score, of_query.lse);
    const float dscore = weight * fmaf(dweight, dropout_factor, -of_query.delta);
    dweight = masked ? 0.0f : dscore;
    score = weight * dropout_factor;
  }
};

inline bool is_plain(const Attention& args) { return args.bias.data == nullptr && !(args.dropout_p > 0.0f); }

// The launchers of the passes, one in each .cu; `args` is prepared.
void attention_backward_statistics(const AttentionBackward& args, void* stream);
void attention_backward_keys(const AttentionBackward& args, void* stream);
void attention_backward_queries(const AttentionBackward& args, void* stream);
void attention_backward_bias(const AttentionBackward& args, void* stream);

}  // namespace fused::cuda
