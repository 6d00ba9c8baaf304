"""A trained model's folder that is there whole or not at all: in a run of stages, that it is there says that the stage is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..weights.load import save

WEIGHTS = "model*.safetensors*"


def is_done(folder: Path) -> bool:
    """Whether a model has been saved in a stage's folder."""
    return (folder / "model" / "config.json").exists()


def save_model(model: Any, folder: Path) -> None:
    """`weights.load.save` of a model, whole or not at all. To be called by one rank.

    Raises:
        CheckpointError: as `save`.
    """
    _whole(folder, lambda part: save(model, part))


def copy_model(source: Path, folder: Path) -> None:
    """A copy of a model's folder, whole or not at all. To be called by one rank."""
    _whole(folder, lambda part: shutil.copytree(source, part, dirs_exist_ok=True))


def _whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the folder, then take its place. What else was in it stays in it, but for weights of an earlier model."""
    part, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for left in (part, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns(WEIGHTS))
    write(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
