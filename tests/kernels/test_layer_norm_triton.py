"""What is Triton's own in layer norm: how rows are shared out among programs, and the tables of tiles."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import add_layer_norm_with_total
from tests.inputs import dtype_id, normal, running_on
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

pytest.importorskip("triton")

from fused_transformer.kernels.layer_norm import triton_backward, triton_forward

SUMS = ("dweight", "dbias", "dx_bias")


def make(rows: int, cols: int, device: str = "cpu"):
    tensors = {name: normal(rows, cols, device=device) for name in ("x", "residual")}
    return tensors | {name: normal(cols, device=device) for name in ("weight", "bias", "x_bias")}


def test_a_program_without_rows_writes_zeros(monkeypatch, device):
    tensors = make(3, 96, device)
    assert triton_backward.backward_tile(96, 4).rows >= 3
    results = []
    for count in (1, 5):
        monkeypatch.setattr(triton_backward, "parts", lambda *_, count=count: count)
        with running_on("triton"):
            results.append(run_with_gradients(add_layer_norm_with_total, tensors))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("cols", [300, 8200])
def test_any_number_of_programs_may_share_the_rows(cols, count, monkeypatch, device):
    monkeypatch.setattr(triton_backward, "parts", lambda *_: count)
    seed = torch.tensor([77], device=device)
    assert_backend_matches(add_layer_norm_with_total, "triton", make(11, cols, device), dropout_p=0.2, seed=seed)


def test_there_are_no_more_partial_sums_than_programs_that_run_at_once():
    tile = triton_backward.backward_tile(512, 2)
    assert triton_backward.parts(0, 512, tile, 132) == 1  # one, to write zeros
    assert triton_backward.parts(tile.rows + 1, 512, tile, 132) == 2
    assert triton_backward.parts(10**6, 512, tile, 132) == 132 * 16 // tile.warps
    wide = triton_backward.backward_tile(65536, 2)
    assert triton_backward.parts(10**6, 65536, wide, 132) * (65536 // wide.cols) <= 132 * 16 // wide.warps
    assert triton_backward.parts(10**6, 10**7, wide, 132) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_tiles_are_powers_of_two_that_hold_a_row_or_a_block_of_it(dtype):
    for cols in (*range(1, 70), *range(100, 70_000, 997), 1024, 4096, 8192, 8193, 16384, 16385, 10**6):
        held = {
            triton_forward.HELD_COLUMNS: triton_forward.forward_tile(cols),
            triton_backward.HELD_COLUMNS: triton_backward.backward_tile(cols, dtype.itemsize),
        }
        for most, tile in held.items():
            assert (tile.cols >= cols) == (cols <= most)
        others = (triton_backward.means_tile(cols), triton_backward.sums_tile(cols))
        for tile in (*held.values(), *others):
            assert tile.cols % 16 == 0  # dropout's bits come four columns at a time
            for number in (tile.rows, tile.cols, tile.warps):
                assert number & (number - 1) == 0
            assert tile.rows * tile.cols <= 2**15
            assert tile.rows * tile.cols / (32 * tile.warps) <= 32, (
                "more elements a thread than registers are meant for"
            )
