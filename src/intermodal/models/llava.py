"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision: a fixed-size tower, a two-layer projector, a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Images, States, Visual
from ..inputs.tiles import assemble
from ..nn.layers import ACTIVATIONS
from .decoder import DecoderConfig
from .generative import Generative
from .vit import ClipVisionTower, SiglipVisionTower, VisionConfig


@dataclass(frozen=True)
class LlavaConfig:
    family: Literal["llava", "llava_next", "llava_onevision"]
    vision: VisionConfig
    text: DecoderConfig
    tower: Literal["clip", "siglip"] = "clip"
    layer: int = -2
    """Which of the tower's hidden states is read, the embeddings being number 0."""
    drop_first: bool = True
    """Leave the class token out."""
    projector_activation: str = "gelu"
    projector_bias: bool = True
    image_id: int = 32000
    video_id: int | None = None
    pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) of the AnyRes canvases."""
    max_tiles: int | None = None
    rules: Literal["authors", "transformers"] = "authors"
    """Where the two disagree: padding to a square (LLaVA 1.5), rounding when padding is cut away (PITFALLS D7)."""

    @property
    def blocks(self) -> int:
        """How many of the tower's blocks run before the features are read."""
        return self.layer if self.layer >= 0 else self.vision.depth + 1 + self.layer


class Projector(nn.Module):
    """`mlp2x_gelu`: Linear, GELU (erf), Linear (LLaVA `multimodal_projector/builder.py:39-46`)."""

    def __init__(self, width: int, out_width: int, activation: str, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width, bias=bias)
        self.linear_2 = nn.Linear(out_width, out_width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class Llava(Generative):
    tower = ("vision.",)

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config, self.family = config, config.family
        self.vision = ClipVisionTower(config.vision) if config.tower == "clip" else SiglipVisionTower(config.vision)
        if config.tower == "siglip":
            del self.vision.head  # pooling is not used, and the field's checkpoints do not carry it
        self.projector = Projector(config.vision.width, config.text.width, config.projector_activation, config.projector_bias)
        self.image_newline = nn.Parameter(torch.empty(config.text.width)) if config.family != "llava" else None
        self._init_decoder(config.text)

    def features(self, pixels_NCHW: Tensor) -> Tensor:
        """Views -> the tower's features before the projector, (N, S, width). Blocks after the chosen layer do not run."""
        x_TD, segments = self.vision.tokens(Images(pixels_NCHW.to(self.projector.linear_1.weight.dtype)))
        for block in self.vision.encoder.layers[: self.config.blocks]:
            x_TD = block(x_TD, segments)
        x_NSD = x_TD.unflatten(0, (len(pixels_NCHW), -1))
        return x_NSD[:, 1:] if self.config.drop_first else x_NSD

    def see(self, visual: Visual) -> States:
        return (self.features(visual.pixels),)

    def connect(self, states: States, visual: Visual) -> tuple[Tensor, list[Tensor]]:
        return assemble(self.projector(states[0]), visual.layout, self.config.vision.grid, self.image_newline), []
