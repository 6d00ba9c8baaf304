"""Next-token loss over a pack: scores are made for supervised tokens only, some at a time, and made again for the gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .batch import TokenBatch

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


def next_token_losses(hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, chunk: int = CHUNK) -> Tensor:
    """(S,) float32 losses of the supervised tokens, in the pack's order.

    Args:
        hidden_TD: the decoder's normalised output for the pack.
        head_VD: weight of the output layer.
    """
    rows, ids = targets(batch)
    parts = []
    for at in range(0, len(rows), chunk):
        inputs = (hidden_TD[rows[at : at + chunk]], head_VD, ids[at : at + chunk])
        held = len(rows) <= chunk  # a single piece is kept: making its scores again would save nothing
        parts.append(_losses(*inputs) if held else checkpoint(_losses, *inputs, use_reentrant=False))
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)  # pyright: ignore[reportArgumentType, reportCallIssue]


def next_token_loss(hidden_TD: Tensor, head_VD: Tensor, batch: TokenBatch, chunk: int = CHUNK) -> tuple[Tensor, int]:
    """(sum, count) over the supervised tokens; the caller divides once, by all tokens of the step."""
    losses = next_token_losses(hidden_TD, head_VD, batch, chunk)
    return losses.sum(), len(losses)


def _losses(hidden_SD: Tensor, head_VD: Tensor, ids_S: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_SD, head_VD).float(), ids_S, reduction="none")
