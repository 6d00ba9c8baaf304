"""What may be another setting when a run goes on, and what may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import flat, to_dict
from ..errors import IntermodalError
from ..files import read_json, write_whole
from .recipe import StagedRecipe


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


def keep_staged(recipe: StagedRecipe, run: Path, *, resume: bool, write: bool) -> None:
    """Keep a run of stages' whole recipe in `run`/recipe.json; each stage keeps its own settings beside its checkpoints.

    Args:
        write: this is the rank that writes. Every rank reads.

    Raises:
        IntermodalError: a resumed run began with another model, whose settings nobody would read any more. Only `model.start` may have
            been moved.
    """
    file = run / "recipe.json"
    if resume and file.exists():
        before = read_json(file)["model"]
        moved = recipe.model.start is not None and before.get("start") is not None
        known = flat(before).keys() - ({"start"} if moved else set())
        changed = [f"model.{change}" for name, change in changes(before, recipe.model).items() if name in known]
        if changed:
            raise IntermodalError(
                f"{run} cannot go on with {'; '.join(changed)}: resume it as it began, or begin another run (another --out)"
            )
    if write:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(to_dict(recipe), indent=2) + "\n")  # other ranks may be reading it
