"""A mask that is changed between the forward and the backward pass is an error, and never a wrong gradient."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import attention, attention_weights, attention_with_lse
from fused_transformer.kernels.attention import op
from tests.inputs import normal, running_on

B, H, L, D = 2, 2, 70, 16
PADDED, PACKED = ("keep", "bias", "k_lengths"), ("q_offsets", "k_offsets")
every_backend = pytest.mark.parametrize("backend", op.order)


def masks() -> dict[str, torch.Tensor]:
    return {
        "keep": torch.ones(L, L, dtype=torch.bool),
        "bias": torch.zeros(L, L),
        "k_lengths": torch.tensor([L, L - 5]),
        "q_offsets": torch.tensor([0, L, B * L]),
        "k_offsets": torch.tensor([0, L, B * L]),
    }


def parts(packed: bool) -> dict[str, torch.Tensor]:
    shape = (B * L, H, D) if packed else (B, H, L, D)
    return {name: normal(*shape).requires_grad_() for name in "qkv"}


def assert_backward_refuses(out: torch.Tensor, mask: torch.Tensor) -> None:
    mask.copy_(mask.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_backend
@pytest.mark.parametrize("name", PADDED + PACKED)
def test_of_attention(backend, name):
    kinds = PACKED if name in PACKED else (name,)
    given = {kind: mask for kind, mask in masks().items() if kind in kinds}
    with running_on(backend):
        assert_backward_refuses(attention(**parts(name in PACKED), **given), given[name])


@every_backend
@pytest.mark.parametrize("name", PADDED)
def test_of_its_weights(backend, name):
    tensors, given = parts(packed=False), {name: masks()[name]}
    with running_on(backend):
        _, lse = attention_with_lse(**tensors, **given)
        weights = attention_weights(tensors["q"], tensors["k"], lse, **given)
        assert_backward_refuses(weights, given[name])


@every_backend
@pytest.mark.parametrize("name", ["keep", "k_lengths"])
def test_a_mask_made_in_inference_mode_is_as_good(backend, name):
    """It cannot be saved for a backward pass, nor be changed outside of that mode."""
    with torch.inference_mode():
        given = {name: masks()[name]}
    tensors = parts(packed=False)
    with running_on(backend):
        out, lse = attention_with_lse(**tensors, **given)
        weights = attention_weights(tensors["q"], tensors["k"], lse, **given)
        (out.sum() + weights.square().sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors.values())


def test_lengths_that_are_not_changed_give_the_gradient_of_each_length():
    """The mistake that this was: lengths used again for the next batch gave that batch's gradients."""
    lengths, tensors = torch.tensor([3, L]), parts(packed=False)
    attention(**tensors, k_lengths=lengths).sum().backward()
    grad = tensors["v"].grad
    assert grad is not None
    assert (grad[0, :, 3:] == 0).all()
    assert (grad[1] != 0).all()
