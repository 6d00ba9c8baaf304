"""Sharded checkpoints of a run (torch.distributed.checkpoint), readable on another number of ranks."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..errors import CheckpointError
from ..files import read_json
from .setup import World

META = "meta.json"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    world: World,
    model: nn.Module,
    optimizer,
    average: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    data: dict[str, Any],
    keep: int,
) -> Path:
    """Write step `step`; the folder appears under its name only when it is whole. Older ones beyond `keep` are removed.

    Args:
        meta: the same on every rank.
        data: where this rank is in the data: on streams every rank is somewhere else.
    """
    final = folder_of(run, step)
    partial = final.with_name(final.name + ".partial")
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait(world)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    if average is not None:
        state["average"] = average
    with _no_single_process_warning():
        dcp.save(state, checkpoint_id=str(partial), no_dist=world.size == 1)
    torch.save(_random_state(), partial / f"random-{world.rank}.pt")
    (partial / f"data-{world.rank}.json").write_text(json.dumps(data))
    if world.main:
        (partial / META).write_text(json.dumps({**meta, "step": step, "ranks": world.size}))
    _wait(world)
    if world.main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(final.parent.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    _wait(world)
    return final


def whole(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    return [file.parent for file in sorted((run / "checkpoints").glob(f"step-????????/{META}"))]


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = whole(run)
    return found[-1] if found else None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def remove(folder: Path, world: World) -> None:
    """Remove a checkpoint, once no rank is at it any more."""
    _wait(world)
    if world.main:
        shutil.rmtree(folder)
    _wait(world)


def read_meta(folder: Path) -> dict[str, Any]:
    """What `save` was told of the run, with its `step` and number of `ranks`.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    if not (folder / META).exists():
        raise CheckpointError(f"{folder} is not a checkpoint of a run (no {META})")
    meta = read_json(folder / META)
    if not {"step", "ranks", "recipe"} <= meta.keys():
        raise CheckpointError(f"{folder / META} is not a run's: it lacks its step, ranks or recipe")
    return meta


def restore(folder: Path, world: World, model: nn.Module, optimizer, average: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Load weights, optimizer and (on the same number of ranks) random state in place; returns the meta data, with
    `data` of every rank that wrote it.

    Raises:
        CheckpointError: the checkpoint is not whole, or is of another model.
    """
    meta = read_meta(folder)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    if average is not None:
        state["average"] = average
    try:
        # what had no gradient yet (a projector that met no picture) has no moments in the file, and must have none afterwards
        saved = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        waiting: dict[str, Any] = moments["state"]  # pyright: ignore[reportAssignmentType]
        unused = [name for name in waiting if f"optimizer.state.{name}.exp_avg" not in saved]
        state["optimizer"] = {**moments, "state": {name: value for name, value in waiting.items() if name not in unused}}
        with _no_single_process_warning():
            dcp.load(state, checkpoint_id=str(folder), no_dist=world.size == 1)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=StateDictOptions(strict=True))
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception, but a BaseException
        raise CheckpointError(
            f"{folder} does not fit this run: its files are damaged, or the model or optimizer is another than the run began with: "
            f"{_cause(error)}"
        ) from error
    parameters = dict(model.named_parameters())
    for name in unused:
        optimizer.state.pop(parameters[name], None)
    if meta["ranks"] == world.size:
        _set_random_state(_read_random_state(folder / f"random-{world.rank}.pt"))
    return {**meta, "data": [read_json(folder / f"data-{rank}.json") for rank in range(meta["ranks"])]}


def _cause(error: BaseException) -> str:
    """The first rank's own error in one line: DCP's words for it are the tracebacks of all ranks."""
    inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) and error.failures else error
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:300]}"


@contextmanager
def _no_single_process_warning():
    """DCP warns that a single process is a single process; it is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _read_random_state(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch raises OSError, RuntimeError, EOFError or UnpicklingError for a file that is not whole
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _wait(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()
