"""The comparison: its measures on models whose answers are known, its runs and report at their smallest."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.config import SettingError
from intermodal.data.scenes import SceneConfig, Scenes
from intermodal.data.signs import SignConfig, Signs
from intermodal.errors import IntermodalError
from intermodal.evaluate import vqa
from intermodal.lab import compare as lab
from intermodal.lab import logs, measure, report
from intermodal.train.fit import with_stage_steps
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Both of the project's recipes, tiny, one seed."""
    out = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "--tiny", "--steps", "3", "--seeds", "1", "--out", str(out / "run"), "--json"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    return out / "run", json.loads(said.stdout), arguments  # nothing else is on stdout


def test_every_row_of_the_lectures_table_is_measured(compared):
    folder, result, _ = compared
    labels = [label for label, _ in result["table"]]
    for wanted in ("questions, count", "captions, exactly", "signs of 8 px", "linear read-out", "own decoder", "tokens an image",
                   "tokens/s", "memory", "spikes", "highest score", "named things found, drawn for its caption"):  # fmt: skip
        assert any(wanted in label for label in labels), wanted
    rows = dict(result["table"])
    assert rows["tokens an image"] == ["16", "18"]  # 4 x 4 patches; 4 x 4 codes, their begin and end
    assert rows["kept by the eyes: own decoder, dB"][0] == "none"
    assert rows["named things found, drawn for its caption"][0] == "none"
    assert "%" in rows["named things found, drawn for its caption"][1]
    assert all(run["peak_megabytes"] > 100 for runs in result["runs"].values() for run in runs)
    assert any("cannot draw" in line for line in result["findings"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= 5
    assert "(48 px)" not in page
    assert (folder / "report.md").read_text().startswith("# Stitched against native")
    assert all((folder / f"{name}.png").stat().st_size > 1000 for name in report.PLOTS)


def test_a_comparison_goes_on_where_it_was(compared, monkeypatch):
    folder, result, arguments = compared
    monkeypatch.setattr(lab, "_alone", None)  # nothing is left to run
    said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(said.stdout)["table"] == result["table"]
    stitched, native = (lab.Side(RECIPES / f"compare_{name}.py") for name in ("stitched", "native"))
    with pytest.raises(IntermodalError, match="another comparison"):
        lab.compare(stitched, native, folder, lab.Settings())
    with pytest.raises(IntermodalError, match="only recipes with stages"):
        lab.compare(lab.Side(RECIPES / "siglip.py"), native, folder, lab.Settings())
    with pytest.raises(SettingError, match="did you mean"):
        lab.compare(stitched, lab.Side(native.recipe, ("stages.learn.optim.rl=1",)), folder, lab.Settings())


def test_one_recipe_against_itself_with_other_settings(tmp_path):
    """Any two sides: here two native models, the second deeper and without norms."""
    eyes = ["--native-eyes", str(RECIPES / "native_vqvae.py"), "--set-first", "model.vq=eyes", "--set-second", "model.vq=eyes"]
    other = ["--set-second", "model.decoder.depth=3", "--set-second", "model.decoder.qk_layernorm=false"]
    arguments = ["compare", str(RECIPES / "native.py"), str(RECIPES / "native.py"), *eyes, *other, "--tiny", "--steps", "2"]
    said = CliRunner().invoke(app, [*arguments, "--seeds", "1", "--out", str(tmp_path), "--json"], catch_exceptions=False)
    result = json.loads(said.stdout)
    first, second = (result["runs"][f"native-{number}"][0] for number in (1, 2))
    assert second["decoder_parameters"] > first["decoder_parameters"]
    assert {"colour", "where"} < first["questions"].keys()
    assert "count" not in first["questions"]  # there is one of everything in these scenes
    assert [run["drawn"]["count"] for run in (first, second)] == [4, 4]
    assert "native-2 with model.vq=eyes, model.decoder.depth=3" in (tmp_path / "report.md").read_text()


def test_a_seed_reaches_the_data_and_the_weights_of_every_stage():
    made = load_recipe(RECIPES / "llava.py", tiny=True)
    seeded = lab._seeded(made, 7)
    assert [(stage.data.seed, stage.train.seed) for stage in seeded.stages] == [(7, 7)] * len(made.stages)
    assert [replace(stage, data=old.data, train=old.train) for stage, old in zip(seeded.stages, made.stages, strict=True)] == list(
        made.stages
    )


WAITING_CHILD = """
import os, sys, time
from pathlib import Path
from intermodal.lab import compare

def wait():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    compare._alone(wait)
"""


def test_a_killed_comparison_leaves_no_run_behind(tmp_path):
    note, script = tmp_path / "pid", tmp_path / "main.py"
    script.write_text(WAITING_CHILD)
    parent = subprocess.Popen([sys.executable, script, note])
    until(lambda: note.exists() and note.read_text())
    child = Path(f"/proc/{note.read_text()}/stat")
    parent.kill()
    parent.wait()
    until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


def until(true, seconds=30.0):
    for _ in range(int(seconds * 10)):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"not so within {seconds} seconds")


def test_both_sides_read_the_same_with_the_same_decoder():
    stitched, native = (load_recipe(RECIPES / f"compare_{name}.py") for name in ("stitched", "native"))
    ours, theirs = stitched.stages[0].data, native.stages[0].data
    assert theirs.train[: len(ours.train)] == ours.train
    assert theirs.weights[: len(ours.weights)] == ours.weights
    shapes = [{**recipe.model.decoder.__dict__, "qk_layernorm": None} for recipe in (stitched, native)]
    assert shapes[0] == shapes[1]
    assert [stage.train.steps for stage in with_stage_steps(native, [7]).stages] == [7]


def test_what_only_pixels_hold_is_lost_by_what_does_not_hold_them(monkeypatch):
    """The read-out finds everything in features that are the pixels, and only the mean in features that say nothing."""
    from intermodal.evaluate.judge import pixels_of

    monkeypatch.setattr(measure, "RIDGE", 1e-7)

    def own(model, pictures):
        patches = pixels_of(pictures).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return patches if model == "pixels" else torch.zeros(len(pictures), 16, 3)

    monkeypatch.setattr(measure, "features", own)
    config = SceneConfig(side=32)
    all_kept, nothing = (measure.kept(model, config, (60, 20))["linear"] for model in ("pixels", "nothing"))
    assert all_kept > 40
    assert 3 < nothing < 15


class Oracle:
    """In place of a model: says of each picture what `knows` says."""

    def __init__(self, knows):
        self.knows, self.seen = knows, []

    def generate_batch(self, talks, **settings):
        pictures = [next(part["image"] for part in talk[0]["content"] if part["type"] == "image") for talk in talks]
        self.seen += pictures
        return [SimpleNamespace(text=self.knows(picture)) for picture in pictures]


def test_signs_are_shown_at_each_height_and_counted_for_it():
    source = Signs(SignConfig(side=48, words=8))
    words = {
        source.sign(index, height).image.tobytes(): (height, source.sign(index, height).word)
        for height in (8, 14)
        for index in range(5)
    }
    assert len(words) == 10
    oracle = Oracle(lambda picture: words[picture.tobytes()][1] if words[picture.tobytes()][0] == 14 else "no")
    assert measure.signs_read(oracle, source, (8, 14), 5) == {"8": 0.0, "14": 1.0}
    assert [words[picture.tobytes()][0] for picture in oracle.seen] == [8] * 5 + [14] * 5


def test_captions_are_right_when_they_are_the_scenes_own():
    config = SceneConfig(side=32)
    source = Scenes(replace(config, split="test", seed=3))
    truth = {source.scene(index).image.tobytes(): source.facts(index) for index in range(6)}
    assert vqa.captions(Oracle(lambda picture: truth[picture.tobytes()].caption()), config, 6, 3) == {"exact": 1.0, "things": 1.0}
    assert vqa.captions(Oracle(lambda picture: "nothing of the kind"), config, 6, 3) == {"exact": 0.0, "things": 0.0}
    first = source.scene(0).image.tobytes()
    one = Oracle(lambda picture: truth[first].caption() if picture.tobytes() == first else "")
    assert vqa.captions(one, config, 6, 3)["exact"] == pytest.approx(1 / 6)


def test_spikes_stand_out_from_what_was_usual():
    falling = list(np.linspace(4, 1, 40))
    assert logs.spikes(falling) == 0
    assert logs.spikes([*falling[:20], 9.0, *falling[20:], 7.0]) == 2


def test_nouns_are_found_as_words():
    assert vqa.names("apple", "two red apples left of a car")
    assert vqa.names("car", "two red apples left of a car")
    assert not vqa.names("car", "a scarf")
