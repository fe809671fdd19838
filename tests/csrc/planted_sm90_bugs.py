"""Planted bugs of attention's forward kernel for Hopper. See planted_bugs.py."""

from __future__ import annotations

from tests.csrc.bug import Bug


def sm90(name: str, file: str, right: str, wrong: str) -> Bug:
    return Bug("attention_sm90", name, f"attention/{file}", right, wrong)


KERNEL, BLOCK, VALUES = "forward_sm90.cu", "device_sm90.cuh", "device_sm90_values.cuh"

SM90_BUGS: tuple[Bug, ...] = (
    # ---------------------------------------------------------------- mbarriers
    sm90(
        "keys are overwritten while they are read",
        BLOCK,
        "      mbarrier_wait(&shared.k_empty[stage], parity_of(tile) ^ 1);\n",
        "",
    ),
    sm90(
        "values are overwritten while they are read",
        BLOCK,
        "      mbarrier_wait(&shared.v_empty[stage], parity_of(tile - 1) ^ 1);\n",
        "",
    ),
    sm90(
        "queries are not waited for",
        KERNEL,
        "    mbarrier_wait(&shared.q_full, 0);\n",
        "",
    ),
    sm90(
        "the first keys are not waited for",
        KERNEL,
        "    mbarrier_wait(&shared.k_full[0], 0);\n",
        "",
    ),
    sm90(
        "keys are not waited for",
        KERNEL,
        "      mbarrier_wait(&shared.k_full[stage], parity_of(tile));\n",
        "",
    ),
    sm90(
        "values are not waited for",
        KERNEL,
        "    mbarrier_wait(&shared.v_full[stage_of(tile)], parity_of(tile));\n",
        "",
    ),
    sm90(
        "half of a tile's bytes are expected",
        BLOCK,
        "mbarrier_arrive_expect(full, kRows * D * int(sizeof(T)));",
        "mbarrier_arrive_expect(full, kRows * D);",
    ),
    sm90(
        "one arrival for a consumer instead of for a warp",
        KERNEL,
        "mbarrier_init(&shared.k_empty[stage], kConsumerWarps);",
        "mbarrier_init(&shared.k_empty[stage], kConsumers);",
    ),
    sm90(
        "an arrival too many is waited for",
        KERNEL,
        "mbarrier_init(&shared.v_empty[stage], kConsumerWarps);",
        "mbarrier_init(&shared.v_empty[stage], kConsumerWarps + 1);",
    ),
    sm90(
        "a consumer says nothing of the values it has read",
        KERNEL,
        "      release(&shared.v_empty[stage_of(last)]);\n",
        "",
    ),
    sm90(
        "every lane says that keys have been read",
        KERNEL,
        "  if (lane_id() == 0) mbarrier_arrive(empty);",
        "  mbarrier_arrive(empty);",
    ),
    sm90(
        "the parity of a stage never changes",
        BLOCK,
        "return tile / kStages % 2;",
        "return 0;",
    ),
    sm90(
        "the parity changes with each tile",
        BLOCK,
        "return tile / kStages % 2;",
        "return tile % 2;",
    ),
    sm90(
        "the producer waits for the parity of the consumers",
        BLOCK,
        "mbarrier_wait(&shared.v_empty[stage], parity_of(tile - 1) ^ 1);",
        "mbarrier_wait(&shared.v_empty[stage], parity_of(tile - 1));",
    ),
    sm90(
        "no barrier after the mbarriers are made",
        KERNEL,
        "  __syncthreads();\n  if (shared.task.first",
        "  if (shared.task.first",
    ),
    # ---------------------------------------------------------------- asynchronous products
    sm90(
        "keys are given back before their product is done",
        KERNEL,
        "      wgmma_wait<1>(scores);\n      release(&shared.k_empty[stage]);\n",
        "      release(&shared.k_empty[stage]);\n      wgmma_wait<1>(scores);\n",
    ),
    sm90(
        "scores are read before their product is done",
        KERNEL,
        "wgmma_wait<1>(scores);",
        "wgmma_wait<2>(scores);",
    ),
    sm90(
        "the output is scaled before its product is done",
        KERNEL,
        "      wgmma_wait<0>(out);\n      release",
        "      release",
    ),
    sm90(
        "weights are replaced while they are multiplied",
        KERNEL,
        "      weigh(tile);\n      wgmma_wait<0>(out);\n",
        "      weigh(tile);\n      round_weights();\n      wgmma_wait<0>(out);\n",
    ),
    sm90(
        "no fence before the products of a tile",
        KERNEL,
        "      wgmma_fence(scores, out, weights);\n",
        "",
    ),
    sm90(
        "no fence before the last product",
        KERNEL,
        "    wgmma_fence(out, weights);\n",
        "",
    ),
    # ---------------------------------------------------------------- turns, and what consumers do together
    sm90(
        "a turn is not given on",
        KERNEL,
        "      give_turn(tile);\n",
        "",
    ),
    sm90(
        "nobody has the first turn",
        KERNEL,
        "    if (consumer == 1) barrier_arrive(kTurn, kConsumerThreads);  // the first turn is consumer 0's\n",
        "",
    ),
    sm90(
        "values are multiplied before all are cleaned",
        VALUES,
        "  async_proxy_fence();  // wgmma reads what was stored\n  barrier_sync(kChecked, kConsumerThreads);\n",
        "  async_proxy_fence();  // wgmma reads what was stored\n",
    ),
    sm90(
        "a warp does not wait for the others' word on the values",
        VALUES,
        "  barrier_sync(kChecked, kConsumerThreads);\n  uint32_t all = 0;",
        "  uint32_t all = 0;",
    ),
    sm90(
        "the words on two tiles are in one place",
        VALUES,
        "shared.bad[tile % 2];",
        "shared.bad[0];",
    ),
    # ---------------------------------------------------------------- where things are
    sm90(
        "a step over half the keys of a product",
        KERNEL,
        "wgmma_tile_after(b, key * 128)",
        "wgmma_tile_after(b, key * 64)",
    ),
    sm90(
        "the second half of the values' columns is looked for too early",
        KERNEL,
        "wgmma_tile(v, kKeys * 128);",
        "wgmma_tile(v, kKeys * 64);",
    ),
    sm90(
        "the second half of the keys' columns is looked for too early",
        KERNEL,
        "wgmma_tile_after(b, box * kKeys * 128 + bytes)",
        "wgmma_tile_after(b, box * kKeys * 64 + bytes)",
    ),
    sm90(
        "both consumers have the same queries",
        BLOCK,
        "query + consumer * kGroupQueries,",
        "query,",
    ),
    sm90(
        "packed queries are those of the first sequence",
        BLOCK,
        "query = int(task.s.q0) + task.first,",
        "query = task.first,",
    ),
    sm90(
        "grouped heads read the wrong keys",
        BLOCK,
        "head = key_head(args, task.head);",
        "head = task.head;",
    ),
    sm90(
        "the halves of a pair of weights are swapped",
        KERNEL,
        "pack<T>(scores[2 * i], scores[2 * i + 1]);",
        "pack<T>(scores[2 * i + 1], scores[2 * i]);",
    ),
    sm90(
        "the decays of two rows are swapped",
        KERNEL,
        "out[i] *= decay[i / 2 % 2];",
        "out[i] *= decay[1 - i / 2 % 2];",
    ),
    # ---------------------------------------------------------------- masks
    sm90(
        "one key too many is seen",
        KERNEL,
        "n * 8 + e >= high",
        "n * 8 + e > high",
    ),
    sm90(
        "one key too few is seen on the left",
        KERNEL,
        "n * 8 + e < low",
        "n * 8 + e <= low",
    ),
    sm90(
        "the last tile of keys is left out",
        KERNEL,
        "task.range.high - task.begin + kKeys - 1) / kKeys;",
        "task.range.high - task.begin) / kKeys;",
    ),
    sm90(
        "an unseen value is multiplied by 0",
        KERNEL,
        "return task.range.cuts(key_of(tile), kKeys) && clean_values(shared, tile);",
        "return false;",
    ),
    sm90(
        "a bad value is taken from those who see it",
        VALUES,
        "    add_nonfinite_values(Seen(), from, kWordKeys, masks, out);\n",
        "",
    ),
    sm90(
        "a bad value reaches those who do not see it",
        VALUES,
        "return key + j < seen.low || key + j >= seen.high;",
        "return key + j >= seen.high;",
    ),
)
