"""The paper's learning rate."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class NoamLR(LRScheduler):
    """Linear warmup, then the inverse square root of the step.

        lr(step) = factor · d_model^-½ · min(step^-½, step · warmup_steps^-3/2)        highest at warmup_steps

    The first optimizer step is step 1. Call `step()` after each `optimizer.step()`; `state_dict` as every scheduler.

    Args:
        optimizer: its groups' own learning rates are overwritten.
        d_model: E, the model's width.
        warmup_steps: steps until the highest rate, factor / √(d_model · warmup_steps).
        factor: scales the whole curve; the paper has 1.
        last_epoch: steps already done, -1 for none.

    Raises:
        ValueError: d_model, warmup_steps or factor is not positive, or is infinite.

    Source: Vaswani et al. 2017, eq. 3.
    """

    def __init__(
        self, optimizer: Optimizer, d_model: int, warmup_steps: int = 4000, factor: float = 1.0, last_epoch: int = -1
    ) -> None:
        for name, value in (("d_model", d_model), ("warmup_steps", warmup_steps), ("factor", factor)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        self.d_model, self.warmup_steps, self.factor = d_model, warmup_steps, factor
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, from 1 on."""
        return self.factor * self.d_model**-0.5 * min(step**-0.5, step * self.warmup_steps**-1.5)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate(self.last_epoch + 1)] * len(self.optimizer.param_groups)
