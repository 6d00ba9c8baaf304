"""Stitched against native by measurement: two recipes, the same data, equal training time on the same cores, several seeds.

Each run is a process of its own, so that its peak memory can be read; what is done is kept in the folder, and a comparison that was
stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import IntermodalError
from ..files import read_json, write_whole
from ..train.recipe import StagedRecipe, StitchConfig, VQRecipe
from .logs import logged
from .sides import MEASURES, Entry, Settings, Side, check, claim, entries, eyes_setting, with_eyes_at

EYES_SHARE = 0.35
"""Of a run's time, for eyes that are trained first."""
MODEL_FILES = ("config.json", "open_clip_config.json")
"""A model's folder has one of them: of transformers' layout, or of open_clip's, which holds a CLIP with the sigmoid loss."""


def compare(
    first: Side,
    second: Side,
    out: Path,
    settings: Settings,
    *,
    stitched_eyes: Path | None = None,
    native_eyes: Path | None = None,
    tiny: bool = False,
    console: Console | None = None,
) -> Path:
    """Train and measure both sides with every seed, and write `report.html`, `report.md` and `report.json`; returns the page's path.

    Args:
        stitched_eyes: recipe of the tower where `model.vision` is "eyes"; None takes recipes/compare_siglip.py.
        native_eyes: recipe of the VQ-VAE where `model.vq` is "eyes"; None takes recipes/compare_vqvae.py.

    Raises:
        IntermodalError: a recipe cannot be trained or compared, which is looked for before the first run, or `out` holds another
            comparison.
        SettingError: an override that does not fit its recipe.
    """
    console, sides = console or Console(), (first, second)
    both = entries(sides, {"stitched": stitched_eyes, "native": native_eyes}, tiny)
    claim(out, both, settings)
    runs = [(entry, seed, _folder(out, entry.name, seed)) for seed in range(settings.seeds) for entry in both]
    missing = [(entry, seed, folder) for entry, seed, folder in runs if not (folder / "result.json").exists()]
    if missing:
        _alone(_check, both, settings)
    for entry, seed, folder in missing:
        console.print(f"{entry.name}, seed {seed} ...")
        began = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: it would have to be measured in one piece
        _alone(_run, entry, seed, folder, settings)
        console.print(f"  {time.perf_counter() - began:.0f} s: {_line(json.loads((folder / 'result.json').read_text()))}")
    results: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in both}
    for entry, seed, folder in runs:
        if read_json(folder / "result.json").get("measures") != MEASURES:
            console.print(f"{entry.name}, seed {seed}: measured by another version; measuring it again ...")
            _alone(_measure_again, folder, settings)
        results[entry.name].append(read_json(folder / "result.json"))
    _judge_drawings(results, out, settings, console)
    from .report import write

    return write(out, results, settings, [side.overrides for side in sides])


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-seed{seed}"


