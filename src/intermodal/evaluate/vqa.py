"""Asking a model about held-out scenes: exact answers by kind of question, beside the most common answer and a blind model."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..data.compose import Scene
from ..data.facts import plural
from ..data.questions import KINDS, SIGN_QUESTION, Question, questions
from ..data.scenes import SceneConfig, Scenes
from ..data.signs import Sign, SignConfig, Signs
from ..data.talks import SceneTalks, SignTalks, open_talks, user
from ..errors import IntermodalError
from ..models.generative import Generative
from ..train.recipe import StagedRecipe

T = TypeVar("T", SceneTalks, SignTalks)
S = TypeVar("S", Scenes, Signs)
TALKS = ("questions", "draws", "steps", "captions")
"""Kinds of conversations whose pictures are drawn by the project, in the order in which an exam takes its scenes from them."""
LOOKS = 1000
"""Scenes that are looked at for each question that is wanted of a kind."""


@dataclass(frozen=True)
class Asked:
    shown: Scene | Sign
    question: Question

    def messages(self, blind: bool = False) -> list[dict[str, Any]]:
        return [user(None if blind else self.shown.image, self.question.text)]


def asked_of(recipe: StagedRecipe, kind: type[T], side: int) -> T | None:
    """The first conversations of a kind among the questions of the recipe's last stage."""
    talks = (open_talks(spec, side=side) for spec in recipe.stages[-1].data.train if spec.startswith("questions:"))
    return next((found for found in talks if isinstance(found, kind)), None)


def source_of(recipe: StagedRecipe, kind: type[S], side: int, first: str = TALKS[0]) -> S | None:
    """What the last stage's conversations show, scenes or signs: of those of the kind `first` of `TALKS`, else of the next that has any.

    A model is to be asked about what it has seen, also where its last stage only draws, or only captions.
    """
    for talk in (first, *(other for other in TALKS if other != first)):
        for spec in recipe.stages[-1].data.train:
            head, _, rest = spec.partition(":")
            if head == talk and rest.startswith(("scenes", "signs")):
                talks = open_talks(spec, side=side)
                found = next((getattr(talks, name) for name in ("scenes", "signs", "source") if hasattr(talks, name)), None)
                if isinstance(found, kind):
                    return found
    return None


def held_out_questions(
    config: SceneConfig, each: int = 150, seed: int = 7, kinds: Sequence[str] = KINDS, signs: SignConfig | None = None
) -> list[Asked]:
    """`each` questions of every kind, one a picture, about scenes of the test side: combinations never trained on, an unseen font.

    Args:
        config: the training scenes' settings; split, fonts and seed are replaced, and where signs are asked for, half the scenes have one.
        kinds: those of `KINDS` to ask.
        signs: settings of pictures of one word, which signs are then asked of instead of scenes.

    Raises:
        IntermodalError: scenes by these settings hardly ever answer questions of some kind.
    """
    if signs is not None and "sign" in kinds:
        rest = held_out_questions(config, each, seed, [kind for kind in kinds if kind != "sign"])
        shown = [Signs(replace(signs, fonts="test", seed=seed)).sign(index) for index in range(each)]
        return rest + [Asked(sign, Question("sign", SIGN_QUESTION, sign.word)) for sign in shown]
    words = 0.5 if "sign" in kinds else config.word_share
    source = Scenes(replace(config, split="test", fonts="test", seed=seed, word_share=words))
    out: dict[str, list[Asked]] = {kind: [] for kind in kinds}
    index = 0
    while missing := [kind for kind, found in out.items() if len(found) < each]:
        if index == LOOKS * each:
            raise IntermodalError(
                f"of {index} held-out scenes too few answer the question {missing[0]!r}; ask other kinds, or "
                f"let scenes have more of it (pair_share, colour_share): {source.config}"
            )
        by_kind: dict[str, list[Question]] = {}
        for question in questions(source.facts(index)):
            by_kind.setdefault(question.kind, []).append(question)
        wanted = [kind for kind in by_kind if kind in missing]
        rng = random.Random(f"{seed}/{index}")
        if wanted:
            kind = rng.choice(wanted)
            out[kind].append(Asked(source.scene(index), rng.choice(by_kind[kind])))
        index += 1
    return [asked for kind in kinds for asked in out[kind]]


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


def majority(config: SceneConfig, asked: Sequence[Asked], looks: int = 500, signs: SignConfig | None = None) -> list[str]:
    """What to answer without looking: each kind's most common answer in the training scenes, and in the training signs where given."""
    source = Scenes(replace(config, word_share=max(config.word_share, 0.3)))
    seen: dict[str, Counter[str]] = {}
    for index in range(looks):
        for question in questions(source.facts(index)):
            seen.setdefault(question.kind, Counter())[question.answer] += 1
    if signs is not None:
        seen["sign"] = Counter(Signs(signs).word(index) for index in range(looks))
    return [seen[one.question.kind].most_common(1)[0][0] for one in asked]


def captions(model: Generative, config: SceneConfig, count: int, seed: int, progress: bool = False) -> dict[str, float]:
    """Captions of `count` held-out scenes: how many are exactly right, and the share of named things that are named."""
    source = Scenes(replace(config, split="test", seed=seed))
    facts = [source.facts(index) for index in range(count)]
    shown = [[user(source.scene(index).image)] for index in range(count)]
    said = model.generate_batch(shown, slots=64, max_new_tokens=32, progress=progress)
    exact = [reply.text.strip() == fact.caption() for reply, fact in zip(said, facts, strict=True)]
    named = [names(group.noun, reply.text) for reply, fact in zip(said, facts, strict=True) for group in fact.groups]
    return {"exact": sum(exact) / count, "things": sum(named) / len(named)}


def names(noun: str, text: str) -> bool:
    """Whether a text holds a noun, as one or as many, in whole words."""
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in (noun, plural(noun)))
