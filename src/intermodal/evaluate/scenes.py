"""What a model understands of scenes it has never seen, beside the baselines that a number must be read with."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from ..data import sprites
from ..data.compose import Scene
from ..data.facts import Facts, Group
from ..data.scenes import SceneConfig, Scenes
from .retrieval import recall
from .zeroshot import accuracy, class_embeddings

Embed = Callable[[Sequence], Tensor]


@dataclass
class SceneTask:
    """Held-out scenes, each with its caption and, by kind, captions that are wrong in one respect."""

    scenes: list[Scene]
    captions: list[str]
    wrong: list[dict[str, str]]
    facts_wrong: list[dict[str, Facts]]
    """What those captions say."""
    among: int
    """How many of them compete in retrieval, the first ones: more scenes make the shares of hard negatives surer, not harder to reach."""

    @staticmethod
    def make(
        count: int,
        side: int,
        *,
        among: int | None = None,
        which: str = "core",
        style: str | None = sprites.HELD_OUT_STYLE,
        seed: int = 12345,
        forms: int = 3,
    ) -> SceneTask:
        """`count` scenes of held-out combinations, in the held-out style unless `style` is None (then in the training styles).

        Args:
            among: how many of them compete in retrieval; all by default.
            forms: how many phrasings the captions have: a model is asked in those it was trained on.
        """
        styles = (style,) if style else sprites.TRAIN_STYLES
        source = Scenes(SceneConfig(side=side, concepts=which, split="test", styles=styles, seed=seed))  # pyright: ignore[reportArgumentType]
        scenes, captions, wrong, facts_wrong = [], [], [], []
        for index in range(count):
            scene, rng = source.scene(index), random.Random(index)
            form = rng.randrange(forms)
            scenes.append(scene)
            captions.append(scene.facts.caption(form))
            facts_wrong.append(scene.facts.wrong(rng, source.pool))
            wrong.append({kind: facts.caption(form) for kind, facts in facts_wrong[-1].items()})
        return SceneTask(scenes, captions, wrong, facts_wrong, among or count)

    def score(self, image: Tensor, embed_texts: Callable[[list[str]], Tensor]) -> dict[str, float]:
        """Retrieval among the captions, and for each kind of hard negative how often the true caption scores higher."""
        texts = embed_texts(self.captions)
        out = recall(image[: self.among], texts[: self.among], [[i] for i in range(self.among)], at=(1, 5))
        true = (image * texts).sum(1)
        for kind, rows in self.by_kind().items():
            false = embed_texts([self.wrong[row][kind] for row in rows])
            out[f"hard/{kind}"] = (true[rows] > (image[rows] * false).sum(1)).float().mean().item()
        return out

    def by_kind(self) -> dict[str, list[int]]:
        rows = defaultdict(list)
        for row, wrong in enumerate(self.wrong):
            for kind in wrong:
                rows[kind].append(row)
        return dict(rows)


@dataclass
class Baselines:
    """What can be had without understanding. Fractions, by the names of the scores they stand beside."""

    chance: dict[str, float] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)
    text_only: dict[str, float] = field(default_factory=dict)
    bag_of_words: dict[str, float] = field(default_factory=dict)
    raw_pixels: dict[str, float] = field(default_factory=dict)


BASELINES = tuple(column.name for column in fields(Baselines))
"""In the order in which tables show them."""


def scene_baselines(
    task: SceneTask,
    *,
    training: SceneConfig | None = None,
    train_count: int = 4000,
    side: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Baselines:
    """What needs no learning, from scenes as `training` has them (the usual ones when left out).

    Chance; whichever of the two counts, colours, things or relations is the more common in training ("majority"); a unigram model of
    the training captions that sees no picture ("text only"); a reader that knows every word that is in some true caption but not who is
    what or where ("bag of words"); the caption of the nearest training scene by raw pixels, compared by its words.
    """
    source = Scenes(replace(training or SceneConfig(), split="train", side=task.scenes[0].pixels.shape[0], seed=seed))
    numbers = track(range(train_count), "drawing scenes to compare with", transient=True, disable=not progress)
    train = [source.scene(index) for index in numbers]
    frequency = Counter(word for scene in train for caption in scene.captions()[:3] for word in caption.split())
    total = sum(frequency.values())
    neighbour = nearest_by_pixels([s.pixels for s in task.scenes], [s.pixels for s in train], side)
    found = [{word for form in range(3) for word in train[i].facts.caption(form).split()} for i in neighbour.tolist()]
    known = [{word for form in range(5) for word in s.facts.caption(form).split()} for s in task.scenes]
    common = Counter((kind, _said(kind, scene.facts)) for scene in train for kind in ("count", "colour", "object", "relation"))
    out = Baselines()
    captions = task.captions[: task.among]

    def unigram(caption: str) -> float:
        words = caption.split()
        return sum(np.log((frequency[w] + 1) / (total + len(frequency))) for w in words) / len(words)

    def overlap(caption: str, words: set[str]) -> float:
        return len(words & set(caption.split())) / len(words | set(caption.split()))

    def contained(caption: str, words: set[str]) -> float:
        return sum(word in words for word in caption.split()) / len(caption.split())

    for k in (1, 5):
        name = f"image_to_text_recall@{k}"
        out.chance[name] = out.majority[name] = out.text_only[name] = min(1.0, k / task.among)
        order = [np.argsort([-overlap(c, words) for c in captions], kind="stable")[:k] for words in found[: task.among]]
        out.raw_pixels[name] = float(np.mean([row in top for row, top in enumerate(order)]))
        fits = [sum(contained(c, words) == 1 for c in captions) for words in known[: task.among]]
        out.bag_of_words[name] = float(np.mean([min(1.0, k / count) for count in fits]))
    for kind, rows in task.by_kind().items():
        name = f"hard/{kind}"
        pairs = [(row, task.captions[row], task.wrong[row][kind]) for row in rows]
        out.chance[name] = 0.5
        both = [(task.scenes[row].facts, task.facts_wrong[row][kind]) for row in rows]
        out.majority[name] = _wins([(kind, a, b) for a, b in both], lambda kind, facts: common[kind, _said(kind, facts)])
        out.text_only[name] = _wins(pairs, lambda row, caption: unigram(caption))
        out.bag_of_words[name] = _wins(pairs, lambda row, caption: contained(caption, known[row]))
        out.raw_pixels[name] = _wins(pairs, lambda row, caption: overlap(caption, found[row]))
    return out


def _said(kind: str, facts: Facts) -> Any:
    """What a kind of hard negative changes in facts, in the group that it changes; None where it only turns things round."""
    first = facts.groups[0]
    return {"count": first.count, "colour": first.colour, "object": first.concept, "relation": facts.relation}.get(kind)


def _wins(pairs: list[tuple[Any, Any, Any]], score: Callable[[Any, Any], float]) -> float:
    """Share of (about, true, false) whose true one scores higher; a tie is half."""
    results = []
    for about, true, false in pairs:
        a, b = score(about, true), score(about, false)
        results.append(0.5 if a == b else float(a > b))
    return float(np.mean(results))


def nearest_by_pixels(queries: Sequence[np.ndarray], items: Sequence[np.ndarray], side: int = 16) -> Tensor:
    """(Q,) the item nearest to each query in mean-free raw pixels at `side` x `side`."""

    def vectors(pictures: Sequence[np.ndarray]) -> Tensor:
        stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(stack, size=(side, side), mode="area").flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)

    return (vectors(queries) @ vectors(items).T).argmax(1)


def sprite_names(
    embed_images: Embed,
    embed_texts: Callable[[list[str]], Tensor],
    side: int,
    which: str = "core",
    style: str = sprites.HELD_OUT_STYLE,
) -> dict[str, float]:
    """Zero-shot naming of single sprites in a style, on white, by the captions of one-object scenes ("an apple"); among the core sixty
    or all concepts."""
    pool = sprites.core() if which == "core" else sprites.concepts()
    image = embed_images([sprites.on_background(c.index, style, side) for c in pool])
    return accuracy(image, sprite_classes(embed_texts, which), range(len(pool)))


def sprite_classes(embed_texts: Callable[[list[str]], Tensor], which: str = "core") -> Tensor:
    """(C, E) text embeddings of the concepts."""
    pool = sprites.core() if which == "core" else sprites.concepts()
    return class_embeddings(embed_texts, [Group(c.index).phrase() for c in pool], ("{}",))


def sprite_pixels(side: int, which: str = "core", style: str = sprites.HELD_OUT_STYLE) -> dict[str, float]:
    """The baseline of `sprite_names`: the concept of the nearest training-style sprite by raw pixels."""
    pool = sprites.core() if which == "core" else sprites.concepts()
    queries = [np.asarray(sprites.on_background(c.index, style, side)) for c in pool]
    items = [np.asarray(sprites.on_background(c.index, s, side)) for s in sprites.TRAIN_STYLES for c in pool]
    nearest = nearest_by_pixels(queries, items, side=min(side, 32)) % len(pool)
    return {"top-1": (nearest == torch.arange(len(pool))).float().mean().item()}
