"""What the ranks of a run of conversations do together: packs that go through sharded layers in step, gradients in one sum."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from PIL import Image

from ..batch import TokenBatch
from ..inputs.chat import ChatProcessor
from ..inputs.codes import CodePlanner
from ..parallel.setup import World


def idle_conversations(processor: ChatProcessor) -> tuple[TokenBatch, TokenBatch]:
    """(with a picture where the model sees, of words alone): conversations of which nothing is learned."""
    grey = {"type": "image", "image": Image.new("RGB", (64, 64), (128, 128, 128))}
    made = []
    for parts in ([grey] if processor.planner is not None and not isinstance(processor.planner, CodePlanner) else [], []):
        content = [*parts, {"type": "text", "text": "?"}]
        batch = processor([{"role": "user", "content": content}, {"role": "assistant", "content": "."}])
        made.append(replace(batch, supervised=torch.zeros_like(batch.supervised)))
    return made[0], made[1]


def in_step(batches: list[TokenBatch], idle: tuple[TokenBatch, TokenBatch], world: World) -> list[TokenBatch]:
    """Packs with which all ranks call the same layers equally often, as sharded weights ask.

    A rank with fewer packs than others idles; a pack without pictures, where another rank's has some, gets an idle conversation with
    one. Nothing of those is learned, so sums and gradients stay what they are.
    """
    rounds = int(world.most(torch.tensor(float(len(batches)), device=world.device)))
    seen = torch.zeros(rounds, device=world.device)
    seen[: len(batches)] = torch.tensor([float(batch.visual is not None) for batch in batches])
    out = []
    for number, looked in enumerate(world.most(seen).tolist()):
        own = batches[number : number + 1]
        if looked and not (own and own[0].visual is not None):
            own = [*own, idle[0]]
        out.append(TokenBatch.pack(own) if own else idle[1])
    return out


def sum_gradients(model: torch.nn.Module, world: World) -> None:
    """Add the gradients of all ranks in one exchange.

    A part that one rank did not use (no picture in its packs) counts as zero there; a part that no rank used keeps no gradient, so that
    the optimizer leaves it alone as it does on one rank.
    """
    if world.size == 1:
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in learning], device=world.device)
    flat = torch.cat([used, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning)])
    dist.all_reduce(flat)
    used, *sums = flat.split([len(learning), *(p.numel() for p in learning)])
    for parameter, count, summed in zip(learning, used.tolist(), sums, strict=True):
        parameter.grad = summed.view_as(parameter).clone() if count else None
