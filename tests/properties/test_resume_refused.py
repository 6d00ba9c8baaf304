"""A run that cannot go on as it is asked to: said by name, in one line, and the folder stays as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intermodal.config import override, to_dict
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.parallel import checkpoint
from intermodal.parallel.setup import World
from intermodal.train.contrastive import train
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = ("train.steps=2", "train.save_every=1", "train.precision=fp32", "train.threads=1", "optim.name=adamw")


def recipe_of(name, *changes):
    return override(load_recipe(RECIPES / f"{name}.py", tiny=True), [*SETTINGS, *changes])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a SigLIP and a CLIP run of two steps, never written into."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("siglip", "clip"):
        train(recipe_of(name), folder / name, quiet=True)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """run(name) -> a copy of the run's folder."""
    import shutil

    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


def refused(folder, recipe, words, kind=IntermodalError):
    before = (folder / "recipe.json").read_bytes()
    with pytest.raises(kind, match=words) as caught:
        train(recipe, folder, resume=True, quiet=True)
    assert "\n" not in str(caught.value)
    assert (folder / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("siglip", "optim.name=muon", "optim.name adamw -> muon"),
        ("siglip", "optim.ema=0.9", "optim.ema None -> 0.9"),
        ("siglip", "model.vision.width=64", "model.vision.width 32 -> 64"),
        ("siglip", "model.family=clip", "model.family siglip -> clip"),
        ("siglip", "train.loss=softmax", "train.loss sigmoid -> softmax"),
        ("clip", "train.loss=sigmoid", "train.loss softmax -> sigmoid"),
        ("clip", "model.family=siglip", "model.family clip -> siglip"),
    ],
)
def test_settings_that_the_checkpoint_depends_on(runs, name, change, words):
    refused(runs / name, recipe_of(name, change), f"cannot go on with {words}: resume it as it began")


def test_dropout_and_steps_may_be_others(run):
    folder = run("siglip")
    recipe = recipe_of("siglip", "model.text.dropout=0.1", "train.steps=3", "train.log_every=1")
    train(recipe, folder, resume=True, quiet=True)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert json.loads((folder / "recipe.json").read_text()) == to_dict(recipe), "what the run is now made of"


def test_a_setting_that_the_checkpoint_does_not_know_is_no_change(run):
    """A run of an older version lacks settings that have been added since."""
    folder = run("siglip")
    meta = checkpoint.whole(folder)[-1] / "meta.json"
    held = json.loads(meta.read_text())
    del held["recipe"]["model"]["max_patches"]
    meta.write_text(json.dumps(held))
    train(recipe_of("siglip"), folder, resume=True, quiet=True)


def test_data_that_are_not_there_leave_the_recipe_as_it_was(runs):
    refused(runs / "siglip", recipe_of("siglip", 'data.train=["p.tar"]', "data.weights=null"), "p.tar")


def test_a_start_of_another_size_does_not_fit(runs, tmp_path):
    began = recipe_of("siglip", f"model.start={runs / 'siglip' / 'model'}")
    train(began, tmp_path / "run", quiet=True)
    wide = recipe_of("siglip", "model.vision.width=48")
    train(wide, tmp_path / "wide", quiet=True)
    other = replace(began, model=replace(began.model, start=str(tmp_path / "wide" / "model")))
    refused(tmp_path / "run", other, r"does not fit this run.*Size mismatch .*model\.vision", CheckpointError)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("*.distcp", "step-00000002 does not fit this run: its files are damaged"),
        (".metadata", "step-00000002 does not fit this run: its files are damaged"),
        ("meta.json", "meta.json is not valid JSON"),
        ("data-0.json", "data-0.json is not valid JSON"),
        ("random-0.pt", "random-0.pt cannot be read"),
    ],
)
def test_a_checkpoint_that_was_cut_short(run, file, words):
    folder = run("siglip")
    (cut,) = checkpoint.whole(folder)[-1].glob(file)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    refused(folder, recipe_of("siglip"), words, CheckpointError)


def test_weights_that_the_checkpoint_does_not_have(runs):
    folder = checkpoint.whole(runs / "siglip")[-1]
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore(folder, World(), model, torch.optim.AdamW(model.parameters()), None)


def test_meta_of_something_else(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks its step, ranks or recipe"):
        checkpoint.read_meta(tmp_path)


def test_a_fresh_run_after_one_in_the_other_layout(tmp_path):
    """A run that ended before its first checkpoint left `initial/`, and `model/` may be an older one's: neither is read for the new."""
    import shutil

    train(recipe_of("clip"), tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints")
    train(recipe_of("clip", "train.loss=sigmoid"), tmp_path, quiet=True)
    for name in ("initial", "model"):
        assert (tmp_path / name / "open_clip_config.json").exists()
        assert not (tmp_path / name / "config.json").exists()
