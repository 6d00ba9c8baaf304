"""A VQ-VAE's run that goes on, and a model that is gone on with: what is refused, what is counted, which side is kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import intermodal
from intermodal.config import override
from intermodal.errors import IntermodalError
from intermodal.models.vqvae import VQVAE, VQConfig, initialise
from intermodal.parallel import checkpoint
from intermodal.train.loop import Stopped
from intermodal.train.recipe import load_recipe
from intermodal.train.vqvae import VQTrainer, at_side, train_vqvae

RECIPE = Path(__file__).parents[2] / "recipes" / "vqvae.py"


def recipe_of(*changes):
    made = load_recipe(RECIPE, tiny=True)
    made = replace(made, held_out=(), train=replace(made.train, steps=2, threads=1, precision="fp32", save_every=1))
    return override(made, list(changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two steps, the second begun from the first's model. Never written into."""
    folder = tmp_path_factory.mktemp("runs")
    train_vqvae(recipe_of(), folder / "fresh", quiet=True)
    train_vqvae(recipe_of(f"start={folder / 'fresh' / 'model'}"), folder / "begun", quiet=True)
    return folder


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        ("fresh", "model.codes=64", "model.codes 32 -> 64"),
        ("fresh", "model.unit_codes=true", "model.unit_codes False -> True"),
        ("fresh", "model.resolution=32", "model.resolution 16 -> 32"),
        ("fresh", "model.beta=0.9", "model.beta 0.25 -> 0.9"),
        ("fresh", "codebook.ema=null", "codebook.ema 0.99 -> None"),
        ("fresh", "start={}/fresh/model", "start None -> {}/fresh/model"),
        ("begun", "start=null", "start {}/fresh/model -> None"),
    ],
)
def test_another_model_is_refused_on_resume(runs, run, change, words):
    begun = () if run == "fresh" else (f"start={runs / 'fresh' / 'model'}",)
    recipe = recipe_of(*begun, change.format(runs), "train.steps=4")
    with pytest.raises(IntermodalError, match="resume it as it began") as caught:
        train_vqvae(recipe, runs / run, resume=True, quiet=True)
    assert f"cannot go on with {words.format(runs, runs)}: " in str(caught.value)


def test_a_run_goes_on_where_the_model_it_began_with_has_moved(runs, tmp_path):
    shutil.copytree(runs / "fresh" / "model", tmp_path / "moved")
    ended = []
    for number, start in enumerate((runs / "fresh" / "model", tmp_path / "moved")):
        shutil.copytree(runs / "begun", tmp_path / str(number))
        changes = f"start={start}", "train.steps=3"
        ended.append(train_vqvae(recipe_of(*changes), tmp_path / str(number), resume=True, quiet=True).state_dict())
    assert all(torch.equal(ended[1][name], value) for name, value in ended[0].items())


def test_how_the_codes_move_may_change_but_not_whether(runs, tmp_path):
    shutil.copytree(runs / "fresh", tmp_path / "run")
    changed = ("codebook.ema=0.9", "codebook.revive=null", "codebook.entropy=0.1", "train.steps=3")
    train_vqvae(recipe_of(*changed), tmp_path / "run", resume=True, quiet=True)
    train_vqvae(recipe_of("codebook.ema=null"), tmp_path / "learned", quiet=True)
    with pytest.raises(IntermodalError, match=r"codebook\.ema None -> 0\.99"):
        train_vqvae(recipe_of("train.steps=3"), tmp_path / "learned", resume=True, quiet=True)


def test_a_stop_between_two_lines_of_the_log_loses_no_count(tmp_path, monkeypatch):
    recipe = recipe_of("train.steps=8", "train.log_every=4", "train.save_every=null", "codebook.revive=2")
    train_vqvae(recipe, tmp_path / "whole", quiet=True)
    step = VQTrainer._train_step

    def stopping(self, fetched, logging):
        values = step(self, fetched, logging)
        if self.step == 5:
            self.asked_to_stop = "test"
        return values

    monkeypatch.setattr(VQTrainer, "_train_step", stopping)
    with pytest.raises(Stopped):
        train_vqvae(recipe, tmp_path / "cut", quiet=True)
    monkeypatch.setattr(VQTrainer, "_train_step", step)
    train_vqvae(recipe, tmp_path / "cut", resume=True, quiet=True)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert logged(tmp_path / "cut")[-1]["revived"] > 0


