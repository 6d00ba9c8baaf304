"""CLIP with the sigmoid loss (open_clip's `--siglip`), without open_clip: a bias that is learned, and a layout that keeps it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.config import override
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.losses import sigmoid_loss
from intermodal.train.contrastive import build_model, train
from intermodal.train.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "clip.py"
SIGMOID = ("train.loss=sigmoid", "model.init_bias=-3", "train.threads=1", "train.precision=fp32")


def recipe(*settings):
    return override(load_recipe(RECIPE, tiny=True), [*SIGMOID, *settings])


def run(out, *settings, **options):
    return train(recipe(*settings), out, console=Console(quiet=True), quiet=True, **options)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run's folder, the trained model)"""
    out = tmp_path_factory.mktemp("sigmoid")
    return out, run(out)


def test_a_run_starts_at_scale_ten_and_the_recipes_bias_and_moves_both(trained):
    out, _ = trained
    start = weights(out / "initial")
    assert start["logit_scale"].exp().item() == pytest.approx(10)
    assert start["logit_bias"].item() == -3
    end = weights(out / "model")
    assert end.keys() == start.keys()
    assert all(not torch.equal(end[key], start[key]) for key in start)
    assert end["logit_bias"].item() != -3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["bias"] == pytest.approx(end["logit_bias"].item(), abs=1e-4)


def test_a_run_ends_with_a_folder_that_loads_to_the_same_answers(trained):
    out, model = trained
    assert (out / "model" / "open_clip_config.json").exists()
    assert not (out / "model" / "config.json").exists()
    again = intermodal.load(out / "model")
    texts = ["two dogs left of a cat", "a  red &amp; blue ball"]
    assert torch.equal(again.embed_texts(texts), model.embed_texts(texts))
    assert again.processor.texts.ids(texts) == model.processor.texts.ids(texts)
    assert again.logit_bias.item() == model.logit_bias.item()
    assert (again.config.init_scale, again.config.init_bias) == (pytest.approx(10), -3)


def test_scale_and_bias_have_the_gradients_of_the_sigmoid_loss(trained):
    """The gradients of scale and bias, from the loss written out in float64."""
    out, _ = trained
    model = intermodal.load(out / "initial").train()
    random = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.empty(6, 32).normal_(generator=random), dim=-1) for _ in "ab")
    total, count = sigmoid_loss(image, text, model.logit_scale, model.logit_bias, tile=4)
    (total / count).backward()
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (math.log(10), -3.0))
    logits = image.double() @ text.double().T * scale.exp() + bias
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    (-torch.nn.functional.logsigmoid(signs * logits).sum() / 6).backward()
    assert model.logit_scale.grad.item() == pytest.approx(scale.grad.item(), rel=1e-4)
    assert model.logit_bias.grad.item() == pytest.approx(bias.grad.item(), rel=1e-4)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    """From `initial/`, which is in open_clip's layout: the model and the way texts become tokens are those of the run's start."""
    whole = run(tmp_path / "whole", "train.steps=4")
    run(tmp_path / "parts", "train.steps=4", "train.save_every=2")
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "parts" / "model")
    resumed = run(tmp_path / "parts", "train.steps=4", "train.save_every=2", resume=True)
    for (key, mine), other in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, other), key


def test_a_resumed_run_reads_texts_as_the_first(trained):
    out, model = trained
    texts = ["Tom &amp; Jerry", "a   dog", "a\ndog", "ÄÖ"]
    assert intermodal.load(out / "initial").processor.texts.ids(texts) == model.processor.texts.ids(texts)


def test_a_softmax_clip_gets_a_bias_and_a_new_scale_where_it_goes_on_with_sigmoid(trained, tmp_path):
    softmax = run(tmp_path / "softmax", "train.loss=softmax")
    assert softmax.logit_bias is None
    start = f'model.start="{tmp_path / "softmax" / "model"}"'
    model = build_model(recipe(start).model, list, "sigmoid")
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -3
    went_on = run(tmp_path / "on", start)
    assert torch.equal(intermodal.load(tmp_path / "on" / "model").logit_bias, went_on.logit_bias.detach())
    assert went_on.logit_bias.item() != -3
    kept = f'model.start="{trained[0] / "model"}"'  # which has a scale and a bias: they go on from where they are
    assert build_model(recipe(kept).model, list, "sigmoid").logit_bias.item() == trained[1].logit_bias.item()


def test_gradient_caching_takes_the_same_step(trained, tmp_path):
    parts = run(tmp_path / "parts", "train.micro_batch=3")
    for (key, mine), other in zip(parts.state_dict().items(), trained[1].state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-4, msg=lambda m, n=key: f"{n}: {m}")


def test_transformers_layout_is_refused_before_anything_is_written(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"logit_bias.*layout='open_clip'"):
        intermodal.save(trained[1], tmp_path / "hf", layout="hf")
    assert not list((tmp_path / "hf").iterdir())
    done = CliRunner().invoke(app, ["convert", str(trained[0] / "model"), str(tmp_path / "hf")])
    assert isinstance(done.exception, CheckpointError)
    done = CliRunner().invoke(app, ["convert", str(trained[0] / "model"), str(tmp_path / "again"), "--layout", "open_clip"])
    assert done.exit_code == 0, done.output
    before, after = weights(trained[0] / "model"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_clip_without_a_bias_is_saved_for_transformers_as_before(trained, tmp_path):
    plain = build_model(recipe().model, lambda: ["a dog"])
    assert plain.logit_bias is None
    assert "logit_bias" not in plain.state_dict()
    assert (intermodal.save(plain, tmp_path) / "config.json").exists()


def test_what_open_clips_config_cannot_say_is_refused_before_training(tmp_path):
    """Its towers have one activation for both, and no tanh."""
    made = recipe()
    vision = replace(made.model.vision, activation="gelu_pytorch_tanh")
    with pytest.raises(IntermodalError, match="activations"):
        build_model(replace(made.model, vision=vision), lambda: ["a dog"], "sigmoid")


def test_a_start_without_a_tokenizer_is_refused_by_name(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(IntermodalError, match="bare came without tokenizer files"):
        build_model(recipe(f'model.start="{folder}"').model, list, "sigmoid")


def test_the_verb_trains_it_and_says_which_layout_it_is_in(tmp_path):
    done = CliRunner().invoke(app, ["train", str(RECIPE), "--tiny", *SIGMOID, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "in open_clip's layout" in done.output.replace("\n", " ")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "run" / "model"), "scenes:core", "--count", "20", "--json"])
    assert done.exit_code == 0, done.output
