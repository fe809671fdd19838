"""DistributedDataParallel and FSDP2 over gloo: two processes on the CPU train as one would on both their batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_transformer as ours
from fused_transformer.processes import Processes
from tests.transformer.crew import run_crew
from tests.transformer.models import SOURCE, TARGET, tiny

WORLD = 2


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Its own for each process: sequences of other lengths."""
    return SOURCE.roll(rank, 1)[:, : 6 - rank].clamp(min=3), TARGET.roll(-rank, 0)


def loss(model: nn.Module, rank: int) -> Tensor:
    source, target = batch(rank)
    return ours.smoothed_cross_entropy(model(source, target[:, :-1]), target[:, 1:])


def work(processes: Processes) -> None:
    """What each process does; an error in it is the test's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = processes.rank
    torch.manual_seed(0)
    alone = tiny()
    (sum(loss(alone, r) for r in range(WORLD)) / WORLD).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}

    replica = tiny()
    replica.load_state_dict(alone.state_dict())
    parallel = DistributedDataParallel(replica)  # whose hooks go with it
    loss(parallel, rank).backward()
    for name, p in replica.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])

    shard = tiny()
    shard.load_state_dict(alone.state_dict())
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (*shard.encoder.layers, *shard.decoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(shard, mesh=mesh)
    loss(shard, rank).backward()
    for name, p in shard.named_parameters():
        assert p.to_local().numel() < p.numel()  # it holds a part alone
        torch.testing.assert_close(p.grad.full_tensor(), expected[name])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_gradients_are_those_of_one_process_on_both_batches(tmp_path: Path):
    run_crew(work, WORLD, tmp_path)
