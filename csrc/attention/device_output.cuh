#pragma once
// What a warp of the forward kernels leaves behind: its rows of the output, and their logarithms of sums.

#include "device_softmax.cuh"

namespace fused::cuda {

// Rows `row` ... of one sequence and head, those beyond the end left out. Goes through rows stage_row ... of `stage`,
// which are the warp's own. natural: what scores are multiplied by to be natural logarithms.
template <class T, int R, int N>
FT_DEVICE void store_output(const AttentionForward& args, const Sequence& s, int head, int row,
                            const Tile<T, N * 8>& stage, int stage_row, Softmax<R>& softmax, float natural,
                            const float (&out)[R][N][4]) {
  if (row >= s.L) return;
  softmax.finish();
  float factor[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = softmax.sum[r][half];
      factor[r][half] = sum == 0.0f ? 0.0f : args.dropout_scale / sum;
      const int query = row + r * 16 + half * 8 + group();
      if (query < s.L && pair() == 0)
        *query_row<float>(args, args.lse, s, head, query) =
            sum == 0.0f ? -INFINITY : fmaf(softmax.maximum[r][half], natural, logf(sum));
    }
  store_rows<R, N>(stage, stage_row, 0, out, factor, query_row<T>(args, args.out, s, head, row), args.out.row,
                   s.L - row, int(args.D), args.vectors);
}

}  // namespace fused::cuda
