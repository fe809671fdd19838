"""Planted bugs of attention's kernels. See planted_bugs.py."""

from __future__ import annotations

from tests.csrc.bug import Bug


def attention(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("attention", name, f"attention/{file}", right, wrong)


FORWARD, KEYS, QUERIES, BIAS = "forward.cu", "backward_keys.cu", "backward_queries.cu", "backward_bias.cu"
TILE, PRODUCT, MASK, SOFTMAX = "device_tile.cuh", "device_product.cuh", "device_mask.cuh", "device_softmax.cuh"

ATTENTION_BUGS: tuple[Bug, ...] = (
    # ---------------------------------------------------------------- barriers
    attention(
        "forward: no barrier before the keys are read",
        FORWARD,
        "    __syncthreads();  // keys are there, and nobody reads the last values and bias any more\n",
        "",
    ),
    attention(
        "forward: no barrier before the values are read",
        FORWARD,
        "    else\n      __syncthreads();\n    // values and bias are there",
        "    // values and bias are there",
    ),
    attention(
        "forward: no barrier after values are cleaned",
        FORWARD,
        "[](int) { return true; });\n      __syncthreads();\n",
        "[](int) { return true; });\n",
    ),
    attention(
        "keys: no barrier before the queries are read",
        KEYS,
        "    __syncthreads();  // the queries are there\n",
        "",
    ),
    attention(
        "keys: no barrier before the queries are overwritten",
        KEYS,
        "    __syncthreads();  // nobody reads these queries any more\n",
        "",
    ),
    attention(
        "queries: no barrier before the values are read",
        QUERIES,
        "    __syncthreads();  // values are there, and nobody reads the last keys and bias any more\n",
        "",
    ),
    attention(
        "queries: no barrier before the keys are read",
        QUERIES,
        "    else\n      __syncthreads();\n    // keys and bias are there",
        "    // keys and bias are there",
    ),
    attention(
        "bias: no barrier before the tiles are overwritten",
        BIAS,
        "    __syncthreads();  // nobody reads the last tiles any more\n",
        "",
    ),
    attention(
        "a warp reads what it may see before it is written",
        MASK,
        "  words[threadIdx.x] = word;\n  __syncwarp();\n",
        "  words[threadIdx.x] = word;\n",
    ),
    attention(
        "a warp's words are overwritten before they are read",
        MASK,
        "  __syncwarp();  // the last words have been read\n",
        "",
    ),
    attention(
        "a warp's rows go out before they are in shared memory",
        TILE,
        "acc[r][n][half * 2 + 1] * factor[r][half]);\n  __syncwarp();\n",
        "acc[r][n][half * 2 + 1] * factor[r][half]);\n",
    ),
    attention(
        "float32 weights are read before they are in shared memory",
        PRODUCT,
        "p[r][k][half * 2 + 1]);\n    __syncwarp();\n",
        "p[r][k][half * 2 + 1]);\n",
    ),
    # ---------------------------------------------------------------- copies that nobody waits for
    attention(
        "forward: keys are not waited for",
        FORWARD,
        "    copy_async_wait<0>();\n    __syncthreads();  // keys are there",
        "    copy_async_wait<1>();\n    __syncthreads();  // keys are there",
    ),
    attention(
        "forward: values are not waited for",
        FORWARD,
        "    copy_async_wait<0>();\n    bool bad = false;",
        "    copy_async_wait<1>();\n    bool bad = false;",
    ),
    attention(
        "keys: the queries of two batches are on their way",
        KEYS,
        "copy_async_wait<1>();",
        "copy_async_wait<2>();",
    ),
    attention(
        "queries: keys are not waited for",
        QUERIES,
        "    copy_async_wait<0>();\n    bool bad = false;",
        "    copy_async_wait<1>();\n    bool bad = false;",
    ),
    # ---------------------------------------------------------------- moves
    attention(
        "rows beyond the sequence's end are read",
        TILE,
        "row < from.count ? max(0, min(kChunk, from.width - (mine.c + j) * kChunk)) : 0;",
        "max(0, min(kChunk, from.width - (mine.c + j) * kChunk));",
    ),
    attention(
        "columns beyond the head's width are read",
        TILE,
        "max(0, min(kChunk, from.width - (mine.c + j) * kChunk)) : 0;",
        "kChunk : 0;",
    ),
    attention(
        "a row beyond the last is written",
        TILE,
        "if (row >= count || col >= width) continue;",
        "if (row > count || col >= width) continue;",
    ),
    attention(
        "rows of 8 aligned bytes are taken for rows of 16",
        "device_launch.cuh",
        "  return all % 16 == 0;\n}\n\ninline bool bias",
        "  return all % 8 == 0;\n}\n\ninline bool bias",
    ),
    attention(
        "the tile of values lies over that of keys",
        FORWARD,
        "v{k.data + kKeys * kCols};",
        "v{k.data + kKeys * kCols / 2};",
    ),
    # ---------------------------------------------------------------- fragments
    attention(
        "the halves of a fragment of keys are swapped",
        PRODUCT,
        "mma_m16n8k16<T>(c[r][n], fa[r], fb[0], fb[1]);",
        "mma_m16n8k16<T>(c[r][n], fa[r], fb[1], fb[0]);",
    ),
    attention(
        "two fragments of values are swapped",
        PRODUCT,
        "mma_m16n8k16<T>(c[r][n], fa[k / 2][r], fb[0], fb[1]);",
        "mma_m16n8k16<T>(c[r][n], fa[k / 2][r], fb[2], fb[3]);",
    ),
    attention(
        "the places of chunks repeat every 16 rows",
        TILE,
        "return kGroup == 8 ? row & 7 : (row >> 1) & 3;",
        "return kGroup == 8 ? row & 7 : (row >> 2) & 3;",
    ),
    attention(
        "statistics from beside the diagonal",
        "backward.cu",
        "group() % 2 == 0 ? products",
        "group() % 2 != 0 ? products",
    ),
    # ---------------------------------------------------------------- masks
    attention(
        "causal and window see one key too many",
        MASK,
        "position + s.right + 1)",
        "position + s.right + 2)",
    ),
    attention(
        "the window sees one key too few on the left",
        MASK,
        "bits_below(position - s.left - first)",
        "bits_below(position - s.left + 1 - first)",
    ),
    attention(
        "a key beyond the length is seen",
        MASK,
        "min(s.S, position",
        "min(s.S + 1, position",
    ),
    attention(
        "a tile that ends behind the last key is taken for whole",
        "device_sequence.cuh",
        "first + count > full_high;",
        "first + count > full_high + 1;",
    ),
    attention(
        "keys as rows are masked by their neighbours' bits",
        MASK,
        "word >> (r * 16 + half * 8) & 1",
        "word >> (r * 16 + half * 4) & 1",
    ),
    attention(
        "an unseen value is multiplied by 0",
        FORWARD,
        "bad = syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(v));",
        "syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(v));",
    ),
    attention(
        "an unseen key is multiplied by 0",
        QUERIES,
        "bad = syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(k));",
        "syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(k));",
    ),
    attention(
        "keep's bits are packed the wrong way round",
        "keep_bits.cu",
        "uint32_t(from[(key + i) * stride[3]] != 0) << i;",
        "uint32_t(from[(key + i) * stride[3]] != 0) << (7 - i);",
    ),
    # ---------------------------------------------------------------- arithmetic
    attention(
        "the output keeps its scale when the maximum moves",
        SOFTMAX,
        "out[r][m][half * 2 + e] *= decay;",
        "out[r][m][half * 2 + e] *= 1.0f;",
    ),
    attention(
        "a row's maximum is that of half its lanes",
        SOFTMAX,
        "top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 2));",
        "top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 1));",
    ),
    attention(
        "dropout's bits of two rows are swapped",
        MASK,
        "(low & 0x33333333u) | (high & 0x33333333u) << 2;",
        "(high & 0x33333333u) | (low & 0x33333333u) << 2;",
    ),
    attention(
        "dropout draws otherwise where keys are rows",
        MASK,
        "i % 2 * 2 * R + r * 2 + i / 2",
        "i / 2 * 2 * R + r * 2 + i % 2",
    ),
    attention(
        "keys of grouped heads hear of the first one alone",
        KEYS,
        "head = task.head + batch / task.batches, query = task.begin + batch % task.batches * kQueries;\n    load_q",
        "head = task.head, query = task.begin + batch % task.batches * kQueries;\n    load_q",
    ),
    attention(
        "the bias gradient leaves the last batch out",
        BIAS,
        "summed < all * (part + 1) / plan.parts;",
        "summed < all * (part + 1) / plan.parts - 1;",
    ),
)
