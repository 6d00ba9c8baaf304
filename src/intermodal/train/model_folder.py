"""A trained model's folder that is there whole or not at all: in a run of stages, that it is there says that the stage is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.load import save

WEIGHTS = "model*.safetensors*"


def is_done(folder: Path) -> bool:
    """Whether a model has been saved in a stage's folder."""
    return (folder / "model" / "config.json").exists()


def save_model(model: Any, folder: Path) -> None:
    """`weights.load.save` of a model, whole or not at all. To be called by one rank.

    Raises:
        CheckpointError: as `save`, or the folder's place cannot be taken (a mount point).
    """
    _whole(folder, lambda part: save(model, part))


def copy_model(source: Path, folder: Path) -> None:
    """A copy of a model's folder, whole or not at all. To be called by one rank. Raises as `save_model`."""
    _whole(folder, lambda part: shutil.copytree(source, part, dirs_exist_ok=True))


def _whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the folder, then take its place. What else was in it stays in it, but for weights of an earlier model.

    Raises:
        CheckpointError: the folder's place cannot be taken.
    """
    folder = folder.resolve()  # a link stays one: what it leads to is replaced
    part, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    try:
        _remove(part)  # of a process that was killed
        if folder.exists():
            _remove(old)
        # one killed between the two renames has left the folder as `old`: it goes into the new one from there, for under its own name an
        # earlier model would count as this one
        kept = folder if folder.exists() else old
        if kept.exists():
            shutil.copytree(kept, part, ignore=shutil.ignore_patterns(WEIGHTS))
        write(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        _remove(old)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be saved: {error}. It is written as {part.name} beside it and renamed, which cannot be done to a mount "
            f"point, nor in a folder that is not yours: make it a link to a folder within, see that the disk has room, and --resume"
        ) from error


def _remove(path: Path) -> None:
    if path.is_symlink():  # what it leads to is not ours
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
