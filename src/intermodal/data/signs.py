"""Signs: one printed word on a ground, at any size and place: reading and nothing else, to measure from which height letters are read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..errors import IntermodalError
from .compose import font, fonts_of, ground
from .facts import BACKGROUNDS
from .scenes import WORDS
from .source import Sample

READABLE = 128
"""Grounds brighter than this take dark letters."""


@dataclass(frozen=True)
class SignConfig:
    side: int = 64
    """Pixels of a side."""
    least: int = 8
    most: int = 20
    """Smallest and largest size of the font in pixels; a small letter is half as high. A word that would not fit is printed smaller."""
    words: int = len(WORDS)
    """How many of the words are used."""
    fonts: Literal["train", "test"] = "train"
    seed: int = 0


@dataclass
class Sign:
    word: str
    height: int
    """Size of the font in pixels."""
    pixels: np.ndarray
    """(side, side, 3) uint8."""

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclass
class Signs:
    """An endless, seeded source: item i is the same sign on every machine and in every process."""

    config: SignConfig = field(default_factory=SignConfig)
    length: int = 1 << 40

    def __post_init__(self) -> None:
        self.name = f"signs-{self.config.fonts}-{self.config.seed}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        sign = self.sign(index)
        return Sample(f"{self.name}/{index}", sign.pixels, [sign.word], {"word": sign.word, "height": sign.height})

    def word(self, index: int) -> str:
        """What sign number `index` says, without drawing it."""
        return self._told(index)[1]

    def _told(self, index: int) -> tuple[int, str, random.Random]:
        """Size of the font and word of a sign, and the draws that are left for the rest."""
        config, rng = self.config, random.Random(f"signs/{self.config.seed}/{self.config.fonts}/{index}")
        # sizes are even on a logarithmic scale: one step from 8 to 10 pixels tells as much as one from 16 to 20
        drawn = round(config.least * (config.most / config.least) ** rng.random())
        return drawn, rng.choice(WORDS[: config.words]), rng

    def fitting(self, height: int) -> Mapping[str, tuple[str, ...]]:
        """The words that a picture has room for in letters of `height`, with the fonts in which it has."""
        return _fitting(self.config.words, self.config.fonts, self.config.side, height)

    def sign(self, index: int, height: int | None = None) -> Sign:
        """Sign number `index`; with `height` one in letters of that size, and then its word is one of `fitting`.

        Raises:
            IntermodalError: no word fits in letters of `height`.
        """
        config, (size, word, rng) = self.config, self._told(index)
        pixels = ground(rng.choice(tuple(BACKGROUNDS)), config.side, rng)
        if height is not None:
            fitting = self.fitting(height)
            if not fitting:
                raise IntermodalError(f"no word fits into {config.side} pixels in letters of {height}: ask for smaller ones")
            size, word = height, tuple(fitting)[index % len(fitting)]  # each as often as another: no guess does better
            name = rng.choice(fitting[word])
        else:
            name = rng.choice(fonts_of(config.fonts))
            while size > config.least and not _fits(word, name, size, config.side):
                size -= 1
        left, top, right, bottom = font(name, size).getbbox(word)
        at = [rng.uniform(1, max(1.0, config.side - 1 - length)) for length in (right - left, bottom - top)]
        light = int(pixels.mean()) > READABLE
        picture = Image.fromarray(pixels)
        colour = tuple(rng.randint(0, 70) if light else rng.randint(200, 255) for _ in range(3))
        ImageDraw.Draw(picture).text((round(at[0] - left), round(at[1] - top)), word, font=font(name, size), fill=colour)
        return Sign(word, size, np.asarray(picture))


def _fits(word: str, name: str, size: int, side: int) -> bool:
    """Whether a picture has room for a word in a font, with a pixel left on both sides."""
    return font(name, size).getlength(word) <= side - 2


@lru_cache(maxsize=64)
def _fitting(words: int, fonts: str, side: int, height: int) -> Mapping[str, tuple[str, ...]]:
    names = fonts_of(fonts)
    found = {word: tuple(name for name in names if _fits(word, name, height, side)) for word in WORDS[:words]}
    return {word: fits for word, fits in found.items() if fits}
