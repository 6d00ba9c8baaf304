"""Ranks, devices and wrapping: FSDP2 for sharded and for replicated weights, from outside the model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.clip import DualEncoder
from ..nn.layers import Block, at_least_float32
from .ring import Ring


@dataclass
class World:
    """This process among all: one rank when the run was not started by torchrun."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ring: Ring | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a detached tensor."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def most(self, value: Tensor) -> Tensor:
        """The largest over ranks of each element."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on all."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item()) if self.size > 1 else flag


def start() -> World:
    """Join the ranks that torchrun started; CUDA devices with NCCL where there are any, gloo on the CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device, Ring())


def wrap(model: DualEncoder, world: World, mode: str) -> DualEncoder:
    """Shard ("fsdp") or replicate ("ddp") a model over all ranks with FSDP2; in place.

    Replicating is FSDP2 on a mesh whose shard axis has one rank: the same gradient hooks, an all-reduce in place of the scatter. The
    scale and bias are scalars, which FSDP2 does not take; `sync_scalars` sums their gradients.
    """
    if world.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (world.size, 1) if mode == "ddp" else (world.size,)
    names = ("replicate", "shard") if mode == "ddp" else ("shard",)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(scalars(model)))
    return model


def shard_layers(model: nn.Module, world: World, forward: str, whole: nn.Module | None = None) -> nn.Module:
    """Shard a model of conversations over all ranks with FSDP2, in place: every member of a list of layers on its own, the rest together.

    Args:
        forward: the method that a step calls in place of `forward`.
        whole: a part that stays whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    apart = set(whole.parameters()) if whole is not None else set()
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and not apart.issuperset(module.parameters()):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=apart)
    register_fsdp_forward_method(model, forward)
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights on the CPU of every rank, gathered one by one: no device has to hold them all."""
    from torch.distributed.tensor import DTensor

    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for key, value in model.state_dict().items()
    }


def scalars(model: DualEncoder) -> list[nn.Parameter]:
    return [p for p in (model.logit_scale, model.logit_bias) if p is not None]


def sync_scalars(model: DualEncoder, world: World) -> None:
    """Average the scale's and bias's gradients over the ranks, as FSDP does for all other parameters. (A softmax does not use the bias.)"""
    if world.size > 1:
        for parameter in scalars(model):
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world.size


def reduce_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward exchanges gradients between ranks (only the last of a step needs to)."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients, sharded or not: each shard is counted once. Zero where a step met nothing that learns."""
    from torch.distributed.tensor import DTensor

    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    squares = [nn.utils.get_total_norm(whole) ** 2] if whole else []
    if sharded:
        norm = nn.utils.get_total_norm(sharded)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
    return torch.stack([at_least_float32(s) for s in squares]).sum().sqrt() if squares else torch.zeros(())
