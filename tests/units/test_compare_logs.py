"""What the comparison reads from logs: spikes that stand out from the noise, and what a run went back from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intermodal.lab import logs
from intermodal.train.metrics import Metrics
from intermodal.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_noise_of_any_size_is_no_spike_and_what_stands_out_of_it_is_one(size, seed):
    noise = np.random.default_rng(seed).normal(2.0, 2.0 * size, 120)
    assert logs.spikes(noise.tolist()) == 0
    assert logs.spikes([*noise[:60], 2.0 + 30 * size, *noise[60:]]) == 1


def test_batches_of_few_tokens_have_hardly_a_spike():
    """The mean of 150 tokens' losses, each with a long tail, through a steady training."""
    draws = np.random.default_rng(0)
    found = [logs.spikes(draws.exponential(1, (118, 150)).mean(1).tolist()) for _ in range(20)]
    assert np.mean(found) < 0.2


def test_losses_in_a_row_are_one_spike():
    calm = np.random.default_rng(0).normal(1.0, 0.05, 20).tolist()
    assert logs.spikes([*calm, 5.0, 6.0, 5.0, *calm, 5.0]) == 2
    assert logs.spikes([1.0] * 20 + [1.04]) == 0  # where nothing varies


def test_what_a_run_went_back_from_is_counted(tmp_path):
    recipe = load_recipe(RECIPES / "native.py")
    recipe = replace(recipe, stages=recipe.stages[:1])
    folder = tmp_path / f"1-{recipe.stages[0].name}"
    folder.mkdir()
    metrics = Metrics(folder)

    def log(first, last, loss, score=1.0):
        for step in range(first, last + 20, 20):
            row = {"loss": loss, "samples_per_second": 1.0, "tokens": 10, "highest_score": score, "score_norm": 2 * score}
            metrics.write(step, row)

    def went_back(came_to, to):
        metrics.back_to(to)
        with (folder / "rollbacks.jsonl").open("a") as file:
            file.write(json.dumps({"from": came_to, "to": to, "why": "the loss"}) + "\n")

    log(20, 1180, 1.0)
    log(1200, 1200, 50.0, score=9.0)
    went_back(1200, 1000)
    log(1020, 1080, 1.0)
    log(1100, 1100, 40.0, score=30.0)
    went_back(1100, 1000)
    log(1020, 1400, 1.0)
    metrics.close()
    found = logs.logged(recipe, tmp_path)
    assert (found["loss_spikes"], found["rollbacks"]) == (2, 2)
    assert (found["highest_score"], found["highest_norm"]) == (30.0, 60.0)
    assert [point["step"] for point in found["curve"]] == list(range(20, 1420, 20))
    assert max(point["loss"] for point in found["curve"]) == 1.0
