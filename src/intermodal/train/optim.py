"""Optimizer groups and the learning rate's curve."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipe import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; nothing with fewer than two axes decays, which covers norms, biases, scale and bias (open_clip `optim.py:67-75`)."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scalars = [p for name, p in learning if name in ("logit_scale", "logit_bias")]
    decay = [p for _, p in learning if p.ndim >= 2]
    plain = [p for name, p in learning if p.ndim < 2 and name not in ("logit_scale", "logit_bias")]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "factor": 1.0},
        {"params": scalars, "weight_decay": 0.0, "factor": config.scalar_lr_factor},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine that ends at `final_lr_share` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, steps - config.warmup)
    floor = config.lr * config.final_lr_share
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def update_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
