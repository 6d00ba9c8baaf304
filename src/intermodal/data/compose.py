"""Drawing a scene: background, printed word, and each group's objects on a jittered grid in the group's part of the picture."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import sprites
from .facts import BACKGROUNDS, COLOURS, Facts, Group

HELD_OUT_FONTS = ("DejaVuSerif-BoldItalic.ttf", "DejaVuSerif-Italic.ttf")


@dataclass
class Scene:
    """A picture and its truth. Boxes are (left, top, right, bottom) in pixels, in the order of `groups`."""

    facts: Facts
    seed: int
    style: str
    boxes: list[tuple[int, list[tuple[int, int, int, int]]]]
    pixels: np.ndarray
    """(side, side, 3) uint8."""

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def captions(self) -> list[str]:
        return [self.facts.caption(form) for form in range(5)]

    def truth(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "groups": [{"noun": g.noun, "count": g.count, "colour": g.colour} for g in facts.groups],
            "relation": facts.relation,
            "background": facts.background,
            "word": facts.word,
            "style": self.style,
            "boxes": [{"group": group, "boxes": boxes} for group, boxes in self.boxes],
        }


def draw(
    facts: Facts,
    style: str,
    side: int,
    rng: random.Random,
    *,
    seed: int = 0,
    fonts: str = "train",
    recolour: float = 0.0,
    plain: bool = False,
    jitter: float = 1.0,
    groups: int | None = None,
) -> Scene:
    """Compose a scene: background, then each group's objects on a jittered grid in the group's part of the picture.

    `jitter` scales how far sizes, places in a cell and angles vary: with 0 every object is upright and fills its cell.
    With `groups`, only so many of them are drawn, each where it stands in the whole scene (for an `rng` in the same state).
    """
    pixels = np.full((side, side, 3), 255, np.uint8) if plain else ground(facts.background, side, rng)
    top = 0
    if facts.word:
        top = _print_word(pixels, facts.word, rng, fonts)
    boxes = []
    for index, (group, region) in list(enumerate(zip(facts.groups, _regions(facts, side, top), strict=True)))[:groups]:
        paint = random_paint(rng) if recolour and group.colour is None and rng.random() < recolour else None
        cells = _cells(region, group.count, rng, jitter)
        boxes.append((index, [_place(pixels, group, style, cell, rng, paint, jitter) for cell in cells]))
    return Scene(facts, seed, style, boxes, pixels)


def ground(name: str, side: int, rng: random.Random) -> np.ndarray:
    """A plain, shaded, striped or speckled ground around the named colour."""
    base = np.array(BACKGROUNDS[name], np.float32)
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = base
    kind, strength = rng.randrange(4), rng.uniform(6, 16)
    if kind == 1:
        ramp = np.linspace(-strength, strength, side, dtype=np.float32)
        pixels += (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    elif kind == 2:
        period = rng.randint(3, max(4, side // 6))
        stripes = np.where(np.arange(side) // period % 2, strength, -strength).astype(np.float32)
        pixels += (stripes[:, None] if rng.random() < 0.5 else stripes[None, :])[..., None]
    elif kind == 3:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((side, side, 1), np.float32)
        pixels += noise * (strength / 2)
    return pixels.clip(0, 255).astype(np.uint8)


def _regions(facts: Facts, side: int, top: int) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) for each group, so that every object of the first stands in the relation to all of the second."""
    if facts.relation is None:
        return [(0, top, side, side)]
    middle_x, middle_y = side / 2, (top + side) / 2
    if facts.relation in ("left of", "right of"):
        halves = [(0.0, top, middle_x, side), (middle_x, top, side, side)]
    else:
        halves = [(0.0, top, side, middle_y), (0.0, middle_y, side, side)]
    return halves if facts.relation in ("left of", "above") else halves[::-1]


