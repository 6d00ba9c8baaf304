"""Neighbour exchange for the tiled losses: send to the next rank, receive from the one before."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The ranks of a process group in a circle. Every rank must pass tensors of the same shapes and types."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group) if group is not None else list(range(self.size))
        self.tag = 0
        self.next, self.previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]

    def start(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin one hop; the returned function waits for it and gives the tensors that arrived."""
        outgoing = [tensor.contiguous() for tensor in tensors]
        incoming = [torch.empty_like(tensor) for tensor in outgoing]
        operations = []
        for sent, received in zip(outgoing, incoming, strict=True):
            self.tag = (self.tag + 1) % 4096  # two hops may be on the way at once: each message has its own tag
            tag = self.tag
            operations.append(dist.P2POp(dist.isend, sent, self.next, self.group, tag))
            operations.append(dist.P2POp(dist.irecv, received, self.previous, self.group, tag))
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return incoming

        wait.outgoing = outgoing  # pyright: ignore[reportFunctionMemberAccess]  # keeps the send buffers alive until the wait
        return wait
