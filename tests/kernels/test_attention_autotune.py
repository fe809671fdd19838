"""Autotuning of attention's Triton tiles, with times made up: what is timed, when, and that any choice is right."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fused_transformer.kernels import attention
from tests.inputs import normal, running_on
from tests.oracle import assert_backend_matches

pytest.importorskip("triton", reason="triton is not installed")

from fused_transformer.kernels import _triton
from fused_transformer.kernels.attention import triton_autotune as autotune
from fused_transformer.kernels.attention.triton_config import config

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="times are made up where no GPU takes any")


def qkv(B=2, L=70, S=90, D=16, dtype=torch.bfloat16):
    return {name: normal(B, 2, n, D, dtype=dtype) for name, n in (("q", L), ("k", S), ("v", S))}


@pytest.fixture
def timed(monkeypatch):
    """(kernel, number of the candidate) that was timed, counted; the last candidate of each kernel is the fastest."""
    counts: Counter = Counter()
    order: dict = {}

    def microseconds(tiles, launch):
        launch(tiles)
        counts[tiles] += 1
        order.setdefault(tiles, len(order))
        return 100.0 - order[tiles]

    monkeypatch.setattr(autotune, "enabled", lambda: True)
    monkeypatch.setattr(autotune, "_fastest", {})
    monkeypatch.setattr(autotune, "microseconds", microseconds)
    return counts


def test_every_candidate_gives_the_right_numbers(monkeypatch):
    tensors = qkv()
    monkeypatch.setattr(autotune, "enabled", lambda: True)
    for number in range(1 + max(map(len, autotune.CANDIDATES.values()))):
        # the candidate of that number, or the last of a kernel that has fewer
        monkeypatch.setattr(autotune, "_fastest", {})
        seen: list = []

        def microseconds(tiles, launch, seen=seen, number=number):
            seen.append(tiles)
            return float(abs(len(seen) - 1 - number))

        monkeypatch.setattr(autotune, "microseconds", microseconds)
        assert_backend_matches(attention, "triton", tensors, k_lengths=torch.tensor([90, 33]))


def test_a_kind_of_call_is_timed_once_whatever_its_batch_and_lengths(timed):
    with running_on("triton"):
        attention(**qkv())
        once = dict(timed)
        assert len(once) == 1 + len(autotune.CANDIDATES["forward"])
        attention(**qkv(B=3, L=20, S=130))
        assert timed == once
        kinds = len(autotune._fastest)
        attention(**qkv(), causal="top_left")  # another mask is another kind
        assert len(autotune._fastest) == kinds + 1
        attention(**qkv(), dropout_p=0.1, seed=torch.tensor([1]))
        assert len(autotune._fastest) == kinds + 2


def test_the_fastest_is_taken_and_float32_keeps_its_own(timed):
    half, full = qkv(), qkv(dtype=torch.float32)
    with running_on("triton"):
        attention(**half)
        (taken,) = autotune._fastest.values()
        assert taken == autotune.CANDIDATES["forward"][-1]
        attention(**full)
    assert len(autotune._fastest) == 1


def test_off_unless_asked_for_and_never_in_the_interpreter(monkeypatch):
    def refuse(tiles, launch):
        raise AssertionError("nobody asked for times")

    monkeypatch.setattr(autotune, "microseconds", refuse)
    q = qkv()["q"]
    mask = None
    monkeypatch.setenv("FUSED_TRANSFORMER_AUTOTUNE", "1")
    autotune.enabled.cache_clear()
    try:
        assert not autotune.enabled()
        assert autotune.tiles_for("forward", q, mask, 0.0, lambda tiles: None) == config("forward", q)
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        autotune.enabled.cache_clear()
        assert autotune.enabled()
        monkeypatch.delenv("FUSED_TRANSFORMER_AUTOTUNE")
        autotune.enabled.cache_clear()
        assert not autotune.enabled()
    finally:
        autotune.enabled.cache_clear()


def test_what_a_gpu_has_no_room_for_is_not_taken(monkeypatch):
    import triton.testing
    from triton.runtime.errors import OutOfResources

    def do_bench(call, **options):
        call()
        return 0.5

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)

    def launch(tiles):
        if tiles.m == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")

    large, small = autotune.CANDIDATES["forward"][0], autotune.CANDIDATES["forward"][-1]
    assert autotune.microseconds(large, launch) == float("inf")
    assert autotune.microseconds(small, launch) == 500.0
