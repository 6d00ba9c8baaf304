"""Next-token loss over a pack: scores are made for supervised tokens only, some at a time, and made again for the gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .batch import TokenBatch
from .nn.layers import at_least_float32

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


@torch.no_grad()
def score_statistics(hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, most: int = 512) -> dict[str, float]:
    """What tells of stability, over up to `most` supervised tokens: entropy, log Z, highest score and the norm of a token's scores."""
    rows, _ = targets(batch)
    if not len(rows):
        return {}
    step = max(1, len(rows) // most)
    scores = at_least_float32(F.linear(hidden_TD[rows[::step]], head_VD))
    log_z = scores.logsumexp(-1)
    chances = (scores - log_z[:, None]).exp()
    return {
        "log_z": log_z.mean().item(),
        "highest_score": scores.max().item(),
        "score_norm": scores.norm(dim=-1).mean().item(),
        "entropy": (log_z - (chances * scores).sum(-1)).mean().item(),
    }


def by_modality(losses_S: Tensor, ids_S: Tensor, image_ids: Tensor) -> Tensor:
    """(2, 2) sum and count of the losses of words, and of picture codes: what adds up over packs and ranks."""
    drawn = torch.isin(ids_S, image_ids)
    return torch.stack([torch.stack([losses_S[chosen].sum(), chosen.sum().float()]) for chosen in (~drawn, drawn)])
