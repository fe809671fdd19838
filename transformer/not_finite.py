"""The error of a training whose numbers have left the range of floats."""

from __future__ import annotations

NAMED = 20  # lines of a batch, at most, in the message


class NotFiniteError(FloatingPointError):
    """The loss or the gradient of a step is not finite; weights and optimizer are as they were before it.

    Args:
        what: happened.
        step: the step.
        lines: of the training text, from 1 on, that were in its batch.
    """

    def __init__(self, what: str, step: int, lines: list[int]) -> None:
        self.what, self.step, self.lines = what, step, sorted(lines)
        named = ", ".join(map(str, self.lines[:NAMED]))
        more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        super().__init__(
            f"{what} at step {step}, in the batch of lines {named}{more}; try a lower learning rate or a longer warmup"
        )

    def __reduce__(self):  # from process to process
        return NotFiniteError, (self.what, self.step, self.lines)
