"""The plain references the benchmarks compare with: open_clip's published formulas, written out.

open_clip itself does not import beside a CPU torch (it needs torchvision). These follow its `loss.py`: the whole similarity matrix on
every rank, features gathered from all ranks with gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss from the B x B matrix (open_clip `ClipLoss`)."""
    logits = log_scale.exp() * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss from the B x B matrix (open_clip `SigLipLoss`)."""
    logits = log_scale.exp() * image @ text.T + bias
    labels = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def gathered_softmax_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip's distributed default with `gather_with_grad` and `local_loss`: every rank holds all ranks' features."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    every_image, every_text = torch.cat(all_gather(image)), torch.cat(all_gather(text))
    labels = torch.arange(len(image)) + dist.get_rank() * len(image)
    per_image, per_text = log_scale.exp() * image @ every_text.T, log_scale.exp() * text @ every_image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
