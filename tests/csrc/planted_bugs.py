"""Bugs that mutations.py plants in copies of csrc/, one at a time: what the emulator's tests must notice.

Each is a place in a file, told by a text that occurs there once, and what stands there instead. Add to the list what a
new kernel could get wrong: a barrier left out, a mask off by one, a fragment swapped, a load without its condition, a
wait for too few copies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    op: str  # whose calls (calls.py) must notice
    name: str
    file: str  # below csrc/
    right: str
    wrong: str


def layer_norm(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("layer_norm", name, file, right, wrong)


def embedding(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("embedding", name, f"embedding/{file}", right, wrong)


def bias_act(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("bias_act", name, f"bias_act/{file}", right, wrong)


def cross_entropy(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("cross_entropy", name, f"cross_entropy/{file}", right, wrong)


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
    embedding(
        "a row beyond the last",
        "forward.cu",
        "if (n >= args.N) return;",
        "if (n > args.N) return;",
    ),
    embedding(
        "a load of the table beyond the row's end",
        "forward.cu",
        "if (col < args.E && !is_padding) load_row",
        "if (!is_padding) load_row",
    ),
    embedding(
        "the second half of the columns takes the first's positions",
        "forward.cu",
        "add_position<kVec, kComputed>(args, position, col, x[step]);",
        "add_position<kVec, kComputed>(args, position, first, x[step]);",
    ),
    embedding(
        "the table's alignment is not looked at",
        "forward.cu",
        " && is_vector_aligned<T>(args.table, args.table_stride)",
        "",
    ),
    embedding(
        "half a turn keeps its sign",
        "device_sine.cuh",
        "return quadrant & 2 ? -value : value;",
        "return quadrant & 4 ? -value : value;",
    ),
    embedding(
        "one token too many in a chunk",
        "backward.cu",
        "const bool is_same = mine < end &&",
        "const bool is_same = mine <= end &&",
    ),
    embedding(
        "lanes beyond the columns leave the warp early",
        "backward.cu",
        "  float sum[kVec] = {};\n  sum_run",
        "  if (col >= args.E) return;\n  float sum[kVec] = {};\n  sum_run",
    ),
    embedding(
        "two parts of a run are written to one row",
        "backward.cu",
        "(number + (began_before ? 0 : chunks_of(args)))",
        "(number + chunks_of(args))",
    ),
    embedding(
        "no barrier before the slices are added",
        "backward.cu",
        "  shared[slice * kWarp + lane] = sum;\n  __syncthreads();",
        "  shared[slice * kWarp + lane] = sum;",
    ),
    embedding(
        "the run's next chunk is not looked at",
        "backward.cu",
        "      if (token_at(args, other * args.chunk) != token) break;\n",
        "",
    ),
    bias_act(
        "a row beyond the last",
        "forward.cu",
        "if (row < args.M) load(",
        "if (row <= args.M) load(",
    ),
    bias_act(
        "a column beyond the last",
        "forward.cu",
        "if (col >= args.N) return;",
        "if (col > args.N) return;",
    ),
    bias_act(
        "a bias of float32 is read as the data's type",
        "device_activation.cuh",
        "if (sizeof(T) == 4 || is_float) {",
        "if (sizeof(T) == 4) {",
    ),
    bias_act(
        "the mask of the thread's first row for all its rows",
        "forward.cu",
        "drop(seed, args.dropout_threshold, args.dropout_scale, row, col,",
        "drop(seed, args.dropout_threshold, args.dropout_scale, first, col,",
    ),
    bias_act(
        "a gradient's load that nothing guards",
        "backward.cu",
        "        if (row >= args.M) break;\n        load(",
        "        load(",
    ),
    bias_act(
        "threads beyond the columns leave before the barrier",
        "backward.cu",
        "  float sum[kVec] = {};\n  if (col < args.N) {",
        "  float sum[kVec] = {};\n  if (col >= args.N) return;\n  {",
    ),
    bias_act(
        "no barrier before the rows' sums are added",
        "backward.cu",
        "shared[threadIdx.x * kVec + i] = sum[i];\n  __syncthreads();",
        "shared[threadIdx.x * kVec + i] = sum[i];",
    ),
    bias_act(
        "no barrier before the slices are added",
        "backward.cu",
        "  shared[slice * kWarp + lane] = sum;\n  __syncthreads();",
        "  shared[slice * kWarp + lane] = sum;",
    ),
    bias_act(
        "the groups of rows overlap",
        "backward.cu",
        "first += args.parts * rows_at_a_time",
        "first += args.parts * rows_at_once",
    ),
    cross_entropy(
        "no barrier before the maximum is read",
        "forward.cu",
        "shared[threadIdx.x / kWarp] = v;\n    __syncthreads();",
        "shared[threadIdx.x / kWarp] = v;",
    ),
    cross_entropy(
        "two halves of a warp have each their maximum",
        "forward.cu",
        "for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf",
        "for (int offset = kWarp / 4; offset > 0; offset /= 2) v = fmaxf",
    ),
    cross_entropy(
        "sums are not carried over to the new maximum",
        "forward.cu",
        "exps *= expf(old_top - shift());",
        "exps *= 1.0f;",
    ),
    cross_entropy(
        "gaps are not carried over to the new maximum",
        "forward.cu",
        "    gaps += count * (shift() - old_shift);",
        "    gaps += 0.0f * old_shift;",
    ),
    cross_entropy(
        "a logit beyond the row's end",
        "forward.cu",
        "      if (i < left) x[i] = to_float(p[i]);",
        "      if (i <= left) x[i] = to_float(p[i]);",
    ),
    cross_entropy(
        "a logit beyond the row's end counts",
        "forward.cu",
        "return (kAligned ? 0 : i) < left(step);",
        "return (kAligned ? 0 : i) <= left(step);",
    ),
    cross_entropy(
        "an ignored row is read",
        "device_target.cuh",
        "const bool counts = word != args.ignore_index;",
        "const bool counts = true;",
    ),
    cross_entropy(
        "a row beyond the last",
        "backward.cu",
        "if (row >= args.M) return;",
        "if (row > args.M) return;",
    ),
    cross_entropy(
        "a column beyond the last",
        "backward.cu",
        "    if (col >= args.V) break;",
        "    if (col > args.V) break;",
    ),
    cross_entropy(
        "the target of a vector's first column for all its columns",
        "backward.cu",
        "if (col + i == target.word)",
        "if (col == target.word)",
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
)
