"""Qwen-VL, the first: a large CLIP-like tower, 256 queries that read its patches, and a decoder of Llama's shape.

Source: the checkpoint's own `visual.py` and `modeling_qwen.py` (huggingface.co/Qwen/Qwen-VL-Chat); arXiv 2308.12966.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Images, States, Visual
from ..errors import IntermodalError
from ..nn.attention import Segments, attention
from ..nn.layers import Encoder
from .decoder import DecoderConfig
from .generative import Generative
from .vit import VisionConfig, check_fixed_size, patchify


@dataclass(frozen=True)
class QwenVLConfig:
    vision: VisionConfig
    text: DecoderConfig
    table_side: int = 16
    """Side of the tower's square table of learned positions; it is resized to the picture's grid of patches."""
    queries: int = 256
    image_start_id: int = 151857
    """`<img>`; `</img>` and the placeholder `<imgpad>` follow."""

    @property
    def image_id(self) -> int:
        return self.image_start_id + 2

    @property
    def query_side(self) -> int:
        return int(self.queries**0.5)

    def check(self) -> None:
        """Raises IntermodalError for a shape that cannot be built."""
        if self.query_side**2 != self.queries:
            raise IntermodalError(f"{self.queries} queries are not a square grid")
        if self.text.width % 128:
            raise IntermodalError(f"the resampler has heads of 128, and the decoder's width {self.text.width} is not a multiple")


class Resampler(nn.Module):
    """Learned queries on a grid read a tower's patches once; both sides know where they stand by fixed sine-cosine positions.

    (P, width) patches of N pictures -> (N * queries, out width). Positions are part of the keys and not of the values.
    """

    def __init__(self, width: int, out_width: int, side: int):
        super().__init__()
        self.heads = out_width // 128
        self.pos_embed = nn.Parameter(torch.empty(side**2, out_width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(side**2, out_width))
        self.kv_proj = nn.Linear(width, out_width, bias=False) if width != out_width else nn.Identity()
        self.ln_q, self.ln_kv = nn.LayerNorm(out_width, eps=1e-6), nn.LayerNorm(out_width, eps=1e-6)
        self.q_proj, self.k_proj = nn.Linear(out_width, out_width), nn.Linear(out_width, out_width)
        self.v_proj, self.out_proj = nn.Linear(out_width, out_width), nn.Linear(out_width, out_width)

    def forward(self, x_PD: Tensor, segments: Segments) -> Tensor:
        count, places = len(segments), resize_table(self.pos_embed, segments.longest).to(x_PD.dtype)
        x_PD = self.ln_kv(self.kv_proj(x_PD))
        q_QD = self.q_proj(self.ln_q(self.query) + self.pos_embed.to(x_PD.dtype))
        k_PD = self.k_proj(x_PD + places.repeat(count, 1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q_QD.repeat(count, 1), k_PD, self.v_proj(x_PD)))
        return self.out_proj(attention(q, k, v, Segments([len(self.query)] * count), segments).flatten(1))


def resize_table(table_PD: Tensor, patches: int) -> Tensor:
    """A square table of positions at another square grid: bicubic without antialiasing (`get_abs_pos`)."""
    side, wanted = int(len(table_PD) ** 0.5), int(patches**0.5)
    if side == wanted:
        return table_PD
    square = table_PD.to(torch.promote_types(table_PD.dtype, torch.float32)).unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table_PD.dtype)


def sine_cosine(side: int, width: int) -> Tensor:
    """(side * side, width) fixed positions: the first half turns with the column, the second with the row; sines, then cosines."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [axis.flatten()[:, None].double() * omega for axis in (columns, rows)]
    return torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1).float()


class QwenVLTower(nn.Module):
    """No class token, positions before the first norm, erf GELU; pooled by the resampler, a norm and a square projection."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        vision, out = config.vision, config.text.width
        self.config = vision
        self.patch_embedding = nn.Linear(vision.channels * vision.patch_size**2, vision.width, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.table_side**2, vision.width))
        self.pre_layernorm = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        self.encoder = Encoder(vision, causal=False)
        self.resampler = Resampler(vision.width, out, config.query_side)
        self.post_layernorm = nn.LayerNorm(out, eps=vision.norm_eps)
        self.proj = nn.Linear(out, out, bias=False)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pictures -> hidden states of their patches (N, P, width)."""
        images = Images(pixels_NCHW.to(self.patch_embedding.weight.dtype))
        check_fixed_size(images, self.config)
        x_PD = self.patch_embedding(patchify(images.pixels, self.config.patch_size))
        patches = self.config.grid**2
        places = resize_table(self.position_embedding, patches).repeat(len(images), 1)
        segments = Segments([patches] * len(images))
        return self.encoder(self.pre_layernorm(x_PD + places), segments).unflatten(0, (len(images), patches))

    def pool(self, x_NPD: Tensor) -> Tensor:
        """(N, P, width) -> (N * queries, decoder width)."""
        segments = Segments([x_NPD.shape[1]] * len(x_NPD))
        return self.proj(self.post_layernorm(self.resampler(x_NPD.flatten(0, 1), segments)))


class QwenVL1(Generative):
    """Qwen-VL and Qwen-VL-Chat."""

    tower = ("visual.", "-visual.resampler.", "-visual.post_layernorm.", "-visual.proj.")

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        config.check()
        self.config, self.family = config, "qwen"
        self.visual = QwenVLTower(config)
        self._init_decoder(config.text)

    def see(self, visual: Visual) -> States:
        return (self.visual(visual.pixels),)

    def connect(self, states: States, visual: Visual) -> tuple[Tensor, list[Tensor]]:
        return self.visual.pool(states[0]), []
