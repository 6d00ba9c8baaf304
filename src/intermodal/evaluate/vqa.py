"""Asking a model about held-out scenes: exact answers by kind of question, beside the most common answer and a blind model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.compose import Scene
from ..data.questions import KINDS, Question, questions
from ..data.scenes import SceneConfig, Scenes
from ..data.talks import user
from ..models.generative import Generative


@dataclass(frozen=True)
class Asked:
    scene: Scene
    question: Question

    def messages(self, blind: bool = False) -> list[dict[str, Any]]:
        return [user(None if blind else self.scene.image, self.question.text)]


def held_out_questions(config: SceneConfig, each: int = 150, seed: int = 7) -> list[Asked]:
    """`each` questions of every kind, one a scene, about scenes of the test side: combinations never trained on, an unseen font.

    Args:
        config: the training scenes' settings; side, split, fonts and seed are replaced.
    """
    source = Scenes(replace(config, split="test", fonts="test", seed=seed, word_share=0.5))
    out: dict[str, list[Asked]] = {kind: [] for kind in KINDS}
    index = 0
    while any(len(found) < each for found in out.values()):
        scene = source.scene(index)
        by_kind: dict[str, list[Question]] = {}
        for question in questions(scene.facts):
            by_kind.setdefault(question.kind, []).append(question)
        wanted = [kind for kind in by_kind if len(out[kind]) < each]
        rng = random.Random(f"{seed}/{index}")
        index += 1
        if wanted:
            kind = rng.choice(wanted)
            out[kind].append(Asked(scene, rng.choice(by_kind[kind])))
    return [asked for kind in KINDS for asked in out[kind]]


def ask(model: Generative, asked: Sequence[Asked], *, blind: bool = False, slots: int = 64, progress: bool = False) -> list[str]:
    """The model's greedy answers."""
    conversations = [one.messages(blind) for one in asked]
    return [reply.text.strip() for reply in model.generate_batch(conversations, slots=slots, max_new_tokens=16, progress=progress)]


def accuracy(asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, float]:
    """Share of exactly right answers by kind, and over all."""
    right: dict[str, list[bool]] = {}
    for one, answer in zip(asked, answers, strict=True):
        right.setdefault(one.question.kind, []).append(answer == one.question.answer)
    out = {kind: sum(found) / len(found) for kind, found in right.items()}
    return {**out, "all": sum(map(sum, right.values())) / len(asked)}


def majority(config: SceneConfig, asked: Sequence[Asked], looks: int = 500) -> list[str]:
    """What to answer without looking: each kind's most common answer in the training scenes."""
    source = Scenes(replace(config, word_share=max(config.word_share, 0.3)))
    seen: dict[str, Counter[str]] = {}
    for index in range(looks):
        for question in questions(source.facts(index)):
            seen.setdefault(question.kind, Counter())[question.answer] += 1
    return [seen[one.question.kind].most_common(1)[0][0] for one in asked]
