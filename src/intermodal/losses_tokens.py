"""Next-token loss over a pack: scores are made for supervised tokens only, some at a time, and made again for the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .batch import TokenBatch
from .nn.layers import at_least_float32

if TYPE_CHECKING:
    from .parallel.setup import World

CHUNK = 1024
"""Tokens whose scores are held at once: V x CHUNK numbers, whatever the pack's length."""


def targets(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(rows, ids), both (S,): the token at each row is to predict the id after it, within its own conversation.

    A conversation's first token has nothing before it and is never a target.
    """
    wanted = batch.supervised.clone()
    wanted[batch.segments.offsets[:-1].to(wanted.device)] = False
    after = wanted.nonzero().squeeze(1)
    return after - 1, batch.ids[after]


def next_token_losses(hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, chunk: int = CHUNK, z_loss: float = 0.0) -> Tensor:
    """(S,) losses, in float32 or float64, of the supervised tokens, in the pack's order.

    Args:
        hidden_TD: the decoder's normalised output for the pack.
        head_VD: weight of the output layer.
        z_loss: weight of log Z squared, which keeps the scores' common size in hand (Chameleon, section 2.4: 1e-5).
    """
    rows, ids = targets(batch)
    parts = []
    for at in range(0, len(rows), chunk):
        inputs = (hidden_TD[rows[at : at + chunk]], head_VD, ids[at : at + chunk], z_loss)
        held = len(rows) <= chunk  # a single piece is kept: making its scores again would save nothing
        parts.append(_losses(*inputs) if held else checkpoint(_losses, *inputs, use_reentrant=False))
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)  # pyright: ignore[reportArgumentType, reportCallIssue]


def next_token_loss(
    hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, chunk: int = CHUNK, z_loss: float = 0.0
) -> tuple[Tensor, int]:
    """(sum, count) over the supervised tokens; the caller divides once, by all tokens of the step."""
    losses = next_token_losses(hidden_TD, head_VD, batch, chunk, z_loss)
    return losses.sum(), len(losses)


def _losses(hidden_SD: Tensor, head_VD: Tensor, ids_S: Tensor, z_loss: float) -> Tensor:
    scores = at_least_float32(F.linear(hidden_SD, head_VD))
    losses = F.cross_entropy(scores, ids_S, reduction="none")
    return losses + z_loss * scores.logsumexp(-1) ** 2 if z_loss else losses


class ScoreStatistics:
    """What tells of stability, over all packs and ranks of a step: entropy, log Z and the norm of a token's scores, as means over up to
    `most` supervised tokens of each pack, and the highest scores, of the output and in attention."""

    def __init__(self, device: torch.device, most: int = 512):
        self.tokens = most
        self.sums = torch.zeros(4, device=device)
        """Of entropy, log Z, norms, and of tokens."""
        self.highest = torch.full((2,), -torch.inf, device=device)

    @torch.no_grad()
    def add(self, hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, attention_score: float) -> None:
        rows, _ = targets(batch)
        if not len(rows):
            return
        self.highest[1] = self.highest[1].clamp(min=attention_score)
        scores = at_least_float32(F.linear(hidden_TD[rows[:: -(-len(rows) // self.tokens)]], head_VD))
        log_z = scores.logsumexp(-1)
        entropy = log_z - ((scores - log_z[:, None]).exp() * scores).sum(-1)
        self.sums += torch.stack([entropy.sum(), log_z.sum(), scores.norm(dim=-1).sum(), log_z.new_tensor(len(scores))])
        self.highest[0] = torch.maximum(self.highest[0], scores.max())

    def values(self, world: World) -> dict[str, float]:
        """The same on every rank; nothing where no token of the step is learned from."""
        *sums, count = world.sum(self.sums).tolist()
        highest, attention = world.most(self.highest).tolist()
        if not count:
            return {}
        means = dict(zip(("entropy", "log_z", "score_norm"), (total / count for total in sums), strict=True))
        return means | {"highest_score": highest, "attention_score": attention}


def by_modality(losses_S: Tensor, ids_S: Tensor, image_ids: Tensor) -> Tensor:
    """(2, 2) sum and count of the losses of words, and of picture codes: what adds up over packs and ranks."""
    drawn = torch.isin(ids_S, image_ids)
    return torch.stack([torch.stack([losses_S[chosen].sum(), chosen.sum().float()]) for chosen in (~drawn, drawn)])
