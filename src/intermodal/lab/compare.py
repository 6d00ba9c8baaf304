"""Stitched against native by measurement: two recipes, the same data, equal training time on the same cores, several seeds.

Each run is a process of its own, so that its peak memory can be read; what is done is kept in the folder, and a comparison that was
stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import override
from ..errors import IntermodalError
from ..train.recipe import NativeConfig, StagedRecipe, StitchConfig, load_recipe

EYES = "eyes"
"""As `model.vision` or `model.vq`: trained first, from the comparison's recipe for it, within the run's time."""
EYES_SHARE = 0.35
RECIPES = Path(__file__).parents[3] / "recipes"
SPIKE = 1.3
"""A logged loss this many times the median of the ten before it counts as a spike."""


@dataclass(frozen=True)
class Settings:
    seconds: float = 300.0
    """Training time of a run: eyes and decoder together."""
    seeds: int = 3
    questions: int = 60
    """Of each kind, and as many captions."""
    signs: int = 40
    """Of each height."""
    heights: tuple[int, ...] = (8, 10, 12, 14, 17, 20)
    """Font sizes in pixels of the signs that are to be read."""
    drawn: int = 48
    """Held-out captions that a model which draws is to draw."""
    judge_steps: int = 500
    steps: int | None = None
    """Train eyes and decoder exactly this many steps instead of fitting them to `seconds`."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a recipe file with stages, and settings of it by dotted path (`stages.fuse.optim.lr=1e-3`)."""

    recipe: Path
    overrides: tuple[str, ...] = ()

    def load(self, tiny: bool) -> StagedRecipe:
        """Raises IntermodalError: the recipe has no stages of conversations. Raises SettingError: an override that does not fit."""
        made = load_recipe(self.recipe, tiny=tiny)
        if not isinstance(made, StagedRecipe):
            raise IntermodalError(
                f"{self.recipe} is a {type(made).__name__}; only recipes with stages can be compared by what they answer"
            )
        return override(made, self.overrides)


def compare(
    first: Side,
    second: Side,
    out: Path,
    settings: Settings,
    *,
    stitched_eyes: str | Path = RECIPES / "compare_siglip.py",
    native_eyes: str | Path = RECIPES / "compare_vqvae.py",
    tiny: bool = False,
    console: Console | None = None,
) -> Path:
    """Train and measure both sides with every seed, and write `report.html`, `report.md` and `report.json`; returns the page's path.

    Raises:
        IntermodalError: a recipe has no stages of conversations, or `out` holds another comparison.
        SettingError: an override that does not fit its recipe.
    """
    console = console or Console()
    sides = (first, second)
    names = [side.load(tiny).name for side in sides]
    if names[0] == names[1]:
        names = [f"{names[0]}-{number}" for number in (1, 2)]
    asked = {
        "recipes": [str(side.recipe) for side in sides],
        "overrides": [side.overrides for side in sides],
        "eyes": [str(stitched_eyes), str(native_eyes)],
        "tiny": tiny,
    }
    _claim(out, asked | asdict(settings))
    eyes = {"stitched": str(stitched_eyes), "native": str(native_eyes)}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(settings.seeds):
        for name, side in zip(names, sides, strict=True):
            folder = out / f"{name}-seed{seed}"
            if not (folder / "result.json").exists():
                console.print(f"{name}, seed {seed} ...")
                began = time.perf_counter()
                _alone(_run, side, eyes, seed, folder, settings, tiny)
                console.print(f"  {time.perf_counter() - began:.0f} s: {_line(json.loads((folder / 'result.json').read_text()))}")
            results[name].append(json.loads((folder / "result.json").read_text()))
    _judge_drawings(results, out, settings, console)
    from .report import write

    return write(out, results, settings, [side.overrides for side in sides])


