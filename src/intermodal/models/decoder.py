"""The decoder of every stitched model: Llama and Vicuna, SmolLM2, Mistral, Qwen2, Qwen3, over packed tokens.

One file, few switches: they differ by biases, by a norm on queries and keys, by tied embeddings and by how positions become angles.
Sources: Hugging Face `modeling_llama.py`, `modeling_qwen2.py`, `modeling_qwen3.py` (leaf names are theirs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import IntermodalError, nearest
from ..nn.attention import Segments, attention
from ..nn.cache import Cache
from ..nn.layers import ACTIVATIONS, Linear, RMSNorm
from ..nn.rope import Rope, RopeConfig, rotate


@dataclass(frozen=True)
class DecoderConfig:
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    context: int = 4096
    """Positions the model was trained for; longer inputs are refused at generation."""
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before the rotation (Qwen3)."""
    qk_layernorm: bool = False
    """LayerNorm with bias over each head of queries and keys, its own weights a head, before the rotation (Chameleon)."""
    swin_norm: bool = False
    """Norms after attention and MLP, on what they add, instead of before them (Chameleon 34B)."""
    tied: bool = False
    """The output layer is the embedding table."""

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built."""
        if self.heads % self.kv_heads:
            raise IntermodalError(f"{self.heads} heads do not divide over {self.kv_heads} key/value heads")
        if self.head_width % 2:
            raise IntermodalError(f"head width {self.head_width} is odd; rotary positions need pairs")
        if self.activation not in ACTIVATIONS:
            raise IntermodalError(f"unknown activation {self.activation!r}{nearest(self.activation, ACTIVATIONS)}")


class HeadLayerNorm(nn.Module):
    """LayerNorm over each head (..., H, K) with weights (H, K): the statistics are one head's alone."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads, width)), nn.Parameter(torch.zeros(heads, width))

    def forward(self, x_THK: Tensor) -> Tensor:
        return F.layer_norm(x_THK, x_THK.shape[-1:], eps=1e-5) * self.weight + self.bias


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.head_width, self.index = config.head_width, index
        self.q_proj = Linear(config.width, config.heads * config.head_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, config.kv_heads * config.head_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, config.kv_heads * config.head_width, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_width, config.width, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_width, eps=config.norm_eps)
        if config.qk_layernorm:
            self.q_norm = HeadLayerNorm(config.heads, config.head_width)
            self.k_norm = HeadLayerNorm(config.kv_heads, config.head_width)
        self.normed = config.qk_norm or config.qk_layernorm

    def forward(self, x_TD: Tensor, segments: Segments, tables: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        q, k, v = self.heads(x_TD, tables)
        if cache is None:
            out_THK = attention(q, k, v, segments, causal=True)
        else:
            out_THK = cache.attend(self.index, q, k, v)
        return self.o_proj(out_THK.flatten(1))

    def heads(self, x_TD: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, K) queries and (T, G, K) keys, normed and turned to their places, and values."""
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *tables), rotate(k, *tables), v


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, to another width where `out_width` is given."""

    def __init__(self, width: int, mlp_width: int, activation: str, bias: bool, out_width: int | None = None):
        super().__init__()
        self.gate_proj = Linear(width, mlp_width, bias=bias)
        self.up_proj = Linear(width, mlp_width, bias=bias)
        self.down_proj = Linear(mlp_width, out_width or width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = DecoderAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = GatedMLP(config.width, config.mlp_width, config.activation, config.mlp_bias)
        self.swin_norm = config.swin_norm
        self.dropout = 0.0
        """Probability of dropping a value of each residual branch while training: a run's setting (`Stage.dropout`), no checkpoint's."""

    def forward(self, x_TD: Tensor, segments: Segments, tables: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        if self.swin_norm:
            x_TD = x_TD + self._dropped(self.input_layernorm(self.self_attn(x_TD, segments, tables, cache)))
            return x_TD + self._dropped(self.post_attention_layernorm(self.mlp(x_TD)))
        x_TD = x_TD + self._dropped(self.self_attn(self.input_layernorm(x_TD), segments, tables, cache))
        return x_TD + self._dropped(self.mlp(self.post_attention_layernorm(x_TD)))

    def _dropped(self, x_TD: Tensor) -> Tensor:
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


@dataclass(frozen=True)
class DeepStack:
    """Visual features added after the first layers (Qwen3-VL): `features[i]` (V, D) goes to rows `rows` (V,) after layer i."""

    rows: Tensor
    features: Sequence[Tensor]


class Decoder(nn.Module):
    """Embeddings -> blocks -> final norm. Positions come in with the batch: they are not this module's business."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        config.check()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.depth))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.rope = Rope(config.rope, config.head_width)
        self.checkpoint_activations = False

    def forward(
        self,
        x_TD: Tensor,
        segments: Segments,
        positions: Tensor,
        *,
        cache: Cache | None = None,
        deepstack: DeepStack | None = None,
    ) -> Tensor:
        """Packed embeddings (T, D) -> normalised hidden states (T, D).

        Args:
            segments: the sequences on the token axis; with a cache, the new tokens of each conversation.
            positions: (T,) or, for M-RoPE, (3, T).
            cache: keys and values so far; its step must have begun.
        """
        tables = self.rope.tables(positions, x_TD.dtype)
        for index, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled() and cache is None:
                x_TD = checkpoint(layer, x_TD, segments, tables, None, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x_TD = layer(x_TD, segments, tables, cache)
            if deepstack is not None and index < len(deepstack.features):
                x_TD = x_TD.index_add(0, deepstack.rows, deepstack.features[index].to(x_TD.dtype))
        return self.norm(x_TD)

    def cache(self, slots: int) -> Cache:
        """An empty cache for that many conversations."""
        weight = self.embed_tokens.weight
        config = self.config
        return Cache(config.depth, slots, config.kv_heads, config.head_width, dtype=weight.dtype, device=weight.device)
