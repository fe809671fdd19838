"""Bugs that mutations.py plants in copies of csrc/, one at a time: what the emulator's tests must notice.

Each is a place in a file, told by a text that occurs there once, and what stands there instead. Add to the list what a
new kernel could get wrong: a barrier left out, a mask off by one, a fragment swapped, a load without its condition, a
wait for too few copies.
"""

from __future__ import annotations

from tests.csrc.bug import Bug
from tests.csrc.planted_attention_bugs import ATTENTION_BUGS
from tests.csrc.planted_row_bugs import ROW_BUGS
from tests.csrc.planted_sm90_bugs import SM90_BUGS


def layer_norm(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("layer_norm", name, file, right, wrong)


def decode_attention(name: str, right: str, wrong: str) -> Bug:
    return Bug("decode_attention", name, "decode_attention/forward.cu", right, wrong)


def log_softmax_top_k(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("log_softmax_top_k", name, f"log_softmax_top_k/{file}", right, wrong)


REDUCE, FORWARD, BACKWARD = "common/reduce.cuh", "layer_norm/forward.cu", "layer_norm/backward.cu"

BUGS: tuple[Bug, ...] = (
    layer_norm(
        "no barrier before the sums are written again",
        REDUCE,
        "    __syncthreads();  // the last sums have been read\n",
        "",
    ),
    layer_norm(
        "no barrier after the sums are written",
        REDUCE,
        "warp] = v[i];\n    __syncthreads();",
        "warp] = v[i];",
    ),
    layer_norm(
        "a warp's sum leaves half of it out",
        REDUCE,
        "int offset = kWarp / 2;",
        "int offset = kWarp / 4;",
    ),
    layer_norm(
        "one warp's sum too many",
        REDUCE,
        "lane < kWarps ?",
        "lane <= kWarps ?",
    ),
    layer_norm(
        "a shuffle in a branch",
        REDUCE,
        "v[i] = warp_sum(lane < kWarps ? shared[i * kWarp + lane] : 0.0f);",
        "if (lane < kWarps) v[i] = warp_sum(shared[i * kWarp + lane]);",
    ),
    layer_norm(
        "a row beyond the last",
        FORWARD,
        "if (row >= args.M) return;",
        "if (row > args.M) return;",
    ),
    layer_norm(
        "a load beyond the row's end",
        FORWARD,
        "    if (col >= args.N) continue;\n    load_total",
        "    if (col > args.N) continue;\n    load_total",
    ),
    layer_norm(
        "a store beyond the row's end",
        FORWARD,
        "if (col < args.N) f(col, total[step]);",
        "if (col <= args.N) f(col, total[step]);",
    ),
    layer_norm(
        "two blocks write one row",
        FORWARD,
        "const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads;",
        "const int64_t row = int64_t(blockIdx.x / 2) * kRows + threadIdx.x / kThreads;",
    ),
    layer_norm(
        "the variance of one column less",
        FORWARD,
        "const float variance = rest_and_squares[1] / float(args.N)",
        "const float variance = rest_and_squares[1] / float(args.N - 1)",
    ),
    layer_norm(
        "too little shared memory",
        FORWARD,
        "layer_norm_forward_kernel(const LayerNormForward args) {\n  FT_SHARED(float, shared, [2 * kWarp]);",
        "layer_norm_forward_kernel(const LayerNormForward args) {\n  FT_SHARED(float, shared, [kWarp]);",
    ),
    layer_norm(
        "the residual's alignment is not looked at",
        FORWARD,
        "  aligned = aligned && is_vector_aligned<T>(args.residual, args.residual_stride);\n",
        "",
    ),
    layer_norm(
        "dropout's bits of the first four columns for all eight",
        "common/philox.cuh",
        "uint32_t((col + first) / 4)",
        "uint32_t(col / 4)",
    ),
    layer_norm(
        "no barrier before the warps' sums are written again",
        BACKWARD,
        "  __syncthreads();  // the last buffer's sums have been read\n",
        "",
    ),
    layer_norm(
        "no barrier after the warps' sums are written",
        BACKWARD,
        "pick(sums[step])[i];\n  __syncthreads();",
        "pick(sums[step])[i];",
    ),
    layer_norm(
        "all blocks write one row of partial sums",
        BACKWARD,
        "    partial[blockIdx.x * N + col] = sum;",
        "    partial[col] = sum;",
    ),
    layer_norm(
        "a part beyond the last",
        BACKWARD,
        "part < args.parts;",
        "part <= args.parts;",
    ),
    layer_norm(
        "no barrier before the slices are added",
        BACKWARD,
        "  shared[slice * kWarp + lane] = sum;\n  __syncthreads();",
        "  shared[slice * kWarp + lane] = sum;",
    ),
    layer_norm(
        "partial sums that nobody set to zero",
        BACKWARD,
        "partial[blockIdx.x * args.N + col + i] = 0.0f;",
        "partial[blockIdx.x * args.N + col + i] *= 1.0f;",
    ),
    layer_norm(
        "a gradient's load beyond the row's end",
        BACKWARD,
        "if (col < args.N) first_pass<T>(",
        "if (col <= args.N) first_pass<T>(",
    ),
    layer_norm(
        "the last row is left out",
        BACKWARD,
        "row < args.M;\n       row += int64_t(gridDim.x) * kRows",
        "row < args.M - 1;\n       row += int64_t(gridDim.x) * kRows",
    ),
    decode_attention(
        "no barrier before the groups' sums are merged",
        "  __syncthreads();\n  for (int id = threadIdx.x; id < rows.count * D;",
        "  for (int id = threadIdx.x; id < rows.count * D;",
    ),
    decode_attention(
        "a key beyond the last",
        "const bool present = key(x) < stop;",
        "const bool present = key(x) <= stop;",
    ),
    decode_attention(
        "a query sees the key after its own",
        "keys - (queries - 1 - rows.query(args, m))",
        "keys - (queries - 2 - rows.query(args, m))",
    ),
    decode_attention(
        "an unseen value is multiplied by 0",
        "all ? values[x][i] : 0.0f",
        "all || true ? values[x][i] : 0.0f",
    ),
    decode_attention(
        "the maximum of no keys is subtracted",
        "return x == -INFINITY ? 0.0f : x;",
        "return x;",
    ),
    decode_attention(
        "splits that have no keys are merged",
        "used = (keys_of(args, b) + split_keys - 1) / split_keys;",
        "used = splits;",
    ),
    decode_attention(
        "a group of lanes sums too few of them",
        "int offset = kLanes / 2;",
        "int offset = kLanes / 4;",
    ),
    log_softmax_top_k(
        "no barrier before the warps' lists are merged",
        "rows.cu",
        "  __syncthreads();\n  if (warp > 0) return;\n  sum =",
        "  if (warp > 0) return;\n  sum =",
    ),
    log_softmax_top_k(
        "no barrier before the beams' lists are merged",
        "rows.cu",
        "  __syncthreads();\n  if (warp > 0) return;\n\n  bool mine",
        "  if (warp > 0) return;\n\n  bool mine",
    ),
    log_softmax_top_k(
        "a load beyond the row's end",
        "rows.cu",
        "const bool present = col < stop;",
        "const bool present = col <= stop;",
    ),
    log_softmax_top_k(
        "one warp's list is left out",
        "rows.cu",
        "for (int other = 1; other < kWarps; ++other)",
        "for (int other = 2; other < kWarps; ++other)",
    ),
    log_softmax_top_k(
        "of equal numbers the later first",
        "device_best.cuh",
        "place < other.place",
        "place > other.place",
    ),
    log_softmax_top_k(
        "nothing moves from one register of the lanes to the next",
        "device_best.cuh",
        "if (lane == 0) previous = carried;",
        "if (lane == kWarp) previous = carried;",
    ),
    *ROW_BUGS,
    *ATTENTION_BUGS,
    *SM90_BUGS,
)