def logged(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "samples_per_second"} for row in rows]


def test_the_steps_that_a_run_goes_back_from_are_not_counted(tmp_path, monkeypatch):
    step, counted, broken = VQTrainer._train_step, [], []

    def watched(self, fetched, logging):
        if self.step == 4 and not broken:
            broken.append(self.used.sum().item())
            fetched.pixels[:] = float("nan")
        elif broken and not counted:
            counted.append((self.step, self.used.sum().item(), self.revived))
        return step(self, fetched, logging)

    monkeypatch.setattr(VQTrainer, "_train_step", watched)
    train_vqvae(recipe_of("train.rollback=3", "train.save_every=3", "train.steps=6", "train.log_every=9"), tmp_path, quiet=True)
    assert broken[0] > 0
    assert counted == [(3, 0.0, 0)]


def test_a_checkpoint_of_an_older_version_goes_on(runs, tmp_path):
    shutil.copytree(runs / "fresh", tmp_path / "run")
    meta = checkpoint.whole(tmp_path / "run")[-1] / "meta.json"
    held = json.loads(meta.read_text())
    del held["judged"], held["counted"]
    meta.write_text(json.dumps(held))
    train_vqvae(recipe_of("train.steps=3"), tmp_path / "run", resume=True, quiet=True)
    assert logged(tmp_path / "run")[-1]["step"] == 3


def test_the_side_of_the_pictures_is_kept_with_the_model(runs, tmp_path):
    made = train_vqvae(recipe_of(f"start={runs / 'fresh' / 'model'}", "model.resolution=32"), tmp_path, quiet=True)
    again = intermodal.load(tmp_path / "model")
    assert (made.config.resolution, again.config.resolution) == (32, 32)
    assert intermodal.load(runs / "fresh" / "model").config.resolution == 16


def test_attention_stays_at_its_level_when_the_side_changes():
    shape = VQConfig(resolution=16, width=8, groups=4, multipliers=(1, 1), res_blocks=1, latent_channels=4, code_width=3, codes=5)
    shape = replace(shape, attention=(8, 16))
    other = at_side(replace(shape, stem=2, attention=(4,)), 32)
    assert (other.resolution, other.attention) == (32, (8,))
    assert at_side(shape, 64).attention == (32, 64)
    beyond = replace(shape, attention=(8, 16, 64))  # a list made for larger pictures, as files have: of the own side it stays
    assert at_side(beyond, 16) == beyond
    vq = initialise(VQVAE(shape))
    VQVAE(at_side(shape, 32)).load_state_dict(vq.state_dict())


def test_under_averages_the_loss_is_what_is_learned_by(tmp_path, monkeypatch):
    """The codebook's term has no gradient then, and is no part of the numbers; without averages it is."""
    from intermodal.models.vqvae import Quantiser

    given, forward = [], Quantiser.forward

    def watched(self, z):
        out = forward(self, z)
        given.append((out[2].detach().item(), (out[0].detach() - z).square().mean().item()))
        return out

    monkeypatch.setattr(Quantiser, "forward", watched)
    recipe = recipe_of("train.log_every=1", "train.quantisation=2.0", "model.beta=0.5")
    train_vqvae(recipe, tmp_path / "averages", quiet=True)
    for row, (whole, commitment) in zip(logged(tmp_path / "averages"), given, strict=True):
        assert whole == pytest.approx(1.5 * commitment, rel=1e-4)
        assert row["quantisation"] == pytest.approx(0.5 * commitment, rel=1e-4)
        assert row["loss"] == pytest.approx(row["reconstruction_error"] + 2 * row["quantisation"], rel=1e-5)
    given.clear()
    train_vqvae(override(recipe, ["codebook.ema=null"]), tmp_path / "learned", quiet=True)
    assert [row["quantisation"] for row in logged(tmp_path / "learned")] == pytest.approx([whole for whole, _ in given])
