"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a native-resolution tower whose tokens stand in the decoder's text at three-axis positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..batch import States, Visual
from .decoder import DecoderConfig
from .generative import Generative
from .vit_native import NativeVisionConfig, NativeVisionTower


@dataclass(frozen=True)
class QwenVLConfig:
    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    vision: NativeVisionConfig
    text: DecoderConfig
    image_id: int = 151655
    video_id: int = 151656
    vision_start_id: int = 151652
    vision_end_id: int = 151653
    tokens_per_second: float = 1.0
    """Qwen2.5-VL: time positions a second of video; the other two families do not use it."""
    rules: Literal["authors", "transformers"] = "authors"
    """Where the two disagree: text after a video (PITFALLS D1), Qwen3-VL's video wrapper (D2), the pixel budget of a clip (D3)."""


class QwenVL(Generative):
    tower = ("visual.", "-visual.merger.", "-visual.deepstack_mergers.")

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config, self.family = config, config.family
        self.visual = NativeVisionTower(config.vision)
        self._init_decoder(config.text)

    def see(self, visual: Visual) -> States:
        return self.visual(visual)

    def connect(self, states: States, visual: Visual) -> tuple[Tensor, list[Tensor]]:
        return self.visual.merge(states)
