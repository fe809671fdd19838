"""Planted bugs of the kernels that take rows: embedding, bias_act and cross_entropy. See planted_bugs.py."""

from __future__ import annotations

from tests.csrc.bug import Bug


def embedding(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("embedding", name, f"embedding/{file}", right, wrong)


def bias_act(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("bias_act", name, f"bias_act/{file}", right, wrong)


def cross_entropy(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("cross_entropy", name, f"cross_entropy/{file}", right, wrong)


ROW_BUGS: tuple[Bug, ...] = (
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
)
