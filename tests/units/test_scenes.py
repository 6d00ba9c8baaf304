"""Sprites and scenes: what is shipped, that the truth is the truth, and that splits hold."""

import random
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from intermodal.data import sprites
from intermodal.data.facts import OPPOSITE, Facts, Group, countable, is_held_out, plural
from intermodal.data.questions import KINDS
from intermodal.data.scenes import WORDS, SceneConfig, Scenes
from intermodal.data.signs import SignConfig, Signs
from intermodal.errors import IntermodalError
from intermodal.evaluate.scenes import SceneTask, scene_baselines, sprite_pixels
from intermodal.evaluate.vqa import held_out_questions, majority


def test_the_archive_is_what_it_says():
    assert files("intermodal.data").joinpath("assets/sprites.zip").stat().st_size <= 5_000_000
    concepts = sprites.concepts()
    assert len(concepts) >= 860
    assert len(sprites.core()) == 60
    assert len({c.noun for c in sprites.core()}) == 60
    assert all(c.keywords is not None and c.group and c.subgroup for c in concepts)
    for style in sprites.STYLES:
        drawing = np.asarray(sprites.sprite(concepts[100].index, style))
        assert drawing.shape == (64, 64, 4)
        assert drawing[..., 3].max() > 200
    credits = files("intermodal.data").joinpath("assets/CREDITS.md").read_text()
    assert all(f"`{style}`" in credits for style in sprites.STYLES)


def test_the_held_out_style_is_never_in_training():
    seen = {Scenes(SceneConfig()).scene(n).style for n in range(200)}
    assert seen == set(sprites.TRAIN_STYLES)
    assert sprites.HELD_OUT_STYLE not in seen
    assert {"fluent-3d", "fluent-flat"} <= set(sprites.TRAIN_STYLES)


def test_a_number_is_the_same_scene_everywhere():
    a, b = Scenes(SceneConfig(word_share=0.3)), Scenes(SceneConfig(word_share=0.3))
    for n in (0, 5, 12345678901):
        assert np.array_equal(a.scene(n).pixels, b.scene(n).pixels)
        assert a[n].texts == b[n].texts
    assert not np.array_equal(a.scene(0).pixels, Scenes(SceneConfig(word_share=0.3, seed=1)).scene(0).pixels)


