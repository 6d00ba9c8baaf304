"""Single sprites as a plain data set, for readers' first steps, for tests, and as the demo's first vocabulary."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from . import sprites
from .compose import random_paint
from .facts import Group
from .source import Sample


@dataclass(frozen=True)
class SpriteConfig:
    side: int = 64
    """Pixels of a side."""
    concepts: Literal["core", "all"] = "core"
    styles: tuple[str, ...] = sprites.TRAIN_STYLES
    variations: int = 1
    """How often each drawing occurs; from the second on it is turned, shifted and scaled a little."""
    recolour: float = 0.0
    """Share of those variations whose colours are changed at random, as another style might."""
    article: bool = False
    """Caption with the article ("an apple") as scenes do, instead of the noun and the Unicode name."""


class SpriteSource:
    """Every concept in every training style on white."""

    def __init__(self, config: SpriteConfig):
        self.config, self.name = config, f"sprites-{config.concepts}"
        self.pool = sprites.core() if config.concepts == "core" else sprites.concepts()

    def __len__(self) -> int:
        return len(self.pool) * len(self.config.styles) * self.config.variations

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        variation, drawing = divmod(index, len(self.pool) * len(config.styles))
        concept, style = self.pool[drawing // len(config.styles)], config.styles[drawing % len(config.styles)]
        key = f"{self.name}/{concept.noun}/{style}"
        if variation:
            key += f"/{variation}"
            picture = Image.fromarray(varied(concept.index, style, config.side, random.Random(key), config.recolour))
        else:
            picture = sprites.on_background(concept.index, style, config.side)
        texts = [Group(concept.index).phrase()] if config.article else list(dict.fromkeys([concept.noun, concept.name]))
        return Sample(key, picture, texts, {"style": style})


def varied(concept: int, style: str, side: int, rng: random.Random, recolour: float) -> np.ndarray:
    """(side, side, 3) uint8: a sprite on white, at most 10 degrees turned, 7 % shifted and 15 % smaller or larger than usual."""
    inner = max(6, round(side * 0.86 * rng.uniform(0.85, 1.15)))
    drawing = sprites.sprite(concept, style).convert("RGBa").resize((inner, inner), Image.Resampling.BOX)
    drawing = drawing.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    shift = side * 0.07
    canvas = Image.new("RGBa", (side, side))
    at = (round((side - inner) / 2 + rng.uniform(-shift, shift)), round((side - inner) / 2 + rng.uniform(-shift, shift)))
    canvas.paste(drawing, at)
    pixels = np.asarray(canvas)
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if rng.random() < recolour:
        colours = (pixels.astype(np.float32) @ random_paint(rng)).clip(0, alpha).astype(np.uint8)
    return colours + (255 - alpha)
