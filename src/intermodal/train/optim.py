"""Optimizer groups and the learning rate's curve."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import IntermodalError
from ..nn.layers import at_least_float32
from ..nn.machine import multiplies_bf16
from .recipe import OptimConfig

SCALARS = {"logit_scale", "logit_bias"}
NOT_MATRICES = {"patch_embedding", "lm_head", "conv_in", "conv_out"}
MOMENTUM = 0.95
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315
"""Jordan 2024: steepest at zero, so that small singular values grow fast."""


def optimizer_for(model: nn.Module, config: OptimConfig, precision: str) -> torch.optim.AdamW:
    """The optimizer of a dual encoder or a VQ-VAE: everything learns, the loss's scale and bias at a rate of their own."""
    factors = {name: 1.0 for name, parameter in model.named_parameters() if parameter.requires_grad}
    return optimizer_of(model, config, factors | dict.fromkeys(SCALARS & factors.keys(), config.scalar_lr_factor), precision)


def choose_learning(model: nn.Module, learn: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Freeze all parameters but those that a stage names: no gradient, no kept activations. Returns each learning one's rate as a multiple.

    Raises:
        IntermodalError: see `rates_of`.
    """
    factors = rates_of([name for name, _ in model.named_parameters()], learn)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in factors)
    return factors


def rates_of(names: Sequence[str], learn: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The rate, as a multiple, of each parameter that learns.

    Args:
        names: of all parameters.
        learn: (pattern, multiple of the rate); the last pattern that fits a parameter's name counts.

    Raises:
        IntermodalError: a pattern fits nothing, its rate is no multiple, or nothing learns.
    """
    factors: dict[str, float] = {}
    for pattern, factor in learn:
        if not 0 <= factor < math.inf:  # NaN, too: it would freeze what fits without a word
            raise IntermodalError(
                f"the rate of {pattern!r} in a stage's learn is {factor}: it multiplies optim.lr, so write 0 (frozen) or a number above it"
            )
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            heads = sorted({name.split(".")[0] for name in names})
            raise IntermodalError(f"no parameter fits {pattern!r}; their names begin with {', '.join(heads)}")
        factors |= dict.fromkeys(fitting, factor)
    factors = {name: factor for name, factor in factors.items() if factor > 0}
    if not factors:
        raise IntermodalError("no parameter learns: every rate of the stage is 0")
    return factors


def optimizer_of(model: nn.Module, config: OptimConfig, factors: dict[str, float], precision: str) -> torch.optim.AdamW:
    """Fused AdamW, or Muon, over the parameters named in `factors`, each at that multiple of the rate. Muon rounds as the run does: to
    bf16 where `precision` and the processor multiply bf16.

    Nothing with fewer than two axes decays, which covers norms, biases, scale and bias (open_clip `optim.py:67-75`).
    """
    matrices = set(matrix_names(model)) if config.name == "muon" else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in factors:
            factor = factors[name] * (config.matrix_lr_factor if name in matrices else 1.0)
            groups.setdefault((factor, parameter.ndim >= 2, name in matrices), []).append(parameter)
    settings = [
        {"params": held, "weight_decay": config.weight_decay if decays else 0.0, "factor": factor, "orthogonal": orthogonal}
        for (factor, decays, orthogonal), held in groups.items()
    ]
    rest: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if config.name != "muon":
        return torch.optim.AdamW(settings, **rest)
    device = next(model.parameters()).device
    return Muon(settings, half=precision in ("auto", "bf16") and multiplies_bf16(device), **rest)


def matrix_names(model: nn.Module) -> list[str]:
    """Weights of linear layers and convolutions, but for those that turn pictures into features or back, or states into scores: what Muon
    is for."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [f"{name}.weight" for name in linear if name.rsplit(".", 1)[-1] not in NOT_MATRICES]


class Muon(torch.optim.AdamW):
    """Momentum made orthogonal for the matrices of linear layers and convolutions, AdamW for the rest.

    The update of a matrix is the nearest orthogonal one to its Nesterov momentum, by five steps of a Newton-Schulz iteration, scaled by
    0.2 sqrt(longer side) so that its entries are about as large as AdamW's and the same rates and decay fit (Jordan 2024; Liu et al.,
    arXiv 2502.16982, section 2.2). Matrices of one shape are done in one batched product, and a sharded matrix is gathered first.

    Args:
        half: the products are in bf16, as `torch.optim.Muon`'s always are; in float32 else: 25 times as fast as that on a processor that
            multiplies bf16 slowly, and equal on any number of ranks.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, half: bool, **settings: Any):
        super().__init__(groups, **settings)
        self.half = half

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter)}
            state["step"] += 1
            momentum = state["exp_avg"].mul_(MOMENTUM).add_(parameter.grad)
            wanted = whole(parameter.grad.add(momentum, alpha=MOMENTUM)).flatten(1)  # a convolution is a matrix (out, in x window)
            by_shape.setdefault(wanted.shape, []).append((parameter, wanted))
        for shape, found in by_shape.items():
            updates = orthogonal(torch.stack([wanted for _, wanted in found]), self.half) * (0.2 * max(shape) ** 0.5)
            for (parameter, _), update in zip(found, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(like(update.view(parameter.shape).to(parameter.dtype), parameter), alpha=group["lr"])


def orthogonal(matrices_NRC: Tensor, half: bool, steps: int = 5) -> Tensor:
    """(N, R, C) -> about U V^T of each matrix's singular value decomposition U S V^T: singular values between 0.7 and 1.2."""
    x = matrices_NRC.bfloat16() if half else at_least_float32(matrices_NRC)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.shape[2] >= 2 * x.shape[1] and not half:
        x = _polynomial(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = NS_A * x + torch.baddbmm(gram, gram, gram, beta=NS_B, alpha=NS_C) @ x
    return at_least_float32(x.mT if tall else x)


def _polynomial(gram_NRR: Tensor, steps: int) -> Tensor:
    """What the steps multiply a wide matrix by, from its products of rows: small square products instead of ones as wide as the matrix.
    All factors are polynomials of one matrix, so their order does not matter. Wants float32: squares double the range of numbers."""
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=NS_B, alpha=NS_C)
        factor.diagonal(dim1=1, dim2=2).add_(NS_A)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram_NRR = factor @ gram_NRR @ factor
    assert product is not None
    return product


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor laid out over the ranks as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


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
