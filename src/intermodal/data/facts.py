"""What a scene says: groups of things, where they stand, and the captions, true and wrong, that follow from it."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from . import sprites

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
TWIN_KINDS = ("object", "count", "colour", "relation", "swapped places", "swapped colours")
"""In what one wrong caption may differ: the kinds of `Facts.wrong`."""
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
            out["swapped places"] = but(second, first)
            if first.colour != second.colour:
                swapped = (Group(first.concept, first.count, second.colour), Group(second.concept, second.count, first.colour))
                out["swapped colours"] = but(*swapped)
        return out


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
