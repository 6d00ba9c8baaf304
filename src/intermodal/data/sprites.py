"""The embedded drawings: emoji concepts in six styles, 64 px RGBA, with names, keywords and groups. Credits: assets/CREDITS.md."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from PIL import Image

HELD_OUT_STYLE = "twemoji"
"""Never in any training set."""
STYLES = ("noto", "noto-v1", "fluent-3d", "fluent-flat", "emojione", HELD_OUT_STYLE)
TRAIN_STYLES = STYLES[:-1]
"""Fluent 3D and Fluent flat share most of their pixels, so both stand on this side of the split."""


@dataclass(frozen=True)
class Concept:
    index: int
    name: str
    """The Unicode name."""
    noun: str
    """What captions call it."""
    core: bool
    """One of the sixty that a person tells apart at a glance."""
    emoji: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str


@lru_cache(maxsize=1)
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO((files("intermodal.data") / "assets" / "sprites.zip").read_bytes()))


@lru_cache(maxsize=1)
def _index() -> dict:
    return json.loads(_archive().read("sprites.json"))


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts in the archive's order."""
    return tuple(
        Concept(i, c["name"], c["noun"], c["core"], c["emoji"], tuple(c["keywords"]), c["group"], c["subgroup"])
        for i, c in enumerate(_index()["concepts"])
    )


@lru_cache(maxsize=1)
def core() -> tuple[Concept, ...]:
    """The sixty visually distinct concepts."""
    return tuple(concept for concept in concepts() if concept.core)


@lru_cache(maxsize=len(STYLES))
def _sheet(style: str) -> Image.Image:
    if style not in STYLES:
        raise ValueError(f"unknown sprite style {style!r}; known: {', '.join(STYLES)}")
    return Image.open(io.BytesIO(_archive().read(f"{style}.webp"))).convert("RGBA")


@cache
def sprite(concept: int, style: str) -> Image.Image:
    """One drawing, 64 x 64 RGBA."""
    cell, columns = _index()["cell"], _index()["columns"]
    x, y = concept % columns * cell, concept // columns * cell
    return _sheet(style).crop((x, y, x + cell, y + cell))


def on_background(concept: int, style: str, side: int = 64, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """One drawing centred on a plain square, as an RGB picture of `side` pixels."""
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    inner = max(1, round(side * 0.86))
    drawing = (
        sprite(concept, style)
        .convert("RGBa")
        .resize((inner, inner), Image.Resampling.BOX if inner < 64 else Image.Resampling.BICUBIC)
    )
    canvas.alpha_composite(drawing.convert("RGBA"), ((side - inner) // 2, (side - inner) // 2))
    return canvas.convert("RGB")