@pytest.mark.parametrize("side", [48, 64, 128])
def test_boxes_and_relations_are_true(side):
    source = Scenes(SceneConfig(side=side, word_share=0.2))
    for n in range(150):
        scene = source.scene(n)
        assert [len(boxes) for _, boxes in scene.boxes] == [g.count for g in scene.facts.groups]
        for _, boxes in scene.boxes:
            assert all(0 <= x0 < x1 <= side and 0 <= y0 < y1 <= side for x0, y0, x1, y1 in boxes)
        if scene.facts.relation:
            first, second = ([((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes] for _, boxes in scene.boxes)
            axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[scene.facts.relation]
            assert all(sign * (a[axis] - b[axis]) > 0 for a in first for b in second), (n, scene.facts)


def test_no_combination_is_on_both_sides():
    train = {c for n in range(3000) for c in Scenes(SceneConfig()).scene(n).facts.combinations()}
    for n in range(300):
        held_out = [c for c in Scenes(SceneConfig(split="test")).scene(n).facts.combinations() if is_held_out(c)]
        assert held_out
        assert not set(held_out) & train


def test_left_and_right_are_one_combination():
    a, b = Group(1), Group(2)
    one, other = Facts((a, b), "left of", "white"), Facts((b, a), "right of", "white")
    assert one.combinations() == other.combinations()


def test_wrong_captions_are_false_and_differ_in_one_respect():
    source = Scenes(SceneConfig())
    kinds = Counter()
    for n in range(200):
        facts = source.scene(n).facts
        true = {facts.caption(form) for form in range(5)}
        if facts.relation:
            flipped = Facts(facts.groups[::-1], OPPOSITE[facts.relation], facts.background)
            true |= {flipped.caption(form) for form in range(5)}
        for kind, wrong in facts.wrong(random.Random(n), source.pool).items():
            kinds[kind] += 1
            assert wrong.caption(0) not in true, (kind, facts)
    assert set(kinds) == {"object", "count", "colour", "relation", "swapped places", "swapped colours"}


@pytest.mark.parametrize(
    ("one", "many"),
    [("dog", "dogs"), ("bunch of grapes", "bunches of grapes"), ("butterfly", "butterflies"), ("bus", "buses"), ("fish", "fish"),
     ("red key", "red keys"), ("snowman", "snowmen"), ("fox", "foxes"), ("eye in speech bubble", "eyes in speech bubble"),
     ("set of books", "sets of books"), ("octopus", "octopuses")],
)  # fmt: skip
def test_plurals(one, many):
    assert plural(one) == many


def test_nouns_that_are_plural_already_become_sets():
    assert [countable(noun) for noun in ("books", "bus", "octopus", "bunch of grapes", "revolving hearts")] == [
        "set of books",
        "bus",
        "octopus",
        "bunch of grapes",
        "set of revolving hearts",
    ]


def test_baselines_are_what_they_claim():
    task = SceneTask.make(60, 48, style=None)
    found = scene_baselines(task, train_count=200)
    assert found.chance["image_to_text_recall@1"] == pytest.approx(1 / 60)
    assert found.bag_of_words["hard/relation"] == 0.5, "left and right are words of true captions of every such scene"
    assert found.bag_of_words["hard/object"] == 1.0
    assert found.bag_of_words["hard/swapped colours"] == pytest.approx(0.5, abs=0.05), "only a/an can give it away"
    assert all(0 <= v <= 1 for part in (found.text_only, found.raw_pixels) for v in part.values())
    one, said_one = (
        sum(facts.groups[0].count == 1 for facts in part) / 60
        for part in ([scene.facts for scene in task.scenes], [wrong["count"] for wrong in task.facts_wrong])
    )
    assert one <= found.majority["hard/count"] <= 1 - said_one, "half of all groups are of one, so it says one"
    assert found.majority["hard/swapped places"] == found.majority["hard/swapped colours"] == 0.5, "both say the same things"
    assert 0.3 < found.majority["hard/relation"] < 0.7
    assert sprite_pixels(48, "core")["top-1"] > 0.3
    assert sprite_pixels(48, "core", style="noto")["top-1"] == 1.0, "a style that is among the items finds itself"


def test_pairs_have_a_largest_count_of_their_own():
    facts = [Scenes(SceneConfig(pair_share=0.5, pair_most=2)).facts(index) for index in range(300)]
    counts = {pair: {g.count for f in facts if (len(f.groups) == 2) == pair for g in f.groups} for pair in (True, False)}
    assert counts == {True: {1, 2}, False: {1, 2, 3, 4}}
    twins = Scenes(SceneConfig(pair_share=1.0, pair_most=2, twins=1.0, twin_kind="count"))
    assert {group.count for index in range(100) for group in twins.facts(index).groups} == {1, 2}
    with pytest.raises(IntermodalError, match="pair_most is the largest count in a pair, from 1 to 4, and not 5"):
        Scenes(SceneConfig(pair_most=5))


def test_more_scenes_than_compete_make_hard_negatives_surer_and_retrieval_no_harder():
    task, all_of_them = SceneTask.make(60, 48, among=20), SceneTask.make(60, 48)
    assert task.captions == all_of_them.captions
    numbers = {
        caption: row % 20 for row, caption in enumerate(task.captions)
    }  # the rows after the first twenty are like one of them

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([numbers.get(text, 20) for text in texts]), 21).float()

    images = embed(task.captions)
    scores, more = task.score(images, embed), all_of_them.score(images, embed)
    assert scores["image_to_text_recall@1"] == 1.0 > more["image_to_text_recall@1"]
    hard = [key for key in scores if key.startswith("hard/")]
    assert hard
    assert all(scores[key] == more[key] for key in hard)
    found = scene_baselines(task, train_count=50)
    assert found.chance["image_to_text_recall@1"] == pytest.approx(1 / 20)
    assert found.text_only["hard/object"] == scene_baselines(all_of_them, train_count=50).text_only["hard/object"]


def test_signs_are_words_at_their_size_in_fonts_of_their_side():
    from intermodal.data.compose import HELD_OUT_FONTS, fonts_of
    from intermodal.data.readers import open_source
    from intermodal.data.talks import open_talks

    signs = open_source("signs?least=6&most=24", side=64)
    assert [signs[3].texts, signs[3].image.tolist()] == [
        signs[3].texts,
        open_source("signs?least=6&most=24", side=64)[3].image.tolist(),
    ]
    drawn = [signs.sign(index) for index in range(200)]
    assert {sign.height for sign in drawn} >= set(range(6, 12))
    assert max(sign.height for sign in drawn) <= 24
    assert fonts_of("test") == list(HELD_OUT_FONTS)
    assert not set(HELD_OUT_FONTS) & set(fonts_of("train"))  # nor a bold sibling of theirs
    for sign in drawn[:40]:
        # letters stand out from the ground, and the taller the font, the more rows they take
        light = sign.pixels.astype(float).mean(-1)
        rows = np.flatnonzero(np.abs(light - np.median(light)).max(1) > 60)
        assert sign.height * 0.3 <= len(rows) <= sign.height * 1.3 + 2
    assert signs.sign(5, height=8).height == 8
    talk = open_talks("questions:signs", side=64)[4]
    assert talk.messages[0]["content"][-1]["text"] == "what does the sign say ?"
    assert talk.messages[1]["content"] == talk.meta["word"]
    blind = open_talks("blind:signs", side=64)[4]
    assert [part["type"] for part in blind.messages[0]["content"]] == ["text"]
    assert blind.messages[1] == talk.messages[1]
    with pytest.raises(IntermodalError, match="blind:signs"):
        open_talks("blind:sprites:core")


def test_a_twin_differs_in_one_fact_and_stays_on_its_side():
    config = SceneConfig(side=32, twins=1.0, pair_share=0.5)
    source, alone = Scenes(config), Scenes(SceneConfig(side=32, pair_share=0.5))
    changed = Counter()
    for index in range(0, 200, 2):
        first, second = source.scene(index), source.scene(index + 1)
        assert first.facts == alone.facts(index)
        assert not any(is_held_out(combination) for combination in second.facts.combinations())
        assert (second.style, second.facts.background) == (first.style, first.facts.background)
        assert second.facts == source.facts(index + 1)
        kinds = {kind for kind in ("relation", "groups") if getattr(first.facts, kind) != getattr(second.facts, kind)}
        assert len(kinds) == 1
        changed.update(kinds)
    assert min(changed["relation"], changed["groups"]) > 5
    turned = Scenes(replace(config, twin_kind="relation"))
    pairs = [(turned.facts(index), turned.facts(index + 1)) for index in range(0, 100, 2)]
    for first, second in pairs:
        if first.relation is None:
            assert second.relation is None
        else:
            other = replace(first, relation=OPPOSITE[first.relation])
            assert second == other or any(map(is_held_out, other.combinations()))
    assert sum(first.relation is not None for first, _ in pairs) > 10


def test_what_is_further_left_or_higher_may_be_named_first_more_often():
    for lead in (0.0, 0.9):
        source = Scenes(SceneConfig(side=32, pair_share=1.0, lead=lead, twins=1.0, twin_kind="swapped places"))
        relations = [source.facts(index).relation for index in range(300)]
        assert sum(relation in ("left of", "above") for relation in relations) / 300 == pytest.approx(lead, abs=0.08)
        first, second = source.facts(0), source.facts(1)
        assert second == replace(first, groups=first.groups[::-1])
    for wrong, message in ((SceneConfig(lead=7.0), "from 0 to 1"), (SceneConfig(twin_kind="realtion"), "did you mean 'relation'")):
        with pytest.raises(IntermodalError, match=message):
            Scenes(wrong)


def test_without_jitter_a_thing_always_stands_the_same():
    """Upright, in the middle and as large as fits; with jitter, seldom twice the same; and the facts do not depend on it."""
    still, loose = (
        Scenes(SceneConfig(pair_share=0.0, most=1, colour_share=0.0, plain=True, styles=("noto",), jitter=jitter))
        for jitter in (0.0, 1.0)
    )
    assert [still.facts(n) for n in range(50)] == [loose.facts(n) for n in range(50)]
    looks: tuple[dict[int, set[bytes]], ...] = ({}, {})
    for kind, source in enumerate((still, loose)):
        for n in range(240):
            scene = source.scene(n)
            looks[kind].setdefault(scene.facts.groups[0].concept, set()).add(scene.pixels.tobytes())
    assert all(len(seen) == 1 for seen in looks[0].values())
    assert sum(map(len, looks[1].values())) == 240
    alone = still.scene(0)
    ((_, ((left, top, right, bottom),)),) = alone.boxes
    assert max(right - left, bottom - top) > 0.8 * 64
    assert abs(left + right - 64) <= 4 or abs(top + bottom - 64) <= 4


@pytest.mark.parametrize("settings", [{"jitter": 1.5}, {"styles": ("nota",)}, {"styles": ()}])
def test_scenes_that_cannot_be_drawn_are_refused(settings):
    with pytest.raises(IntermodalError, match=r"jitter is from 0|did you mean 'noto'|unknown style ''"):
        Scenes(SceneConfig(**settings))


def test_held_out_questions_are_of_the_kinds_asked_for():
    config = SceneConfig(pair_share=0.5, most=2, colour_share=0.3)
    asked = held_out_questions(config, each=4, kinds=("count", "where"))
    assert Counter(one.question.kind for one in asked) == {"count": 4, "where": 4}
    assert all(one.shown.facts.word is None for one in asked)  # nobody asked what a sign says
    assert any(one.shown.facts.word for one in held_out_questions(config, each=4, kinds=("sign", "count")))
    signs = SignConfig(side=48, words=3, least=10)
    mixed = held_out_questions(config, each=4, signs=signs)
    assert Counter(one.question.kind for one in mixed) == dict.fromkeys(KINDS, 4)
    said = [one for one in mixed if one.question.kind == "sign"]
    assert [one.question.answer for one in said] == [one.shown.word for one in said]
    unseen = Signs(replace(signs, fonts="test", seed=7))
    assert all(np.array_equal(one.shown.pixels, unseen.sign(index).pixels) for index, one in enumerate(said))
    guess = {answer for one, answer in zip(mixed, majority(config, mixed, signs=signs), strict=True) if one.question.kind == "sign"}
    assert len(guess) == 1
    assert guess < set(WORDS[:3])
    with pytest.raises(IntermodalError, match="too few answer the question 'where'"):
        held_out_questions(replace(config, pair_share=0.0), each=1, kinds=("where",))
