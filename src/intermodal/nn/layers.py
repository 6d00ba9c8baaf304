"""The layers every tower is built from: pre-norm transformer blocks over packed tokens. Leaf names follow Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import Positive
from ..errors import IntermodalError, nearest
from .attention import Segments, attention


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP weights (open_clip `model.py:180-183`)."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Hugging Face's names. SigLIP's flax `nn.gelu` is the tanh form; torch's default is the erf form: both load without an error.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def at_least_float32(x: Tensor) -> Tensor:
    """Numbers of which sums and norms are taken: half precision widened, float64 left as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


FEW_ROWS = range(2, 9)


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. A few rows in float32 on the CPU (decoding a few conversations where `kernels.decode` does not) go through the transposed
    product, which reads the weights once."""
    if x_TD.ndim == 2 and len(x_TD) in FEW_ROWS and x_TD.dtype == torch.float32 and x_TD.is_cpu and not torch.is_grad_enabled():
        out_TD = (weight @ x_TD.T).T
        return out_TD if bias is None else out_TD + bias
    return F.linear(x_TD, weight, bias)


class Linear(nn.Linear):
    """A layer of a decoder."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """In half precision on the CPU by the formula, rounded as Llama's own code does it: torch's kernel is six times slower there for a few
    hundred rows."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)):
            return super().forward(x)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True)
class TransformerConfig:
    """One tower's transformer."""

    width: Positive
    depth: Positive
    heads: Positive
    mlp_width: Positive
    activation: str = "gelu"
    norm_eps: Annotated[float, Ge(0), Lt(1)] = 1e-5
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropping a value of each residual branch while training; a training setting, not part of a checkpoint."""

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built. Not in `__post_init__`: overrides change one field at a time."""
        if self.width % self.heads:
            raise IntermodalError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise IntermodalError(f"unknown activation {self.activation!r}{nearest(self.activation, ACTIVATIONS)}")


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_TD)))


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if all(type(p) is nn.Linear for p in projections):
            # one product for the three: the weights are small beside the tokens, and backward then adds no input gradients up
            weight, bias = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
            q, k, v = F.linear(x_TD, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        else:  # adapters do their work in the layer's own forward
            q, k, v = (p(x_TD).unflatten(-1, (self.heads, -1)) for p in projections)
        return self.out_proj(attention(q, k, v, segments, causal=self.causal).flatten(1))


class Block(nn.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        x_TD = x_TD + self._dropped(self.self_attn(self.layer_norm1(x_TD), segments))
        return x_TD + self._dropped(self.mlp(self.layer_norm2(x_TD)))

    def _dropped(self, x_TD: Tensor) -> Tensor:
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


class Encoder(nn.Module):
    """A stack of blocks over packed tokens: (T, D) -> (T, D). `checkpoint_activations` trades a second forward for memory."""

    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        config.check()
        self.layers = nn.ModuleList(Block(config, causal) for _ in range(config.depth))
        self.checkpoint_activations = False

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_TD = checkpoint(layer, x_TD, segments, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x_TD = layer(x_TD, segments)
        return x_TD


class AttentionPool(nn.Module):
    """SigLIP's MAP head: a learned probe attends to every token of a sequence, then `x + mlp(norm(x))`.

    Source: big_vision `models/vit.py:163-183`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.probe = nn.Parameter(torch.empty(1, config.width))
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """(T, D) -> (N, D), one pooled vector a sequence."""
        count = len(segments)
        q_NHK = self.q_proj(self.probe).expand(count, -1).unflatten(-1, (self.heads, -1))
        k, v = (proj(x_TD).unflatten(-1, (self.heads, -1)) for proj in (self.k_proj, self.v_proj))
        pooled_ND = self.out_proj(attention(q_NHK, k, v, Segments([1] * count), segments).flatten(1))
        return pooled_ND + self.mlp(self.layernorm(pooled_ND))
