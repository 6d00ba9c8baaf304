"""A comparison that another version began, that is stopped, or that is given what it cannot take."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.config import to_dict
from intermodal.errors import IntermodalError
from intermodal.lab import compare as lab
from intermodal.lab import measure, sides
from intermodal.models.generative import Generative
from intermodal.train.loop import Stopped
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PAIR = [lab.Side(RECIPES / f"compare_{name}.py") for name in ("stitched", "native")]
QUICK = lab.Settings(questions=2, signs=1, heights=(12,), read_out=(20, 8), drawn=1, judge_steps=1, steps=2, seeds=1)


def leave_run(folder, recipe, **result):
    """What a run of an older version left."""
    stage = folder / "model" / f"1-{recipe.stages[0].name}"
    stage.mkdir(parents=True)
    row = {"step": 1, "loss": 1.0, "samples_per_second": 1.0, "tokens": 10, "highest_score": 2.0, "score_norm": 3.0}
    (stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "model" / "model").mkdir()
    (folder / "model" / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    kept = {"seed": 0, "threads": 1, "seconds": 300.0, "signs_guess": 0.125}
    (folder / "result.json").write_text(json.dumps({**kept, **result}))


def test_runs_of_another_version_are_measured_again_and_not_trained(monkeypatch, tmp_path):
    written = []

    def here(function, *arguments):
        assert function is lab._measure_again
        function(*arguments)

    model = object.__new__(Generative)
    monkeypatch.setattr(lab, "_alone", here)
    monkeypatch.setattr("intermodal.weights.load.load", lambda path: model)
    monkeypatch.setattr(measure, "reading", lambda found, recipe, *_: {"signs_guess": {"8": 0.5}, "read": recipe.name})
    monkeypatch.setattr("intermodal.lab.report.write", lambda out, results, *_: written.append(results) or out)
    for name in ("stitched", "native"):
        leave_run(tmp_path / f"{name}-seed0", load_recipe(RECIPES / f"compare_{name}.py", tiny=True))
    lab.compare(*PAIR, tmp_path, QUICK, tiny=True, console=SimpleNamespace(print=lambda *_: None))
    for name, (row,) in written[0].items():
        assert (row["measures"], row["signs_guess"], row["read"]) == (sides.MEASURES, {"8": 0.5}, name)
        assert (row["seconds"], row["highest_norm"]) == (300.0, 3.0)
    monkeypatch.setattr(lab, "_alone", None)
    lab.compare(*PAIR, tmp_path, QUICK, tiny=True)  # once is enough


def test_a_run_that_cannot_be_measured_again_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"threads": 1}')
    with pytest.raises(IntermodalError, match=r"measured by another version.*remove .* to train it anew"):
        lab._measure_again(tmp_path, QUICK)


def test_a_setting_that_recipes_have_got_since_is_no_other_comparison(tmp_path):
    both = lab.entries(PAIR, {"stitched": None, "native": None}, tiny=True)
    sides.claim(tmp_path, both, QUICK)
    (tmp_path / "native-seed0").mkdir()
    (tmp_path / "native-seed0" / "result.json").write_text("{}")
    file = tmp_path / "settings.json"
    kept = json.loads(file.read_text())
    del kept["first"]["stages"][0]["data"]["video_fps"], kept["eyes"]["second"]["train"]["keep"]
    file.write_text(json.dumps(kept))
    sides.claim(tmp_path, both, QUICK)
    kept["second"]["stages"][0]["data"]["batch"] = 3
    kept["second"]["gone"] = 1
    file.write_text(json.dumps(kept))
    with pytest.raises(IntermodalError, match=r"second\.stages\.\w+\.data\.batch was 3.*second\.gone was 1, and is not there"):
        sides.claim(tmp_path, both, QUICK)


def test_a_name_with_a_slash_stays_in_the_comparisons_folder():
    named = [lab.Side(side.recipe, (f"name=lab/{number}",)) for number, side in enumerate(PAIR)]
    both = lab.entries(named, {"stitched": None, "native": None}, tiny=True)
    assert [entry.name for entry in both] == ["lab-0", "lab-1"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stopped("stopped at step 3; go on with the same command and --resume")])
def test_a_stopped_comparison_says_how_it_goes_on(stop, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise stop

    monkeypatch.setattr("intermodal.lab.compare.compare", stopped)
    said = CliRunner().invoke(app, ["compare", "--out", str(tmp_path / "out")])
    assert isinstance(said.exception, Stopped)
    assert "the same command goes on" in str(said.exception)
    assert "--resume" not in str(said.exception)


@pytest.mark.parametrize("verb", ["compare", "demo", "demo-native"])
def test_a_file_is_no_folder_to_write_to(verb, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    said = CliRunner().invoke(app, [verb, "--steps", "1", "--out", str(file)])
    assert isinstance(said.exception, IntermodalError)
    assert "is a file, and a folder is wanted" in str(said.exception)


def test_the_trial_before_the_runs_asks_for_what_may_fail(monkeypatch):
    """Features of a kind of model that nobody thought of fail before half an hour of training, not after."""
    shown = []
    monkeypatch.setattr(measure, "tokens_per_image", lambda model, side: shown.append(side))
    monkeypatch.setattr(measure, "kept", lambda model, config, read_out: shown.append(read_out))
    measure.tried(SimpleNamespace(picture_side=48), load_recipe(RECIPES / "compare_stitched.py"), QUICK)
    assert shown == [48, (1, 1)]
