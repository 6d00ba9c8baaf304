"""Optimizer groups and the learning rate's curve."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import IntermodalError
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


def adamw_by_pattern(model: nn.Module, learn: Sequence[tuple[str, float]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that a stage names; all others are frozen: no gradient, no optimizer state, no kept activations.

    Args:
        learn: (pattern, multiple of the rate); the last pattern that fits a parameter's name counts.

    Raises:
        IntermodalError: a pattern fits nothing, or nothing learns.
    """
    factors: dict[str, float] = {}
    names = [name for name, _ in model.named_parameters()]
    for pattern, factor in learn:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            heads = sorted({name.split(".")[0] for name in names})
            raise IntermodalError(f"no parameter fits {pattern!r}; their names begin with {', '.join(heads)}")
        factors |= dict.fromkeys(fitting, factor)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = factors.get(name, 0.0)
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise IntermodalError("no parameter learns: every rate of the stage is 0")
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "factor": factor}
        for (factor, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
