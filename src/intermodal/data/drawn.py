"""Single sprites as a plain data set, for readers' first steps and for tests."""

from __future__ import annotations

from typing import Literal

from . import sprites
from .source import Sample


class SpriteSource:
    """Every concept in every training style on white, with its noun and its Unicode name as captions."""

    def __init__(self, which: Literal["core", "all"], side: int, styles: tuple[str, ...] = sprites.TRAIN_STYLES):
        self.name = f"sprites-{which}"
        self.pool = sprites.core() if which == "core" else sprites.concepts()
        self.side, self.styles = side, styles

    def __len__(self) -> int:
        return len(self.pool) * len(self.styles)

    def __getitem__(self, index: int) -> Sample:
        concept, style = self.pool[index // len(self.styles)], self.styles[index % len(self.styles)]
        picture = sprites.on_background(concept.index, style, self.side)
        texts = list(dict.fromkeys([concept.noun, concept.name]))
        return Sample(f"{self.name}/{concept.noun}/{style}", picture, texts, {"style": style})
