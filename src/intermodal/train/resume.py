"""What may be another setting when a run goes on, and what may not."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..config import flat, to_dict
from ..errors import IntermodalError
from ..files import read_json, write_whole
from ..parallel import checkpoint
from .model_folder import is_done
from .recipe import Stage, StagedRecipe

UNDECISIVE = {
    "data.workers",
    "data.prefetch",
    "data.max_reject_share",
    "train.threads",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.checkpoint_activations",
    "train.parallel",
    "train.rollback",
    "cache_tower",
}
"""Settings of a stage that may be others once it is done: they say how the machine went about it, or when it would have given up. Some
decide roundings, but a run may go on where there are other processors."""


COMING_OR_GOING = ("optim.ema", "codebook.ema", "start")
"""Settings of which it matters whether there is one: kept averages (their decay may be another), and the model that a VQ-VAE begins with
(its folder may have been moved)."""


def changes(before: dict[str, Any], recipe: Any) -> dict[str, str]:
    """Settings that are others than before, those that came or went among them, by dotted path, each as "path then -> now". One that the
    run knew nothing of, being older, had its default.

    Args:
        before: `to_dict` of the recipe that the checkpoint was written with.
    """
    return {path: f"{path} {then} -> {now}" for path, then, now in _differing(before, recipe)}


def _differing(before: dict[str, Any], config: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, then, now) of what differs in two trees; where one has a tree and the other has none (adapters), of the whole tree."""
    now = to_dict(config)
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    for name in {**now, **before}:
        then, value = before.get(name, defaults.get(name)), now.get(name)
        inner = getattr(config, name, None)
        if isinstance(then, dict) and dataclasses.is_dataclass(inner):
            yield from _differing(then, inner, f"{path}{name}.")
        elif then != value:
            yield f"{path}{name}", then, value


def _default(field: dataclasses.Field[Any]) -> Any:
    """As `to_dict` has it; None of a setting that has to be given."""
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return to_dict(value) if dataclasses.is_dataclass(value) else json.loads(json.dumps(value))


def refuse_changes(before: dict[str, Any], recipe: Any, fixed: Callable[[str], bool], folder: Path) -> None:
    """Refuse settings that the weights and the optimizer's state of a checkpoint depend on, or that would not be read any more.

    Args:
        before: as in `changes`.
        fixed: whether a setting, by its dotted path, is one of them. Of `COMING_OR_GOING` whether there is one always is.

    Raises:
        IntermodalError: names those that are others now.
    """
    then, now = flat(before), flat(to_dict(recipe))
    came_or_went = {name for name in COMING_OR_GOING if (then.get(name) is None) != (now.get(name) is None)}
    refused = [
        change
        for name, change in changes(before, recipe).items()
        if (name in then or any(known.startswith(f"{name}.") for known in then))  # else it is newer than the run
        and (fixed(name) or name in came_or_went)
    ]
    if refused:
        raise IntermodalError(
            f"{folder} cannot go on with {'; '.join(refused)}: resume it as it began, or begin another run (another --out)"
        )


def stages_done(folders: Sequence[Path]) -> list[Path]:
    """The folders of the stages that need no training any more, from the first stage on.

    Raises:
        IntermodalError: a stage after them has begun already, with another model than will come of those before it.
    """
    done = list(takewhile(is_done, folders))
    begun = [folder for folder in folders[len(done) + 1 :] if is_done(folder) or checkpoint.latest(folder) is not None]
    if begun:
        raise IntermodalError(
            f"{folders[len(done)]} has no model, but what came after it was trained on one: put its model/ back, or remove "
            f"{', '.join(map(str, begun))} and resume, and they are trained anew"
        )
    return done


def staged_record(
    recipe: StagedRecipe, run: Path, folders: Sequence[Path], done: Sequence[Path], tell: Callable[[str], None]
) -> dict[str, Any]:
    """What `run`/recipe.json is to say of a run of stages that goes on: the recipe, but of stages that are done what they were trained
    with. Each stage keeps its own settings beside its checkpoints.

    Args:
        folders: one a stage.
        done: those of the first stages, which will not be trained again.
        tell: takes a line on what is another setting and does not matter.

    Raises:
        IntermodalError: the run began with another model, whose settings nobody would read any more (only `model.start` may have been
            moved); or a stage that is done has other settings now, which would do nothing.
    """
    file = run / "recipe.json"
    if file.exists():
        before = read_json(file)["model"]
        moved = recipe.model.start is not None and before.get("start") is not None
        changed = [f"model.{change}" for name, change in changes(before, recipe.model).items() if not (moved and name == "start")]
        if changed:
            raise IntermodalError(
                f"{run} cannot go on with {'; '.join(changed)}: resume it as it began, or begin another run (another --out)"
            )
    record = to_dict(recipe)
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True)):
        if folder in done and (folder / "recipe.json").exists():
            record["stages"][number] = _as_trained(stage, folder, tell)
    return record


def _as_trained(stage: Stage, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """The settings of a stage that is done. Raises IntermodalError: they are others now, in what decides its weights."""
    trained: dict[str, Any] = read_json(folder / "recipe.json") | {"name": stage.name}  # there the run's name is before it
    changed = {name: change for name, change in changes(trained, stage).items() if name not in UNDECISIVE}
    if "data.train" in changed and _names(trained["data"]["train"]) == _names(stage.data.train):
        tell(f"stage {stage.name} is done; its data have moved: {changed.pop('data.train')}")
    if changed:
        named = "; ".join(f"stages.{stage.name}.{change}" for change in changed.values())
        raise IntermodalError(
            f"stage {stage.name} is done, and {folder / 'model'} was not made with {named}: resume with its settings as they "
            f"were, or begin another run (another --out); one with model.start={folder / 'model'} goes on from what it has learned"
        )
    return trained


def _names(sources: Sequence[str]) -> list[tuple[str, str]]:
    """What kind of source each is, and what it is called wherever it lies; a slash at the end of a folder's name says nothing."""
    kinds = [re.match(r"(?:\w+:)*", source) for source in sources]
    return [
        (kind.group() if kind else "", source.rstrip("/").rpartition("/")[2]) for kind, source in zip(kinds, sources, strict=True)
    ]


def write_record(record: dict[str, Any], run: Path) -> None:
    """Keep what a run of stages is made of."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "recipe.json", json.dumps(record, indent=2) + "\n")  # other ranks may be reading it
