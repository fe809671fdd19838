"""The Triton embedding's tiles fit what its kernels ask of them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fused_transformer.kernels.embedding import triton_backward, triton_forward


@pytest.mark.parametrize("width", [1, 16, 24, 512, 513, 1024, 8200])
def test_tiles_are_whole_philox_blocks_and_small_enough(width):
    (rows, cols), (run_rows, run_cols) = triton_forward.tile(width), triton_backward.run_tile(width)
    assert cols % 16 == run_cols % 16 == 0  # dropout's bits come four columns at a time
    assert rows * cols <= triton_forward.ELEMENTS and run_rows * run_cols <= triton_backward.RUN_ELEMENTS
