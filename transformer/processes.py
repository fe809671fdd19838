"""The processes that train one model together, as torchrun starts them: who has which sentences, and what is agreed.

Every process goes through the same batches in the same order and takes its share of each step; the gradient is that of
all of them, so weights and optimizers stay equal, bit for bit. What happens once (validating, writing) is done by the
first process, and the others wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# Of waiting for the first process, which may validate for hours; a process that died is noticed by its connection.
PATIENCE = timedelta(days=365)


class Processes:
    """One process alone; `join` gives those that torchrun started.

    Attributes:
        rank, world: which of how many this is.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._group: dist.ProcessGroup | None = None  # for words between hosts, beside the one for gradients

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meet the other processes of torchrun; outside of it, one process alone.

        Args:
            device: this process's: NCCL takes the gradients of GPUs from one to another, gloo those of CPUs.
        """
        processes = cls()
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            processes._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            processes.rank, processes.world = dist.get_rank(), dist.get_world_size()
        return processes

    def leave(self) -> None:
        """The end of it; nothing is agreed afterwards."""
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that validates and writes."""
        return self.rank == 0

    def replicated(self, module: nn.Module) -> nn.Module:
        """The module, whose backward pass leaves the mean of all processes' gradients; it begins with the first's."""
        if self._group is None:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def pieces(self, batches: list[Tensor]) -> list[Tensor]:
        """A step's batches of sentence numbers, cut so that each process gets about as much.

        With a batch or more for each process they stay whole: any number of processes then computes the same sums.
        Fewer are cut into equal parts, some of which may be empty.
        """
        parts = -(-self.world // len(batches))
        return [rows[part::parts] for rows in batches for part in range(parts)]

    def sums(self, values: list[float]) -> list[float]:
        """Each value's sum over the processes; every process gets the same numbers."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def gathered(self, value: T) -> list[T]:
        """What each process gave, by rank."""
        if self._group is None:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found  # type: ignore[return-value]  # all of them are filled

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, for every process; the others wait.

        Raises:
            Exception: the first process's, in every process.
        """
        if self._group is None:
            return work()
        outcome: list = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def own_device(name: str) -> torch.device:
    """The device of this process: under torchrun each one of a machine has a GPU of its own.

    Raises:
        ValueError: there is no such device, there are more processes than GPUs, or all would have the same one.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}") from None
    if device.type != "cuda":
        try:
            torch.empty(1, device=device).item()  # "meta" has no numbers, and others may not be there
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(f"there is no device {name!r}") from None
        return device
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if (device.index or 0) >= gpus:
        raise ValueError(f"there is no device {name!r}: torch finds {gpus} GPUs here")
    if "LOCAL_RANK" not in os.environ:
        return device
    if processes > 1 and device.index is not None:
        raise ValueError(f"{processes} processes cannot share {name}: cuda gives each a GPU of its own")
    if processes > gpus:
        raise ValueError(f"{processes} processes need as many GPUs, and torch finds {gpus} here")
    own = device if device.index is not None else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own
