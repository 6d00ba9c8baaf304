"""Scenes: pictures composed from the sprites by seed, without limit, with exact truth.

A scene has one or two groups of equal objects. A group has a concept, a count, and sometimes a colour; two groups stand in a
relation (left of, right of, above, below). All that a caption says is a fact of the picture, so every wrong caption is wrong for a
known reason. Splits are by fact: a combination (concept, relation, concept), (concept, count) or (concept, colour) belongs to one
side for ever, by its hash, so that a model that memorises pairs fails on the test side.

Scenes may come as twins: the second differs from the first in one respect, so that in one batch each is the other's hard negative.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from ..errors import IntermodalError, nearest
from . import sprites
from .compose import Scene, draw
from .facts import BACKGROUNDS, COLOURS, RELATIONS, TWIN_KINDS, Facts, Group, is_held_out
from .source import Sample

_PRINTED = """
apple bread chair cloud dance eagle flame grape happy honey house juice light lemon magic music night ocean paint paper peach piano
pizza plant queen radio river robot salad smile snack sound spice stone storm sugar table tiger toast today train truck under uncle
violin water whale world yellow zebra open stop sale free exit menu cafe taxi park zoo fun hot cold fast slow left right
"""
WORDS = tuple(_PRINTED.split())


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
    """Share of groups that are painted in one colour, which the caption names."""
    recolour: float = 0.0
    """Share of the other groups whose colours are changed at random, unnamed: an augmentation against learning a style by heart."""
    most: int = 4
    """Largest count of a group; two groups never have more than eight objects together."""
    pair_most: int = 4
    """The same where there are two groups. Up to 2 of a kind share a half of the picture and are as large as one would be."""
    word_share: float = 0.0
    """Share of scenes with a printed word."""
    twins: float = 0.0
    """Share of scenes with an odd number that are the one before them with one fact changed (a count, the relation, a colour, a thing):
    same style and ground, laid out anew."""
    lead: float = 0.5
    """Share of pairs whose first phrasing names the group further left, or higher, first. People mostly say it so, and a model that has
    learned the order of names learns the four words of place sooner."""
    twin_kind: str = ""
    """The respect in which twins differ ("relation", "count", ...) where a scene can differ in it; any where left out."""
    plain: bool = False
    """White ground everywhere, unshaded: what a small model that draws need not spend its codes on."""
    jitter: float = 1.0
    """How much sizes, places and angles vary, from 0 (upright and as large as fits) to 1: the fewer ways a thing can stand, the fewer a
    model that draws has to learn."""
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
        if not 1 <= self.config.pair_most <= 4:
            raise IntermodalError(f"pair_most is the largest count in a pair, from 1 to 4, and not {self.config.pair_most}")
        if not 0 <= self.config.lead <= 1:
            raise IntermodalError(f"lead is a share of the pairs, from 0 to 1, and not {self.config.lead}")
        for style in self.config.styles or ("",):
            if style not in sprites.STYLES:
                raise IntermodalError(f"unknown style {style!r}: {', '.join(sprites.STYLES)}{nearest(style, sprites.STYLES)}")
        if not 0 <= self.config.jitter <= 1:
            raise IntermodalError(f"jitter is from 0 (none) to 1 (all), and not {self.config.jitter}")
        if self.config.twin_kind and self.config.twin_kind not in TWIN_KINDS:
            raise IntermodalError(
                f"unknown twin_kind {self.config.twin_kind!r}: {', '.join(TWIN_KINDS)}{nearest(self.config.twin_kind, TWIN_KINDS)}"
            )
        pool = sprites.core() if self.config.concepts == "core" else sprites.concepts()
        self.pool = tuple(concept.index for concept in pool)
        self.name = f"scenes-{self.config.concepts}-{self.config.split}-{self.config.seed}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return Sample(f"{self.name}/{index}", scene.pixels, scene.captions()[: self.config.forms], scene.truth())

    def scene(self, index: int, groups: int | None = None) -> Scene:
        """Scene number `index` with its facts and boxes; with `groups`, only its first ones are drawn, where they stand."""
        config, rng = self.config, self._rng(index)
        facts, style = self._told(index, rng)
        settings = {"fonts": config.fonts, "recolour": config.recolour, "plain": config.plain, "jitter": config.jitter}
        return draw(facts, style, config.side, rng, seed=index, groups=groups, **settings)

    def facts(self, index: int) -> Facts:
        """What scene number `index` says, without drawing it."""
        return self._told(index, self._rng(index))[0]

    def _told(self, index: int, rng: random.Random) -> tuple[Facts, str]:
        """Facts and style; those of the scene before with one fact changed where this is a twin."""
        if index % 2 and self.config.twins and rng.random() < self.config.twins:
            facts, style = self._told(index - 1, self._rng(index - 1))
            changed = {kind: other for kind, other in facts.wrong(rng, self.pool).items() if self._belongs(other)}
            if self.config.twin_kind in changed:
                return changed[self.config.twin_kind], style
            if changed:
                return rng.choice(list(changed.values())), style
        return self._facts(rng), rng.choice(self.config.styles)

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self.config.seed}/{self.config.split}/{index}")

    def _facts(self, rng: random.Random) -> Facts:
        """Facts of this split, by rejection: the test side is about one combination in ten, so this ends soon."""
        while True:
            facts = self._any_facts(rng)
            if self._belongs(facts):
                return facts

    def _belongs(self, facts: Facts) -> bool:
        """Whether facts are of this split, with no larger counts than the config allows."""
        pair = len(facts.groups) == 2
        most = min(self.config.most, self.config.pair_most if pair else 8)
        held_out = any(is_held_out(combination) for combination in facts.combinations())
        return held_out == (self.config.split == "test") and all(group.count <= most for group in facts.groups)

    def _any_facts(self, rng: random.Random) -> Facts:
        config = self.config
        pair = rng.random() < config.pair_share
        chosen = rng.sample(self.pool, 2 if pair else 1)
        groups = []
        for concept in chosen:
            most = min(config.most, config.pair_most if pair else 8)
            count = rng.randint(2, most) if most > 1 and rng.random() >= 0.5 else 1
            colour = rng.choice(tuple(COLOURS)) if rng.random() < config.colour_share else None
            groups.append(Group(concept, count, colour))
        word = rng.choice(WORDS) if rng.random() < config.word_share else None
        relation = None
        if pair and config.lead != 0.5:
            relation = rng.choice(("left of", "above") if rng.random() < config.lead else ("right of", "below"))
        elif pair:  # one draw
            relation = rng.choice(RELATIONS)
        ground = rng.choice(tuple(BACKGROUNDS))
        return Facts(tuple(groups), relation, "white" if config.plain else ground, word)
