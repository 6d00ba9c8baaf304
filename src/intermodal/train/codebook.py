"""A VQ-VAE's codebook beside its loss: exponential averages, codes that idle and are given a latent, and how evenly codes are used."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.vqvae import VQVAE
from ..parallel.setup import World
from .recipe import CodebookConfig


class CodebookState(nn.Module):
    """What the codebook remembers from step to step: exponential averages, and how long each code has been idle."""

    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, codes: int, width: int, config: CodebookConfig, loaded: bool = False):
        """`loaded`: the codes are those of a trained model, which goes on with them."""
        super().__init__()
        self.config, self.loaded = config, loaded
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))
        # at first every code of a new table counts as idle: the first step fills it with latents of its pictures
        self.register_buffer("idle", torch.full((codes,), 0 if loaded else config.revive or 0, dtype=torch.long))

    @torch.no_grad()
    def update(self, vq: VQVAE, z_TD: Tensor, ids_T: Tensor, world: World) -> tuple[Tensor, int]:
        """Count the step's codes, move the averages, and give idle codes a latent of this step. Returns (counts, revived)."""
        table = vq.quantize.embedding.weight
        counts = torch.bincount(ids_T, minlength=len(table)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids_T, z_TD)
        if world.size > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if self.config.ema is not None:
            decay = self.config.ema
            if self.loaded and not self.counts.any():
                # as if the codes had always been used as often as in this step, and stood where they are
                self.counts.copy_(counts.clamp(min=1))
                self.sums.copy_(vq.quantize.table() * self.counts[:, None])
            self.counts.mul_(decay).add_(counts, alpha=1 - decay)
            self.sums.mul_(decay).add_(sums, alpha=1 - decay)
            known = self.counts > 1e-5
            moved = self.sums / self.counts.clamp(min=1e-5)[:, None]
            table.copy_(torch.where(known[:, None], F.normalize(moved, dim=-1) if vq.config.unit_codes else moved, table))
        self.idle.add_(1).mul_(counts == 0)
        if self.config.revive is None:
            return counts, 0
        dead = (self.idle >= self.config.revive).nonzero().squeeze(1)
        if len(dead):
            fresh = drawn(z_TD, len(dead), world)
            table[dead], self.sums[dead], self.counts[dead], self.idle[dead] = fresh, fresh, 1.0, 0
        return counts, len(dead)


def drawn(z_TD: Tensor, count: int, world: World) -> Tensor:
    """(count, D) of the latents of all ranks, drawn at random; the same on every rank.

    Rank r's samples stand before rank r + 1's in a step (`data.loader.Loader`), so one rank that sees them all draws the same.
    """
    lengths = torch.zeros(world.size, dtype=torch.long, device=z_TD.device)
    lengths[world.rank] = len(z_TD)
    lengths = world.sum(lengths)
    chosen = torch.randint(int(lengths.sum()), (count,), device="cpu").to(z_TD.device)
    if world.size == 1:
        return z_TD[chosen]
    dist.broadcast(chosen, 0)  # each rank has a random state of its own: the first one's counts
    chosen -= lengths[: world.rank].sum()
    mine = (chosen >= 0) & (chosen < len(z_TD))
    return world.sum(torch.where(mine[:, None], z_TD[chosen.clamp(0, len(z_TD) - 1)], 0))


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """How often each code came -> the share of codes that did, and their perplexity."""
    shares = counts / counts.sum()
    return (counts > 0).float().mean().item(), torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item()
