"""What the ops' autograd.Functions have in common: a second derivative is an error and never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator of that name, also for upstream gradients that are constants.

    torch's alone lets those through, as if the gradient did not depend on what was saved: with create_graph=True a
    penalty on the gradient of a loss, whose upstream gradient is 1, would be left out in silence.
    """
    decorated = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in gradients)
        return decorated(ctx, *gradients)

    return checked
