"""What the comparison asks: signs of the height that their row says, what single patches keep, scenes that the recipe has shown."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from intermodal.batch import Visual
from intermodal.config import override
from intermodal.data.compose import font, fonts_of, ground
from intermodal.data.facts import BACKGROUNDS
from intermodal.data.scenes import WORDS, SceneConfig, Scenes
from intermodal.data.signs import SignConfig, Signs
from intermodal.errors import IntermodalError
from intermodal.evaluate.demo_native import asked_kinds
from intermodal.evaluate.judge import train_judge, verdicts
from intermodal.lab import measure
from intermodal.lab.sides import Settings
from intermodal.models.chameleon import Chameleon
from intermodal.models.llava import Llava
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
ONE = replace(Settings(), questions=1)


def stitched(*settings):
    return override(load_recipe(RECIPES / "compare_stitched.py"), settings)


def learning_from(*train, **data):
    """The stitched recipe with other conversations in its only stage."""
    made = stitched()
    (stage,) = made.stages
    return replace(made, stages=(replace(stage, data=replace(stage.data, train=train, weights=None, **data)),))


@pytest.mark.parametrize(
    ("words", "shown"), [(8, {8: 8, 10: 8, 12: 8, 14: 8}), (64, {8: 64, 10: 64, 12: 64, 14: 64, 17: 33, 20: 13})]
)
def test_a_row_of_signs_holds_only_signs_of_its_height(words, shown):
    recipe = learning_from("questions:scenes:core", f"questions:signs?words={words}")
    exam = measure.asked_about(recipe, ONE, 48)
    assert exam.heights == shown
    for height, fitting in exam.heights.items():
        signs = [exam.signs.sign(index, height) for index in range(60)]
        assert {sign.height for sign in signs} == {height}
        assert len({sign.word for sign in signs[:fitting]}) == min(fitting, 60)  # each as often as another
        # the letters themselves are of that size: the word is as wide as one of its fonts prints it, not smaller
        for sign in signs[:10]:
            light = sign.pixels.astype(float).mean(-1)
            columns = np.flatnonzero(np.abs(light - np.median(light)).max(0) > 60)
            widths = [right - left for name in exam.signs.fitting(height)[sign.word]
                      for left, _, right, _ in [font(name, height).getbbox(sign.word)]]  # fmt: skip
            assert min(abs(columns[-1] - columns[0] + 1 - width) for width in widths) <= 4  # faint edges are not counted


def test_a_height_in_which_no_word_fits_is_refused():
    with pytest.raises(IntermodalError, match="no word fits into 48 pixels in letters of 40"):
        Signs(SignConfig(side=48, words=8)).sign(0, 40)


def sign_as_ever(config, index):
    """How signs that recipes train on are drawn: seeds of recipes mean the same pictures for ever."""
    rng = random.Random(f"signs/{config.seed}/{config.fonts}/{index}")
    size = round(config.least * (config.most / config.least) ** rng.random())
    word = rng.choice(WORDS[: config.words])
    pixels = ground(rng.choice(tuple(BACKGROUNDS)), config.side, rng)
    name = rng.choice(fonts_of(config.fonts))
    while size > config.least and font(name, size).getlength(word) > config.side - 2:
        size -= 1
    left, top, right, bottom = font(name, size).getbbox(word)
    at = [rng.uniform(1, max(1.0, config.side - 1 - length)) for length in (right - left, bottom - top)]
    light, picture = int(pixels.mean()) > 128, Image.fromarray(pixels)
    colour = tuple(rng.randint(0, 70) if light else rng.randint(200, 255) for _ in range(3))
    ImageDraw.Draw(picture).text((round(at[0] - left), round(at[1] - top)), word, font=font(name, size), fill=colour)
    return word, size, np.asarray(picture)


@pytest.mark.parametrize("words", [8, 64])
def test_signs_that_are_trained_on_are_what_they_were(words):
    config = SignConfig(side=48, words=words, seed=3)
    for index in range(40):
        sign, (word, size, pixels) = Signs(config).sign(index), sign_as_ever(config, index)
        assert (sign.word, sign.height) == (word, size)
        assert np.array_equal(sign.pixels, pixels)


class Looks:
    """A model with eyes whose states are the pixels of its patches, in the order that `states` gives them."""

    def __init__(self, states, grids=None, merge=2):
        self.given, self.grids = states, grids
        self.visual = SimpleNamespace(config=SimpleNamespace(merge=merge))

    def states(self, visual):
        return (self.given,)


def test_states_of_merged_blocks_are_put_back_beside_their_patches():
    raster = torch.arange(16).float().reshape(4, 4, 1)
    blocks = raster.unflatten(0, (2, 2)).unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 3)
    assert blocks.flatten().tolist()[:4] == [0, 1, 4, 5]
    visual = Visual(torch.zeros(16, 3), grids=((1, 4, 4),))
    assert measure._patch_states(Looks(blocks), visual).flatten().tolist() == list(range(16))
    assert measure._patch_states(Looks(blocks), replace(visual, grids=((1, 2, 8),))) is None
    assert measure._patch_states(Looks(torch.zeros(32, 1)), replace(visual, grids=((2, 4, 4),))) is None


def test_of_several_views_only_a_llavas_whole_picture_is_read():
    tiles = torch.arange(48).float().reshape(3, 16, 1)
    visual = Visual(torch.zeros(3, 3, 8, 8))
    assert measure._patch_states(Looks(tiles), visual) is None

    class Tiles(Looks, Llava):
        pass

    assert measure._patch_states(Tiles(tiles), visual).flatten().tolist() == list(range(16))
    assert measure._patch_states(Looks(torch.zeros(1, 17, 1)), visual) is None  # with a class token among them


def test_features_of_no_patches_are_no_read_out(monkeypatch):
    monkeypatch.setattr(measure, "features", lambda model, pictures: None)
    assert measure.kept("another", SceneConfig(side=32), (4, 2)) == {"linear": None, "decoder": None}
    monkeypatch.setattr(measure, "features", lambda model, pictures: torch.ones(len(pictures), 9, 2))
    assert measure.kept("another", SceneConfig(side=32), (4, 2))["linear"] is None  # 32 pixels in three rows


def test_a_chameleon_without_decoder_has_no_pictures_to_keep(monkeypatch):
    class Silent(Chameleon):
        def __init__(self):
            nn.Module.__init__(self)
            self.vqmodel = SimpleNamespace(decoder=None)

    monkeypatch.setattr(measure, "features", lambda model, pictures: torch.ones(len(pictures), 16, 2))
    kept = measure.kept(Silent(), SceneConfig(side=32), (4, 2))
    assert kept["decoder"] is None
    assert kept["linear"] is not None


def test_a_model_is_asked_about_scenes_that_it_has_seen():
    """Captions of the captions' scenes, drawings of those that it draws, and questions of the next best where none are asked."""
    every = ("captions:sprites:core", "captions:scenes:core?most=1", "draws:scenes:core?most=2", "questions:scenes:core?most=3")
    exam = measure.asked_about(learning_from(*every), ONE, 48)
    assert [config.most for config in (exam.captioned, exam.drawn, exam.scenes)] == [1, 2, 3]
    exam = measure.asked_about(learning_from(*every[:3]), ONE, 48)
    assert [config.most for config in (exam.captioned, exam.drawn, exam.scenes)] == [1, 2, 2]
    exam = measure.asked_about(learning_from(*every[:2], "questions:signs"), replace(ONE, heights=(8,)), 48)
    assert [config.most for config in (exam.captioned, exam.drawn, exam.scenes)] == [1, 1, 1]
    assert measure.scene_config(learning_from("questions:signs"), 48) == SceneConfig(side=48)
    assert measure.scene_config(learning_from("steps:scenes:core?most=2"), 48) == SceneConfig(side=48, most=2, pair_share=1.0)