def _alone(function, *arguments: Any) -> None:
    """Run in a fresh process; an error there is raised here, and the process ends when this one does.

    Raises:
        IntermodalError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (os.getpid(),)) as pool:
            pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise IntermodalError(
            "a run's process was killed, perhaps for want of memory; the same command goes on with the runs that are missing"
        ) from None


def _begin(parent: int) -> None:
    """What a run has to tell goes to stderr: with --json a program reads stdout.

    A killed process can end nobody: its child looks for it once a second, or it would train on for no one.
    """
    sys.stdout = sys.stderr

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check(both: Sequence[Entry], settings: Settings) -> None:
    for entry in both:
        check(entry, settings)


def _line(result: Mapping[str, Any]) -> str:
    asked = ", ".join(f"{kind} {value:.0%}" for kind, value in result["questions"].items())
    return f"{result['steps']} steps; {asked}; captions {result['captions']['exact']:.0%}"


def _run(entry: Entry, seed: int, folder: Path, settings: Settings) -> None:
    """Train one side with one seed and measure it; everything goes to `folder`/result.json."""
    import torch

    from ..train.fit import fit_stages, with_stage_steps
    from ..train.stages import train_stages
    from . import measure

    began = time.perf_counter()
    recipe, eyes_steps = _with_eyes(entry, _seeded(entry.recipe, seed), seed, folder, settings)
    longest = sum(stage.train.steps for stage in recipe.stages)
    if settings.steps is None:
        recipe = fit_stages(recipe, folder / "trial", settings.seconds - (time.perf_counter() - began))
    else:
        recipe = with_stage_steps(recipe, [settings.steps] * len(recipe.stages))
    model = train_stages(recipe, folder / "model", quiet=True)
    took, peak = time.perf_counter() - began, _peak_megabytes()
    steps = sum(stage.train.steps for stage in recipe.stages)
    result = {
        "measures": MEASURES,
        "family": model.family,
        "seed": seed,
        "seconds": took,
        "threads": torch.get_num_threads(),
        "began_with": _began_with(entry),
        "eyes_steps": eyes_steps,
        "steps": steps,
        "out_of_steps": settings.steps is None and steps >= longest,
        "conversations": sum(stage.train.steps * stage.data.batch for stage in recipe.stages),
        "peak_megabytes": peak,
        **logged(recipe, folder / "model"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "decoder_parameters": sum(p.numel() for p in model.model.parameters()),
        **measure.reading(model, recipe, settings, folder),
    }
    result["seconds_with_measuring"] = time.perf_counter() - began
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")


def _measure_again(folder: Path, settings: Settings) -> None:
    """Measure a trained run with this version, by the recipe that it was trained with; what was timed while it trained stays.

    Raises:
        IntermodalError: the run's recipe or its model is no longer there.
    """
    import torch

    from ..config import from_dict
    from ..models.generative import Generative
    from ..weights.load import load
    from . import measure

    trained, before = folder / "model", read_json(folder / "result.json")
    if not (trained / "recipe.json").exists() or not (trained / "model").exists():
        raise IntermodalError(
            f"{folder / 'result.json'} was measured by another version of the project, and {trained} is gone, so that it cannot be "
            f"measured again: remove {folder} to train it anew, or give another --out"
        )
    recipe, model = from_dict(StagedRecipe, read_json(trained / "recipe.json")), load(trained / "model")
    assert isinstance(model, Generative)
    torch.set_num_threads(before["threads"])
    result = {**before, "measures": MEASURES, **logged(recipe, trained), **measure.reading(model, recipe, settings, folder)}
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")


def _peak_megabytes() -> float:
    """Most memory that this process has held, without its data workers.

    Not getrusage where there is another way: Linux counts into it what the parent held when this process began.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _began_with(entry: Entry) -> list[str]:
    """Settings of the model that name trained weights, `model.vision=runs/a/model`: the time that those took is not in the comparison."""
    model = entry.recipe.model
    if model.start is not None:
        return [f"model.start={model.start}"]
    name, where = eyes_setting(model)
    own = {} if entry.eyes is not None else {name: where}
    own |= {"language": model.language} if isinstance(model, StitchConfig) and model.language is not None else {}
    return [f"model.{part}={value}" for part, value in own.items()]


def _seeded(recipe: StagedRecipe, seed: int) -> StagedRecipe:
    """Another order of the data, other draws of scenes, other starting weights."""
    stages = tuple(
        replace(stage, data=replace(stage.data, seed=seed), train=replace(stage.train, seed=seed)) for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


def _with_eyes(entry: Entry, recipe: StagedRecipe, seed: int, folder: Path, settings: Settings) -> tuple[StagedRecipe, int]:
    """The recipe with its tower or VQ-VAE trained, where it asks for that, and for how many steps."""
    from ..train.contrastive import train
    from ..train.fit import fit, with_steps
    from ..train.vqvae import train_vqvae

    eyes = entry.eyes
    if eyes is None:
        return recipe, 0
    eyes = replace(eyes, data=replace(eyes.data, seed=seed), train=replace(eyes.train, seed=seed))
    if settings.steps is None:
        eyes = fit(eyes, folder / "eyes-trial", settings.seconds * EYES_SHARE)  # pyright: ignore[reportArgumentType]
    else:
        eyes = with_steps(eyes, settings.steps)
    if isinstance(eyes, VQRecipe):
        train_vqvae(eyes, folder / "eyes", quiet=True)
    else:
        train(eyes, folder / "eyes", quiet=True)
    return with_eyes_at(recipe, folder / "eyes" / "model"), eyes.train.steps


def _judge_drawings(results: dict[str, list[dict[str, Any]]], out: Path, settings: Settings, console: Console) -> None:
    """Score what was drawn, once all runs are done: by a classifier of real scenes, and by a CLIP or SigLIP of the comparison, if there
    is one."""
    folders = [_folder(out, name, row["seed"]) for name, rows in results.items() for row in rows]
    drew = [folder / "drawn" for folder in folders if (folder / "drawn").exists()]
    if not drew:
        return
    eyes = [folder / "eyes" / "model" for folder in folders]
    if not all((folder / "scores.json").exists() for folder in drew):
        console.print("judging what was drawn ...")
        _alone(_judge, drew, [str(model) for model in eyes if any((model / name).exists() for name in MODEL_FILES)], settings)
    for name, rows in results.items():
        for row in rows:
            file = _folder(out, name, row["seed"]) / "drawn" / "scores.json"
            row["drawn"] = json.loads(file.read_text()) if file.exists() else None


def _judge(folders: list[Path], models: list[str], settings: Settings) -> None:
    from . import measure

    measure.judge_drawings(folders, models, settings.judge_steps)
