"""How many steps fit into a time here: short trials, so that a schedule is as long as its run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .contrastive import train
from .recipe import Recipe, StagedRecipe, VQRecipe
from .stages import train_stages
from .vqvae import train_vqvae

TRIAL_STEPS, TRIAL_SAMPLES, LEAST_TRIAL = 24, 3072, 8
"""A trial's steps; fewer where a step is large, so that the trial does not eat the time it measures."""
LEAST_STEPS = 10
R = TypeVar("R", Recipe, VQRecipe)


def fit(recipe: R, folder: Path, seconds: float) -> R:
    """The recipe with as many steps as fit into what a trial in `folder` leaves of `seconds`; never more than it had."""
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of a trial that was stopped
    run = train_vqvae if isinstance(recipe, VQRecipe) else train
    run(_short(recipe), folder, quiet=True)  # pyright: ignore[reportArgumentType]
    per_step = recipe.data.batch / _speed(folder / "metrics.jsonl")
    shutil.rmtree(folder)
    steps = max(LEAST_STEPS, int((seconds - (time.perf_counter() - began)) / per_step))
    return with_steps(recipe, min(steps, recipe.train.steps))


def fit_stages(recipe: StagedRecipe, folder: Path, seconds: float, *, costs: Sequence[float] | None = None) -> StagedRecipe:
    """The same for a recipe of stages, which keep their shares of the steps; a short trial of each tells what its steps take.

    Args:
        costs: of each stage, what a step costs with all that comes beside it, as a multiple of its own time (a twin trained as long: 2).
    """
    began, last = time.perf_counter(), len(recipe.stages) - 1
    shutil.rmtree(folder, ignore_errors=True)
    trials = tuple(_short(stage, TRIAL_STEPS if number == last else LEAST_TRIAL) for number, stage in enumerate(recipe.stages))
    train_stages(replace(recipe, stages=trials), folder, quiet=True)
    wanted, per_step = sum(stage.train.steps for stage in recipe.stages), 0.0
    for number, (stage, cost) in enumerate(zip(recipe.stages, costs or [1.0] * len(trials), strict=True), 1):
        its_own = stage.data.batch / _speed(folder / f"{number}-{stage.name}" / "metrics.jsonl")
        per_step += its_own * cost * stage.train.steps / wanted
    shutil.rmtree(folder)
    steps = min(wanted, max(LEAST_STEPS, int((seconds - (time.perf_counter() - began)) / per_step)))
    return with_stage_steps(recipe, [max(2, round(steps * stage.train.steps / wanted)) for stage in recipe.stages])


def with_steps(recipe: Any, steps: int) -> Any:
    return replace(recipe, train=replace(recipe.train, steps=steps))


def with_stage_steps(recipe: StagedRecipe, steps: Sequence[int]) -> StagedRecipe:
    return replace(recipe, stages=tuple(with_steps(stage, count) for stage, count in zip(recipe.stages, steps, strict=True)))


def _short(recipe: Any, most: int = TRIAL_STEPS) -> Any:
    steps = max(LEAST_TRIAL, min(most, TRIAL_SAMPLES // recipe.data.batch))
    loop = replace(recipe.train, steps=steps, log_every=max(1, steps // 2), save_every=None)
    return replace(recipe, train=loop)


def _speed(metrics: Path) -> float:
    """Samples a second of the trial's second half."""
    return json.loads(metrics.read_text().splitlines()[-1])["samples_per_second"]