def _cells(
    region: tuple[float, float, float, float], count: int, rng: random.Random, jitter: float
) -> list[tuple[float, float, float]]:
    """(left, top, size) of `count` squares in a region: the grid with the largest cells, objects of one size, jittered."""

    def varied(low: float, high: float) -> float:
        return high - jitter * (high - rng.uniform(low, high))

    def within(room: float) -> float:
        return room / 2 + jitter * (rng.uniform(0, room) - room / 2)

    left, top, right, bottom = region
    width, height = right - left, bottom - top
    columns = max(range(1, count + 1), key=lambda c: min(width / c, height / -(-count // c)))
    rows = -(-count // columns)
    cell_w, cell_h = width / columns, height / rows
    size = min(cell_w, cell_h) * varied(0.72, 0.96)
    if count == 1:
        size *= varied(0.7, 1.0)
    places = rng.sample(range(rows * columns), count)
    out = []
    for place in places:
        x = left + (place % columns) * cell_w + within(cell_w - size)
        y = top + (place // columns) * cell_h + within(cell_h - size)
        out.append((x, y, size))
    return out


def random_paint(rng: random.Random) -> np.ndarray:
    """(4, 3) map of premultiplied (red, green, blue, alpha) to other colours: channels mixed, contrast and brightness changed.

    One in four turns grey.
    A drawing keeps its shape and its inner contrasts, as it does from one emoji style to the next.
    """
    mix = np.eye(3) + np.array([rng.gauss(0, 0.18) for _ in range(9)]).reshape(3, 3)
    mix /= mix.sum(1, keepdims=True).clip(0.3)
    if rng.random() < 0.25:
        mix = np.full((3, 3), 1 / 3)
    contrast, brightness = 1 + 0.6 * (rng.random() - 0.5), 0.18 * (rng.random() - 0.5)
    return np.concatenate([mix.T * contrast, np.full((1, 3), 0.5 - 0.5 * contrast + brightness)]).astype(np.float32)


def _place(
    pixels: np.ndarray,
    group: Group,
    style: str,
    cell: tuple[float, float, float],
    rng: random.Random,
    paint: np.ndarray | None = None,
    jitter: float = 1.0,
) -> tuple[int, int, int, int]:
    """Draw one object into its square; returns the box of what is visible."""
    x, y, size = cell
    side = max(6, round(size))
    angle = jitter * rng.uniform(-12, 12)
    if side < 12 or not angle:
        stamp = _upright(group.concept, style, group.colour, side)
    else:
        stamp = np.asarray(_sized(group.concept, style, group.colour, side).rotate(angle, Image.Resampling.BILINEAR))
    if paint is not None:
        colours = (stamp.astype(np.float32) @ paint).clip(0, stamp[..., 3:])
        stamp = np.concatenate([colours.astype(np.uint8), stamp[..., 3:]], axis=-1)
    limit = pixels.shape[0] - side
    at_x, at_y = min(max(round(x), 0), limit), min(max(round(y), 0), limit)
    under = pixels[at_y : at_y + side, at_x : at_x + side]
    keep = 255 - stamp[..., 3:].astype(np.uint16)
    under[:] = stamp[..., :3] + ((under * keep + 127) // 255).astype(np.uint8)
    shown = stamp[..., 3] > 0
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    if not len(rows):
        return at_x, at_y, at_x + side, at_y + side
    return at_x + int(columns[0]), at_y + int(rows[0]), at_x + int(columns[-1]) + 1, at_y + int(rows[-1]) + 1


@lru_cache(maxsize=16_384)
def _upright(concept: int, style: str, colour: str | None, side: int) -> np.ndarray:
    """(side, side, 4) uint8, premultiplied: a sprite as it is drawn most often, kept because drawing is what keeps a data worker busy."""
    return np.asarray(_sized(concept, style, colour, side))


@lru_cache(maxsize=16_384)
def _sized(concept: int, style: str, colour: str | None, side: int) -> Image.Image:
    return _tinted(concept, style, colour).resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=4_096)
def _tinted(concept: int, style: str, colour: str | None) -> Image.Image:
    """A sprite with premultiplied alpha ("RGBa"), painted in shades of one colour where asked."""
    drawing = sprites.sprite(concept, style)
    if colour is not None:
        pixels = np.asarray(drawing).astype(np.float32)
        light = (pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None] / 255
        paint = np.array(COLOURS[colour], np.float32)
        # dark parts stay dark and highlights go towards white, so that the drawing keeps its inner lines
        shaded = paint * (0.25 + 0.9 * light) + 60 * (light - 0.5).clip(0)
        pixels[..., :3] = shaded.clip(0, 255)
        drawing = Image.fromarray(pixels.astype(np.uint8), "RGBA")
    return drawing.convert("RGBa")


@lru_cache(maxsize=1)
def font_files() -> tuple[Path, ...]:
    """The open fonts that matplotlib ships, text faces only."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(sorted(path for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name))


def fonts_of(side: str) -> list[str]:
    """Names of the fonts of the "train" or of the "test" side."""
    return [path.name for path in font_files() if (path.name in HELD_OUT_FONTS) == (side == "test")]


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = next(path for path in font_files() if path.name == name)
    return ImageFont.truetype(str(path), size)


def _print_word(pixels: np.ndarray, word: str, rng: random.Random, fonts: str) -> int:
    """Print a word across the top in a readable colour; returns the first free row below it."""
    side = pixels.shape[0]
    name, size = rng.choice(fonts_of(fonts)), max(8, round(side * rng.uniform(0.12, 0.2)))
    face = font(name, size)
    while size > 6 and face.getlength(word) > side - 4:
        size -= 1
        face = font(name, size)
    bright = pixels[: size + 2].mean() > 128
    picture = Image.fromarray(pixels)
    left, upper, right, lower = face.getbbox(word)
    x = rng.randint(1, max(1, round(side - (right - left) - 1)))
    ImageDraw.Draw(picture).text((x - left, 1 - upper), word, font=face, fill=(15, 15, 15) if bright else (245, 245, 245))
    pixels[:] = np.asarray(picture)
    return int(lower - upper) + 3
