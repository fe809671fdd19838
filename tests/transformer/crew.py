"""Processes that meet each other as torchrun's do, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_transformer.processes import Processes

# What the process that the others are forked from imports, once.
PRELOADED = ["tests.transformer.crew", "tests.transformer.trainers", "fused_transformer.cli_train"]
PRELOADED += ["torch._dynamo", "torch.distributed.tensor"]  # what the first step would import
SECONDS = 120  # for a test that would hang


def run_crew(work: Callable, world: int, folder: Path, *arguments: Any, join: bool = True) -> list[Any]:
    """What `work(processes, *arguments)` returned in each of `world` processes, by rank.

    Without `join` it is called as work(*arguments), and lets them meet by itself.

    Raises:
        AssertionError: one of them failed, or never ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    crew = [
        context.Process(target=_member, args=(work, rank, world, port, folder, arguments, join), daemon=True)
        for rank in range(world)
    ]
    for process in crew:
        process.start()
    try:
        for rank, process in enumerate(crew):
            process.join(SECONDS)
            assert process.exitcode == 0, f"process {rank} ended with {process.exitcode}"
    finally:
        for process in crew:
            process.kill()
    return [torch.load(folder / f"result-{rank}") for rank in range(world)]


def _member(work: Callable, rank: int, world: int, port: int, folder: Path, arguments: tuple, join: bool) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    processes = Processes.join(torch.device("cpu")) if join else None
    torch.save(work(*([processes] if processes else []), *arguments), folder / f"result-{rank}")
    if processes:
        processes.leave()
