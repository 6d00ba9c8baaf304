"""The demos from end to end, a few steps each: that they run, that the pages have everything, and that a stopped one goes on."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.evaluate.demo_llava import RECIPE as LLAVA_RECIPE
from intermodal.train.loop import Stopped, Trainer
from intermodal.train.recipe import load_recipe


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(run, step): Ctrl-C comes while a run, by its recipe's name, makes that step; once."""
    wanted, update = [], Trainer._update

    def watched(self, keys):
        if (self.recipe.name, self.step) in wanted:
            wanted.remove((self.recipe.name, self.step))
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, keys)

    monkeypatch.setattr(Trainer, "_update", watched)
    return lambda run, step: wanted.append((run, step))


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_demo_that_was_stopped_goes_on_with_the_same_steps(tmp_path, interrupted, monkeypatch):
    """Stopped in each of its three runs; what it ends with is what one that was not stopped ends with, bit for bit."""
    from intermodal.evaluate import demo, demo_llava

    monkeypatch.setattr(demo, "score", partial(demo.score, count=24, among=12))
    monkeypatch.setattr(demo, "scene_baselines", partial(demo.scene_baselines, train_count=20))
    monkeypatch.setattr(demo_llava, "held_out_questions", partial(demo_llava.held_out_questions, each=2))

    def first(out, steps, resume):
        return demo.run_demo(out, 0, steps, resume=resume)

    def second(out, steps, resume):
        return demo_llava.run_llava_demo(out, out / "model", 0, steps, resume=resume)

    once, often = tmp_path / "once", tmp_path / "often"
    first(once, 6, False)
    second(once, 6, False)
    for part, run, step in ((first, "siglip", 2), (second, "llava/instruct", 1), (second, "blind/blind", 1)):
        interrupted(run, step)
        with pytest.raises(Stopped):
            part(often, 6, True)
        if part is first:
            page = first(often, 99, True)  # the steps were settled on at the beginning
    second(often, 99, True)
    for part in ("model", "llava/model", "llava/blind/model"):
        assert weights(often / part) == weights(once / part)
    assert page.read_text().count("LLaVA on the same tower") == 1
    spent = json.loads((often / "report.json").read_text())["training"]["seconds"]
    assert spent == pytest.approx(json.loads((often / "plan.json").read_text())["seconds"]["siglip"], abs=0.06)


def test_a_native_demo_that_was_stopped_goes_on(tmp_path, interrupted):
    from intermodal.evaluate.demo_native import run_native_demo

    for run, step in (("vqvae", 1), ("siglip", 1), ("native/fuse", 1)):
        interrupted(run, step)
        with pytest.raises(Stopped):
            run_native_demo(tmp_path, 0, 3, resume=True)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["steps"] == {"vqvae": [3], "siglip": [3], "native": [3]}


@pytest.mark.slow
def test_demo(tmp_path):
    from intermodal.evaluate.demo import run_demo
    from intermodal.evaluate.demo_llava import run_llava_demo

    page = run_demo(tmp_path, 0, steps=3)
    run_llava_demo(tmp_path, tmp_path / "model", 0, steps=6)
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["training"]["steps"] == 3
    assert {"core", "all"} == set(results["sprites"])
    text = page.read_text()
    assert "LLaVA on the same tower" in text
    assert text.count("data:image/png") > 20


@pytest.mark.slow
def test_native_demo(tmp_path):
    from intermodal.evaluate.demo_native import COLUMNS, run_native_demo

    page = run_native_demo(tmp_path, 0, steps=3, count=6, judge_steps=4)
    results = json.loads((tmp_path / "report.json").read_text())
    for name, row in results["judged"].items():
        assert row.keys() == COLUMNS.keys() - ({"place"} if name.endswith("one thing") else set())
        assert all(0 <= value <= 1 for value in row.values())
    assert {"drawn", "real", "random codes"} <= results["judged"].keys()
    assert sum(int(name.split()[2]) for name in results["judged"] if name.startswith("drawn: ")) == 6
    assert results["captions"].keys() == {"exact", "things"}
    assert "In two steps" in page.read_text()


def test_guidance_that_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    told = CliRunner().invoke(app, ["demo-native", "--guidance", "-1", "--out", str(tmp_path / "run")])
    assert told.exit_code == 2
    assert "guidance" in told.output
    assert not (tmp_path / "run").exists()


def test_stages_get_the_steps_that_fit_at_the_speed_of_each(tmp_path, monkeypatch):
    """Half the steps at 10 ms, half at 40 ms that count twice: 45 ms a step on average."""
    from intermodal.train import fit

    recipe = load_recipe(LLAVA_RECIPE)
    align, instruct = (replace(fit.with_steps(stage, 5000), data=replace(stage.data, batch=100)) for stage in recipe.stages)
    tried = []

    def train_stages(short, folder, quiet):
        tried.extend(stage.train.steps for stage in short.stages)
        for number, (stage, speed) in enumerate(zip(short.stages, (10_000, 2_500), strict=True), 1):
            run = folder / f"{number}-{stage.name}"
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text(json.dumps({"samples_per_second": speed}) + "\n")

    monkeypatch.setattr(fit, "train_stages", train_stages)
    clock = iter((100.0, 101.0))  # the trial took a second
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fitted = fit.fit_stages(replace(recipe, stages=(align, instruct)), tmp_path / "trial", 10, costs=(1.0, 2.0))
    assert tried == [fit.LEAST_TRIAL, fit.TRIAL_STEPS]
    assert [stage.train.steps for stage in fitted.stages] == [100, 100]


def test_a_demo_tells_beforehand_of_a_processor_without_bf16(monkeypatch, capsys):
    from intermodal.evaluate import plan

    for able in (True, False):
        monkeypatch.setattr(plan, "multiplies_bf16", lambda device, able=able: able)
        assert plan.told_of_bf16(Console(width=400), "docs/demo.md", "--seconds 770") is able
        assert ("--seconds 770 take as many steps" in capsys.readouterr().out) is not able