def _claim(out: Path, asked: dict[str, Any]) -> None:
    file = out / "settings.json"
    asked = json.loads(json.dumps(asked))
    if file.exists() and json.loads(file.read_text()) != asked:
        raise IntermodalError(f"{out} holds another comparison (its settings.json says which); give another --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asked, indent=2) + "\n")


def _alone(function, *arguments: Any) -> None:
    """Run in a fresh process; an error there is raised here, and the process ends when this one does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        pool.submit(function, *arguments).result()


def _end_with(parent: int) -> None:
    """A killed process can end nobody: its child looks for it once a second, or it would train on for no one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _line(result: dict[str, Any]) -> str:
    asked = ", ".join(f"{kind} {value:.0%}" for kind, value in result["questions"].items())
    return f"{result['steps']} steps; {asked}; captions {result['captions']['exact']:.0%}"


def _run(side: Side, eyes: dict[str, str], seed: int, folder: Path, settings: Settings, tiny: bool) -> None:
    """Train one recipe with one seed and measure it; everything goes to `folder`/result.json."""
    import torch

    from ..train.fit import fit_stages, with_stage_steps
    from ..train.stages import train_stages
    from . import measure

    recipe = _seeded(side.load(tiny), seed)
    began = time.perf_counter()
    recipe, eyes_steps = _with_eyes(recipe, eyes, seed, folder, settings, tiny)
    left = settings.seconds - (time.perf_counter() - began)
    if settings.steps is None:
        recipe = fit_stages(recipe, folder / "trial", left)
    else:
        recipe = with_stage_steps(recipe, [settings.steps] * len(recipe.stages))
    model = train_stages(recipe, folder / "model", quiet=True)
    took, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logs = [
        json.loads(line)
        for number, stage in enumerate(recipe.stages, 1)
        for line in (folder / "model" / f"{number}-{stage.name}" / "metrics.jsonl").read_text().splitlines()
    ]
    result = {
        "family": model.family,
        "seed": seed,
        "seconds": took,
        "threads": torch.get_num_threads(),
        "eyes_steps": eyes_steps,
        "steps": sum(stage.train.steps for stage in recipe.stages),
        "conversations": sum(stage.train.steps * stage.data.batch for stage in recipe.stages),
        "tokens_per_second": statistics.median(
            row["samples_per_second"] * row["tokens"] / recipe.stages[-1].data.batch for row in logs
        ),
        "peak_megabytes": peak / 1024,
        "curve": [{key: row.get(key) for key in ("step", "loss", "score_norm", "highest_score", "gradient_norm")} for row in logs],
        "loss_spikes": spikes([row["loss"] for row in logs]),
        "highest_score": max(row.get("highest_score", 0.0) for row in logs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "decoder_parameters": sum(p.numel() for p in model.model.parameters()),
        **measure.reading(model, recipe, settings, folder),
    }
    result["seconds_with_measuring"] = time.perf_counter() - began
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def _seeded(recipe: StagedRecipe, seed: int) -> StagedRecipe:
    """Another order of the data, other draws of scenes, other starting weights."""
    stages = tuple(
        replace(stage, data=replace(stage.data, seed=seed), train=replace(stage.train, seed=seed)) for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


def _with_eyes(
    recipe: StagedRecipe, eyes: dict[str, str], seed: int, folder: Path, settings: Settings, tiny: bool
) -> tuple[StagedRecipe, int]:
    """The recipe with its tower or VQ-VAE trained, where it asks for that, and for how many steps."""
    from ..train.contrastive import train
    from ..train.fit import fit, with_steps
    from ..train.vqvae import train_vqvae

    model = recipe.model
    native = isinstance(model, NativeConfig)
    if model.start is not None or (model.vq if isinstance(model, NativeConfig) else model.vision) != EYES:
        return recipe, 0
    made = load_recipe(eyes["native" if native else "stitched"], tiny=tiny)
    made = replace(made, data=replace(made.data, seed=seed), train=replace(made.train, seed=seed))
    if settings.steps is None:
        made = fit(made, folder / "eyes-trial", settings.seconds * EYES_SHARE)
    else:
        made = with_steps(made, settings.steps)
    (train_vqvae if native else train)(made, folder / "eyes", quiet=True)
    where = str(folder / "eyes" / "model")
    chosen = replace(model, vq=where) if isinstance(model, NativeConfig) else replace(model, vision=where)
    assert isinstance(chosen, NativeConfig | StitchConfig)
    return replace(recipe, model=chosen), made.train.steps


def spikes(losses: Sequence[float]) -> int:
    """How many losses stand out from the ten before them."""
    return sum(loss > SPIKE * statistics.median(losses[at - 10 : at]) for at, loss in enumerate(losses) if at >= 10)


def _judge_drawings(results: dict[str, list[dict[str, Any]]], out: Path, settings: Settings, console: Console) -> None:
    """Score what was drawn, once all runs are done: by a classifier of real scenes and by a SigLIP of the comparison, if there is one."""
    drew = [
        folder for name, rows in results.items() for row in rows if (folder := out / f"{name}-seed{row['seed']}" / "drawn").exists()
    ]
    if not drew:
        return
    towers = sorted(out.glob("*/eyes/model/config.json"))
    if not all((folder / "scores.json").exists() for folder in drew):
        console.print("judging what was drawn ...")
        _alone(_judge, drew, [str(file.parent) for file in towers], settings)
    for rows_name, rows in results.items():
        for row in rows:
            file = out / f"{rows_name}-seed{row['seed']}" / "drawn" / "scores.json"
            row["drawn"] = json.loads(file.read_text()) if file.exists() else None


def _judge(folders: list[Path], models: list[str], settings: Settings) -> None:
    from . import measure

    measure.judge_drawings(folders, models, settings.judge_steps)
