"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a native-resolution tower whose tokens stand in the decoder's text at three-axis positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..batch import TokenBatch
from .decoder import DecoderConfig, DeepStack
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
    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config, self.family = config, config.family
        self.visual = NativeVisionTower(config.vision)
        self._init_decoder(config.text)

    def embed(self, batch: TokenBatch) -> tuple[Tensor, DeepStack | None]:
        x_TD = self.model.embed_tokens(batch.ids)
        if batch.visual is None or batch.visual_rows is None:
            return x_TD, None
        features_VD, deep = self.visual(batch.visual)
        x_TD = x_TD.index_copy(0, batch.visual_rows, features_VD.to(x_TD.dtype))
        return x_TD, DeepStack(batch.visual_rows, deep) if deep else None
