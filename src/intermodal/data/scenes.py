"""Scenes: pictures composed from the sprites by seed, without limit, with exact truth.

A scene has one or two groups of equal objects. A group has a concept, a count, and sometimes a colour; two groups stand in a
relation (left of, right of, above, below). All that a caption says is a fact of the picture, so every wrong caption is wrong for a
known reason. Splits are by fact: a combination (concept, relation, concept), (concept, count) or (concept, colour) belongs to one
side for ever, by its hash, so that a model that memorises pairs fails on the test side.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import sprites
from .source import Sample

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
COLOURS = {
    "red": (225, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (245, 220, 40),
    "green": (40, 165, 60),
    "blue": (45, 95, 230),
    "purple": (145, 60, 200),
    "pink": (250, 130, 190),
    "grey": (140, 140, 140),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (25, 25, 28),
    "beige": (236, 222, 196),
    "mint": (198, 236, 214),
    "sky blue": (190, 222, 248),
    "lavender": (218, 208, 244),
    "brown": (120, 86, 60),
    "navy": (30, 42, 92),
}
_PRINTED = """
apple bread chair cloud dance eagle flame grape happy honey house juice light lemon magic music night ocean paint paper peach piano
pizza plant queen radio river robot salad smile snack sound spice stone storm sugar table tiger toast today train truck under uncle
violin water whale world yellow zebra open stop sale free exit menu cafe taxi park zoo fun hot cold fast slow left right
"""
WORDS = tuple(_PRINTED.split())
HELD_OUT_FONT = "DejaVuSerif-Italic.ttf"
TEST_SHARE = 10
"""One combination in this many belongs to the test side."""


@dataclass(frozen=True)
class Group:
    concept: int
    count: int = 1
    colour: str | None = None

    @property
    def noun(self) -> str:
        return countable(sprites.concepts()[self.concept].noun)

    def phrase(self) -> str:
        """ "a blue dog", "three dogs"."""
        words = f"{self.colour} {self.noun}" if self.colour else self.noun
        if self.count > 1:
            return f"{NUMBERS[self.count]} {plural(words)}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Facts:
    """Everything a caption may say."""

    groups: tuple[Group, ...]
    relation: str | None
    """Where the first group stands as seen from the second; None for a single group."""
    background: str
    word: str | None = None

    def combinations(self) -> list[str]:
        """The facts that a split is made by. "A left of B" and "B right of A" are one."""
        out = []
        for group in self.groups:
            if group.count > 1:
                out.append(f"{group.noun}|{group.count}")
            if group.colour:
                out.append(f"{group.noun}|{group.colour}")
        if self.relation:
            a, b, relation = self.groups[0].noun, self.groups[1].noun, self.relation
            if relation in ("right of", "below"):
                a, b, relation = b, a, OPPOSITE[relation]
            out.append(f"{a}|{relation}|{b}")
        return out

    def caption(self, form: int = 0) -> str:
        """One of several phrasings: 0 to 2 short, 3 and 4 long."""
        phrases = [group.phrase() for group in self.groups]
        if not self.relation:
            body = (phrases[0], f"a picture of {phrases[0]}", f"there {'are' if self.groups[0].count > 1 else 'is'} {phrases[0]}")[
                form % 3
            ]
        else:
            verb = "are" if self.groups[0].count > 1 else "is"
            turned = f"{phrases[1]} {OPPOSITE[self.relation]} {phrases[0]}"
            plain = f"{phrases[0]} {self.relation} {phrases[1]}"
            body = (plain, turned, f"{phrases[0]} {verb} {self.relation} {phrases[1]}")[form % 3]
        if self.word:
            body += f" and the word {self.word}"
        return f"{body} on a {self.background} background" if form >= 3 else body

    def wrong(self, rng: random.Random, concepts: tuple[int, ...]) -> dict[str, Facts]:
        """Facts that differ in one respect: hard negatives by kind. Only kinds that make the caption false are given."""
        out: dict[str, Facts] = {}
        first, second = self.groups[0], self.groups[-1]

        def but(*groups: Group, relation: str | None = self.relation) -> Facts:
            return Facts(groups, relation, self.background, self.word)

        other = rng.choice([c for c in concepts if c not in (first.concept, second.concept)])
        rest = self.groups[1:]
        out["object"] = but(Group(other, first.count, first.colour), *rest)
        step = 1 if first.count == 1 or (first.count < 8 and rng.random() < 0.5) else -1
        out["count"] = but(Group(first.concept, first.count + step, first.colour), *rest)
        if first.colour:
            paint = rng.choice([c for c in COLOURS if c not in (first.colour, second.colour)])
            out["colour"] = but(Group(first.concept, first.count, paint), *rest)
        if self.relation:
            out["relation"] = but(*self.groups, relation=OPPOSITE[self.relation])
            if first.colour != second.colour:
                swapped = (Group(first.concept, first.count, second.colour), Group(second.concept, second.count, first.colour))
                out["swapped colours"] = but(*swapped)
        return out


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


@dataclass(frozen=True)
class SceneConfig:
    side: int = 64
    """Pixels of a side."""
    concepts: Literal["core", "all"] = "core"
    split: Literal["train", "test"] = "train"
    styles: tuple[str, ...] = sprites.TRAIN_STYLES
    pair_share: float = 0.6
    """Share of scenes with two groups."""
    colour_share: float = 0.4
    """Share of groups that are painted in one colour."""
    most: int = 4
    """Largest count of a group; two groups never have more than eight objects together."""
    word_share: float = 0.0
    """Share of scenes with a printed word."""
    forms: int = 5
    """How many phrasings of a caption: 3 leaves out the long ones, which name the background."""
    fonts: Literal["train", "test"] = "train"
    seed: int = 0


@dataclass
class Scenes:
    """An endless, seeded source: item i is the same scene on every machine and in every process."""

    config: SceneConfig = field(default_factory=SceneConfig)
    length: int = 1 << 40

    def __post_init__(self) -> None:
        pool = sprites.core() if self.config.concepts == "core" else sprites.concepts()
        self.pool = tuple(concept.index for concept in pool)
        self.name = f"scenes-{self.config.concepts}-{self.config.split}-{self.config.seed}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return Sample(f"{self.name}/{index}", scene.pixels, scene.captions()[: self.config.forms], scene.truth())

    def scene(self, index: int) -> Scene:
        """Scene number `index` with its facts and boxes."""
        config = self.config
        rng = random.Random(f"{config.seed}/{config.split}/{index}")
        facts = self._facts(rng)
        style = rng.choice(config.styles)
        return draw(facts, style, config.side, rng, seed=index, fonts=config.fonts)

    def _facts(self, rng: random.Random) -> Facts:
        """Facts of this split, by rejection: the test side is about one combination in ten, so this ends soon."""
        while True:
            facts = self._any_facts(rng)
            combinations = facts.combinations()
            held_out = [is_held_out(c) for c in combinations]
            if self.config.split == "train" and not any(held_out):
                return facts
            if self.config.split == "test" and any(held_out):
                return facts

    def _any_facts(self, rng: random.Random) -> Facts:
        config = self.config
        pair = rng.random() < config.pair_share
        chosen = rng.sample(self.pool, 2 if pair else 1)
        groups = []
        for concept in chosen:
            count = 1 if rng.random() < 0.5 else rng.randint(2, min(config.most, 4 if pair else 8))
            colour = rng.choice(tuple(COLOURS)) if rng.random() < config.colour_share else None
            groups.append(Group(concept, count, colour))
        word = rng.choice(WORDS) if rng.random() < config.word_share else None
        return Facts(tuple(groups), rng.choice(RELATIONS) if pair else None, rng.choice(tuple(BACKGROUNDS)), word)


def is_held_out(combination: str) -> bool:
    """Whether a combination belongs to the test side, for ever and everywhere."""
    return hashlib.blake2b(combination.encode(), digest_size=4).digest()[0] % TEST_SHARE == 0


_HEAD = re.compile(r" (?:of|with|without|in|on|for|at|and) ")
"""What follows these words does not change when there are several: "eyes in speech bubble"."""


def _looks_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "us", "is"))


@lru_cache(maxsize=4096)
def countable(noun: str) -> str:
    """A noun that can be counted: "books" is drawn as one thing, "set of books"."""
    return f"set of {noun}" if _looks_plural(_HEAD.split(noun)[0]) else noun


def plural(words: str) -> str:
    """ "red apple" -> "red apples", "bunch of grapes" -> "bunches of grapes"."""
    cut = _HEAD.search(words)
    head, tail = (words[: cut.start()], words[cut.start() :]) if cut else (words, "")
    stem, last = head[:-1], head[-1]
    if head.endswith(("fish", "sheep", "deer")):
        many = head
    elif head.endswith(("s", "x", "ch", "sh", "z")):
        many = head + "es"
    elif last == "y" and stem and stem[-1] not in "aeiou":
        many = stem + "ies"
    elif head.rsplit(" ", 1)[-1] in ("man", "woman", "snowman"):
        many = head[:-2] + "en"
    elif head.rsplit(" ", 1)[-1] in ("person", "child"):
        many = head[:-6] + "people" if head.endswith("person") else head + "ren"
    else:
        many = head + "s"
    return many + tail


def draw(facts: Facts, style: str, side: int, rng: random.Random, *, seed: int = 0, fonts: str = "train") -> Scene:
    """Compose a scene: background, then each group's objects on a jittered grid in the group's part of the picture."""
    pixels = _background(facts.background, side, rng)
    top = 0
    if facts.word:
        top = _print_word(pixels, facts.word, rng, fonts)
    boxes = []
    for index, (group, region) in enumerate(zip(facts.groups, _regions(facts, side, top), strict=True)):
        boxes.append((index, [_place(pixels, group, style, cell, rng) for cell in _cells(region, group.count, rng)]))
    return Scene(facts, seed, style, boxes, pixels)


def _background(name: str, side: int, rng: random.Random) -> np.ndarray:
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


def _cells(region: tuple[float, float, float, float], count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """(left, top, size) of `count` squares in a region: the grid with the largest cells, objects of one size, jittered."""
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    columns = max(range(1, count + 1), key=lambda c: min(width / c, height / -(-count // c)))
    rows = -(-count // columns)
    cell_w, cell_h = width / columns, height / rows
    size = min(cell_w, cell_h) * rng.uniform(0.72, 0.96)
    if count == 1:
        size *= rng.uniform(0.7, 1.0)
    places = rng.sample(range(rows * columns), count)
    out = []
    for place in places:
        x = left + (place % columns) * cell_w + rng.uniform(0, cell_w - size)
        y = top + (place // columns) * cell_h + rng.uniform(0, cell_h - size)
        out.append((x, y, size))
    return out


def _place(
    pixels: np.ndarray, group: Group, style: str, cell: tuple[float, float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw one object into its square; returns the box of what is visible."""
    x, y, size = cell
    side = max(6, round(size))
    drawing = _tinted(group.concept, style, group.colour).resize((side, side), Image.Resampling.BOX)
    angle = rng.uniform(-12, 12)
    if side >= 12:
        drawing = drawing.rotate(angle, Image.Resampling.BILINEAR)
    premultiplied = np.asarray(drawing)
    limit = pixels.shape[0] - side
    at_x, at_y = min(max(round(x), 0), limit), min(max(round(y), 0), limit)
    ground = pixels[at_y : at_y + side, at_x : at_x + side]
    keep = 255 - premultiplied[..., 3:].astype(np.uint16)
    ground[:] = premultiplied[..., :3] + ((ground * keep + 127) // 255).astype(np.uint8)
    rows, columns = np.flatnonzero(premultiplied[..., 3].any(1)), np.flatnonzero(premultiplied[..., 3].any(0))
    if not len(rows):
        return at_x, at_y, at_x + side, at_y + side
    return at_x + int(columns[0]), at_y + int(rows[0]), at_x + int(columns[-1]) + 1, at_y + int(rows[-1]) + 1


@lru_cache(maxsize=20_000)
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


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = next(path for path in font_files() if path.name == name)
    return ImageFont.truetype(str(path), size)


def _print_word(pixels: np.ndarray, word: str, rng: random.Random, fonts: str) -> int:
    """Print a word across the top in a readable colour; returns the first free row below it."""
    side = pixels.shape[0]
    names = [path.name for path in font_files() if (path.name == HELD_OUT_FONT) == (fonts == "test")]
    name, size = rng.choice(names), max(8, round(side * rng.uniform(0.12, 0.2)))
    font = _font(name, size)
    while size > 6 and font.getlength(word) > side - 4:
        size -= 1
        font = _font(name, size)
    bright = pixels[: size + 2].mean() > 128
    picture = Image.fromarray(pixels)
    left, upper, right, lower = font.getbbox(word)
    x = rng.randint(1, max(1, round(side - (right - left) - 1)))
    ImageDraw.Draw(picture).text((x - left, 1 - upper), word, font=font, fill=(15, 15, 15) if bright else (245, 245, 245))
    pixels[:] = np.asarray(picture)
    return int(lower - upper) + 3
