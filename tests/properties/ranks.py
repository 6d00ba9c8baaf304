"""Run a function on several gloo ranks of this machine, one thread each, and collect what each returns."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # of one exchange: a dead-lock fails
    try:
        torch.save(function(rank, size, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()  # no rank takes its connections down while another still finishes an exchange
    finally:
        dist.destroy_process_group()


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, size, *arguments)` on `size` processes; it must be importable, so define it at the top of a test file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (size, port, folder, function, arguments), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
