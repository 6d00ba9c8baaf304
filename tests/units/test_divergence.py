"""When a run is said to have diverged, of what it is judged, and how it is told."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from intermodal.config import override
from intermodal.parallel import checkpoint
from intermodal.train.divergence import usual
from intermodal.train.recipe import load_recipe
from intermodal.train.vqvae import PixelFetcher, VQTrainer, train_vqvae

RECIPE = Path(__file__).parents[2] / "recipes" / "vqvae.py"


def recipe_of(*changes):
    made = load_recipe(RECIPE, tiny=True)
    return override(replace(made, held_out=(), train=replace(made.train, threads=1, precision="fp32", log_every=1)), list(changes))


def told(recipe, out, **settings):
    """What a run says on the console."""
    console = Console(file=io.StringIO(), record=True, width=2000)
    train_vqvae(recipe, out, console=console, quiet=True, **settings)
    return console.export_text()


@pytest.mark.parametrize(
    ("recent", "near", "far"),
    [
        ([1.0, 2.0, 2.0, 3.0], 6.0, 6.1),  # a multiple of the median
        ([-0.2, -1.9, -2.1, -2.4], -2.4, 3.0),
        ([-2.0] * 4, 1.9, 2.1),
        ([-0.1, 0.1, 0.3, -0.3], 0.5, 0.7),
        ([0.0] * 4, 0.0, 0.1),
    ],
)
def test_far_is_a_multiple_and_below_zero_a_distance(recent, near, far):
    assert usual(near, recent, 3.0) is None
    assert usual(far, recent, 3.0) == pytest.approx(sorted(recent)[1] / 2 + sorted(recent)[2] / 2)
    assert usual(far, recent[:3], 3.0) is None, "nothing is usual yet"


@pytest.mark.parametrize(
    "changes",
    [
        ("codebook.entropy=1.0", "train.steps=8"),
        # the critic's loss begins at about 1, ten times what the rest has come to
        ("adversarial.weight=0.5", "adversarial.start=90", "adversarial.width=8", "train.log_every=5", "train.steps=100"),
    ],
    ids=["a loss below zero", "a critic that begins"],
)
def test_a_run_that_learns_does_not_go_back(changes, tmp_path):
    recipe = recipe_of("train.rollback=3", "train.save_every=40", "optim.warmup=10", *changes)
    assert "was about" not in told(recipe, tmp_path)
    assert not (tmp_path / "rollbacks.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = json.loads((checkpoint.whole(tmp_path)[-1] / "meta.json").read_text())
    assert judged["recent"] == [row["reconstruction_error"] for row in rows][-20:]
    if "codebook.entropy=1.0" in changes:
        assert rows[-1]["loss"] < 0 < rows[-1]["reconstruction_error"]
    else:
        assert rows[-1]["loss"] > 3 * rows[-4]["loss"]


def test_reconstructions_that_go_wrong_are_told_after_a_collapse_too(tmp_path, monkeypatch):
    """Each alarm once, whichever comes first."""
    step = VQTrainer._train_step

    def exploding(self, fetched, logging):
        values = step(self, fetched, logging)
        return {**values, "reconstruction_error": 1e6} if self.step in (9, 11) else values

    monkeypatch.setattr(VQTrainer, "_train_step", exploding)
    said = told(recipe_of("codebook.alarm=1.1", "train.steps=14"), tmp_path)
    assert said.count("the codebook collapses") == 1
    assert said.count("the reconstruction error is 1000000.000 at step 10, and was about") == 1
    assert said.count("and was about") == 1


def test_a_run_of_an_older_version_is_not_judged_by_its_losses(tmp_path):
    """They were kept without a name, with the critic's part in them: beside reconstruction errors they say nothing."""
    recipe = recipe_of("train.save_every=4", "train.steps=4", "train.rollback=3")
    told(recipe, tmp_path)
    meta = checkpoint.whole(tmp_path)[-1] / "meta.json"
    held = json.loads(meta.read_text())
    del held["judged"], held["counted"]
    meta.write_text(json.dumps({**held, "recent": [1e-9] * 6}))
    assert "was about" not in told(override(recipe, ["train.steps=8"]), tmp_path, resume=True)
    assert not (tmp_path / "rollbacks.jsonl").exists()


def test_names_with_brackets_are_told_as_they_are(tmp_path, monkeypatch):
    fetched, step, broken = PixelFetcher.__getitem__, VQTrainer._train_step, []

    def renamed(self, references):
        batch = fetched(self, references)
        batch.keys = [f"photos/[/b]{key}" for key in batch.keys]
        return batch

    def breaking(self, fetched, logging):
        if self.step == 3 and not broken:
            broken.append(True)
            fetched.pixels[:] = float("nan")
        return step(self, fetched, logging)

    monkeypatch.setattr(PixelFetcher, "__getitem__", renamed)
    monkeypatch.setattr(VQTrainer, "_train_step", breaking)
    said = told(recipe_of("train.rollback=3", "train.save_every=2", "train.steps=4"), tmp_path)
    assert "the loss is nan at step 4; this rank's samples: photos/[/b]" in said
    assert ": back from step 3 to 2, past the data between" in said


def test_a_runs_name_and_settings_may_have_brackets(tmp_path):
    """On the line that a terminal shows, and in what a resume says of other settings."""
    recipe = replace(recipe_of("train.save_every=1", "train.steps=1"), name="[/b]mine")
    console = Console(file=io.StringIO(), record=True, width=400, force_terminal=True)
    train_vqvae(recipe, tmp_path, console=console)
    assert "[/b]mine" in console.export_text()
    other = replace(recipe, name="[/i]other", train=replace(recipe.train, steps=2))
    console = Console(file=io.StringIO(), record=True, width=400)
    train_vqvae(other, tmp_path, console=console, resume=True)
    assert "name [/b]mine -> [/i]other" in console.export_text()
