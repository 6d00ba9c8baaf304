"""What may be another setting when a run goes on, and what may not."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..config import flat, to_dict
from ..errors import IntermodalError
from ..files import read_json, write_whole
from .recipe import Stage, StagedRecipe

UNDECISIVE = {"data.workers", "data.prefetch", "train.threads", "train.log_every", "train.save_every", "train.keep"}
"""Settings of a stage that may be others once it is done: they say how the machine went about it. `train.threads` decides roundings, but
a run may go on where there are other processors."""


def changes(before: dict[str, Any], recipe: Any) -> dict[str, str]:
    """Settings that are others than before, by dotted path, each as "path then -> now".

    Args:
        before: `to_dict` of the recipe that the checkpoint was written with.
    """
    then, now = flat(before), flat(to_dict(recipe))
    return {name: f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value}


def refuse_changes(before: dict[str, Any], recipe: Any, fixed: Callable[[str], bool], folder: Path) -> None:
    """Refuse settings that the weights and the optimizer's state of a checkpoint depend on, or that would not be read any more.

    Args:
        before: as in `changes`.
        fixed: whether a setting, by its dotted path, is one of them. Whether averages are kept (`optim.ema`) always is; their decay is not.

    Raises:
        IntermodalError: names those that are others now.
    """
    then = flat(before)
    averaged = then.get("optim.ema") is not None, recipe.optim.ema is not None
    refused = [
        change
        for name, change in changes(before, recipe).items()
        if name in then  # else it is newer than the run
        and (fixed(name) or (name == "optim.ema" and averaged[0] != averaged[1]))
    ]
    if refused:
        raise IntermodalError(
            f"{folder} cannot go on with {'; '.join(refused)}: resume it as it began, or begin another run (another --out)"
        )


def staged_record(recipe: StagedRecipe, run: Path, folders: Sequence[Path], done: Collection[Path]) -> dict[str, Any]:
    """What `run`/recipe.json is to say of a run of stages that goes on: the recipe, but of stages that are done what they were trained
    with. Each stage keeps its own settings beside its checkpoints.

    Args:
        folders: one a stage.
        done: those of the stages that will not be trained again.

    Raises:
        IntermodalError: the run began with another model, whose settings nobody would read any more (only `model.start` may have been
            moved); or a stage that is done has other settings now, which would do nothing.
    """
    file = run / "recipe.json"
    if file.exists():
        before = read_json(file)["model"]
        moved = recipe.model.start is not None and before.get("start") is not None
        known = flat(before).keys() - ({"start"} if moved else set())
        changed = [f"model.{change}" for name, change in changes(before, recipe.model).items() if name in known]
        if changed:
            raise IntermodalError(
                f"{run} cannot go on with {'; '.join(changed)}: resume it as it began, or begin another run (another --out)"
            )
    record = to_dict(recipe)
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True)):
        if folder in done and (folder / "recipe.json").exists():
            record["stages"][number] = _as_trained(stage, folder)
    return record


def _as_trained(stage: Stage, folder: Path) -> dict[str, Any]:
    """The settings of a stage that is done. Raises IntermodalError: they are others now, in what decides its weights."""
    trained = read_json(folder / "recipe.json") | {"name": stage.name}  # there the run's name is before it
    known = flat(trained).keys() - UNDECISIVE
    changed = [f"stages.{stage.name}.{change}" for name, change in changes(trained, stage).items() if name in known]
    if changed:
        raise IntermodalError(
            f"stage {stage.name} is done, and {folder / 'model'} was not made with {'; '.join(changed)}: resume with its settings as they "
            f"were, or begin another run (another --out); one with model.start={folder / 'model'} goes on from what it has learned"
        )
    return trained


def write_record(record: dict[str, Any], run: Path) -> None:
    """Keep what a run of stages is made of."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "recipe.json", json.dumps(record, indent=2) + "\n")  # other ranks may be reading it
