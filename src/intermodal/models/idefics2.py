"""Idefics2: a SigLIP tower, a few learned latents that read its patches, a decoder. The field's class for a stitched resampler.

A picture becomes a fixed number of tokens, whatever the tower's grid. Built for pictures of the tower's own square size, which is what
`stitch` makes; native sizes and splitting into quarters are refused when a directory is loaded.
Source: Hugging Face `modeling_idefics2.py`; arXiv 2405.02246, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Images, States, Visual
from ..errors import IntermodalError
from ..nn.attention import Segments, attention
from ..nn.layers import Linear
from .decoder import DecoderConfig, GatedMLP
from .generative import Generative
from .vit import SiglipVisionTower, VisionConfig, check_fixed_size, patchify


@dataclass(frozen=True)
class Idefics2Config:
    vision: VisionConfig
    text: DecoderConfig
    latents: int = 64
    """Tokens of a picture."""
    depth: int = 3
    """Layers of the resampler."""
    heads: int = 16
    kv_heads: int = 4
    head_width: int = 96
    activation: str = "silu"
    norm_eps: float = 1e-6
    image_id: int = 32001

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built."""
        if self.heads % self.kv_heads:
            raise IntermodalError(f"the resampler's {self.heads} heads do not divide over {self.kv_heads} key/value heads")


def places(grid: int) -> Tensor:
    """(grid * grid,) the row of the position table that each patch of a full square reads.

    The class finds rows by cutting fractions k / grid at multiples of 1 / grid in float32. For some grids (19, 25, 29, 31, 38, ...)
    rounding makes two neighbours share a row, so that these are not simply 0, 1, 2, ...
    """
    edges = torch.arange(1 / grid, 1.0, 1 / grid)
    fractions = (torch.arange(grid, dtype=torch.float32) * (torch.tensor(1.0) / grid)).clamp(max=1.0 - 1e-6)
    rows = torch.bucketize(fractions, edges, right=True)
    return (rows[:, None] * grid + rows[None, :]).flatten()


class Idefics2VisionTower(SiglipVisionTower):
    """SigLIP's without its pooling, with the class's own choice of positions."""

    def __init__(self, config: VisionConfig):
        super().__init__(config)
        del self.head

    def tokens(self, images: Images) -> tuple[Tensor, Segments]:
        check_fixed_size(images, self.config)
        x_BPD = self.patch_embedding(patchify(images.pixels, self.config.patch_size)).unflatten(0, (len(images), -1))
        x_BPD = x_BPD + F.embedding(places(self.config.grid).to(x_BPD.device), self.position_embedding).to(x_BPD.dtype)
        return x_BPD.flatten(0, 1), Segments([x_BPD.shape[1]] * len(images))

    def forward(self, images: Images) -> Tensor:
        """(N, C, S, S) pixels -> normalised states of the patches, (N, P, width)."""
        x_TD, segments = self.tokens(images)
        return self.post_layernorm(self.encoder(x_TD, segments)).unflatten(0, (len(images), -1))


class LatentAttention(nn.Module):
    """Latents look at a picture's patches and at themselves; grouped heads, no positions."""

    def __init__(self, config: Idefics2Config):
        super().__init__()
        width, self.head_width = config.text.width, config.head_width
        self.q_proj = Linear(width, config.heads * config.head_width, bias=False)
        self.k_proj = Linear(width, config.kv_heads * config.head_width, bias=False)
        self.v_proj = Linear(width, config.kv_heads * config.head_width, bias=False)
        self.o_proj = Linear(config.heads * config.head_width, width, bias=False)

    def forward(self, z_NLD: Tensor, context_NPD: Tensor) -> Tensor:
        seen = torch.cat([context_NPD, z_NLD], dim=1)
        count, latents, keys = len(seen), z_NLD.shape[1], seen.shape[1]
        q, k, v = (
            proj(x.flatten(0, 1)).unflatten(-1, (-1, self.head_width))
            for proj, x in ((self.q_proj, z_NLD), (self.k_proj, seen), (self.v_proj, seen))
        )
        out = attention(q, k, v, Segments([latents] * count), Segments([keys] * count))
        return self.o_proj(out.flatten(1)).unflatten(0, (count, latents))


class ResamplerLayer(nn.Module):
    def __init__(self, config: Idefics2Config):
        super().__init__()
        width, eps = config.text.width, config.norm_eps
        self.input_latents_norm, self.input_context_norm = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.mlp = GatedMLP(width, 4 * width, config.activation, bias=False)

    def forward(self, z_NLD: Tensor, context_NPD: Tensor) -> Tensor:
        z_NLD = z_NLD + self.self_attn(self.input_latents_norm(z_NLD), self.input_context_norm(context_NPD))
        return z_NLD + self.mlp(self.post_attention_layernorm(z_NLD))


class Resampler(nn.Module):
    """Patches of each picture, (N, P, width) -> `latents` tokens of the decoder's width, (N, L, out width)."""

    def __init__(self, config: Idefics2Config):
        super().__init__()
        width = config.text.width
        text = config.text
        self.projection = GatedMLP(config.vision.width, text.mlp_width, text.activation, bias=False, out_width=width)
        self.latents = nn.Parameter(torch.empty(config.latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)

    def forward(self, x_NPD: Tensor) -> Tensor:
        context_NPD = self.projection(x_NPD)
        z_NLD = self.latents.expand(len(x_NPD), -1, -1)
        for layer in self.layers:
            z_NLD = layer(z_NLD, context_NPD)
        return self.norm(z_NLD)


class Idefics2(Generative):
    tower = ("vision.",)

    def __init__(self, config: Idefics2Config):
        super().__init__()
        config.check()
        self.config, self.family = config, "idefics2"
        self.vision = Idefics2VisionTower(config.vision)
        self.connector = Resampler(config)
        self._init_decoder(config.text)

    def see(self, visual: Visual) -> States:
        return (self.vision(Images(visual.pixels.to(self.vision.patch_embedding.weight.dtype))),)

    def connect(self, states: States, visual: Visual) -> tuple[Tensor, list[Tensor]]:
        return self.connector(states[0]).flatten(0, 1), []
