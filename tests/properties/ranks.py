"""Run a function on several gloo ranks of this machine, one thread each, and collect what each returns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    meet = f"file://{folder}/ranks"  # a port that is free now may be another test's in a moment
    dist.init_process_group("gloo", meet, timedelta(minutes=2), size, rank)  # the time is of one exchange: a dead-lock fails
    try:
        torch.save(function(rank, size, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()  # no rank takes its connections down while another still finishes an exchange
    finally:
        dist.destroy_process_group()


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, size, *arguments)` on `size` processes; it must be importable, so define it at the top of a test file."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (size, folder, function, arguments), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