def test_kinds_of_questions_are_those_that_the_shown_scenes_can_answer():
    assert "count" in asked_kinds(learning_from("questions:signs"))
    assert "count" in asked_kinds(learning_from("captions:scenes:core?most=3"))
    assert "count" not in asked_kinds(learning_from("draws:scenes:core?most=1"))
    assert "sign" in asked_kinds(learning_from("draws:scenes:core?word_share=0.5"))


def test_pictures_are_as_large_as_the_last_stage_drew_them():
    exam = measure.asked_about(stitched("stages.learn.data.side=96"), ONE, 48)
    assert (exam.scenes.side, exam.captioned.side, exam.signs.config.side) == (96, 96, 96)
    assert exam.drawn.side == 48  # what a model draws is of its own size
    assert 20 in exam.heights
    in_spec = measure.asked_about(learning_from("questions:scenes:core?side=40", "draws:scenes:core?side=40"), ONE, 48)
    assert (in_spec.scenes.side, in_spec.drawn.side) == (40, 48)


def test_a_judge_knows_all_that_its_scenes_hold():
    config = SceneConfig(side=32, concepts="all", most=1, pair_share=0.0)
    judge = train_judge(config, steps=1, batch=4, progress=False)
    source = Scenes(config)
    assert judge.concepts == list(source.pool)
    scenes = [source.scene(index) for index in range(4)]
    assert len(verdicts(judge, [scene.image for scene in scenes], [scene.facts for scene in scenes])) == 4
