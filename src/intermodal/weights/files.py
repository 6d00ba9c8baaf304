"""Checkpoint files on disk: single and sharded safetensors, torch pickles, and their errors in words."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json
from .cut import lost_from_safetensors, lost_from_torch

SHARD_BYTES = 5_000_000_000
STEMS = ("model", "pytorch_model")
INDEX = ".index.json"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """One file, memory-mapped.

    Raises:
        CheckpointError: no such file, or a damaged one; of one that was cut short the message says which tensors are lost.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        lost = lost_from_safetensors(path) if path.is_file() else ""
        reason = f" and was cut short: {lost}" if lost else f": {error}"
        raise CheckpointError(f"{path} is not a readable safetensors file{reason}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A torch state dict, loaded with `weights_only` so that it cannot run code; a `state_dict` entry is unwrapped.

    Raises:
        CheckpointError: as `read_safetensors`; or it holds something else than tensors by name; or objects that may run code, and
            the line that keeps the weights alone.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... on a damaged file
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors, {foreign[1]} the first, which are not loaded, for they may run code. Keep "
                f'the weights alone, in the environment that made it: `torch.save({{"state_dict": torch.load("{path.name}", '
                f'weights_only=False)["state_dict"]}}, "{path.name}")`'
            ) from error
        lost = lost_from_torch(path) if path.is_file() and not zipfile.is_zipfile(path) else ""
        # what torch says of a file that is no pickle of its own advises to run it
        kind = "it is damaged, or a file of another kind" if "weights_only" in str(error) else f"{type(error).__name__}: {error}"
        reason = f" and was cut short: {lost}" if lost else f": {kind}"
        raise CheckpointError(f"{path} is not a readable torch checkpoint{reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise CheckpointError(f"{path} holds no state dict: it should be tensors by name, alone or as its `state_dict`")
    return {key.removeprefix("module."): value for key, value in state.items()}


def weights_file(names: Iterable[str], stems: tuple[str, ...] = STEMS) -> str | None:
    """Which of a directory's files its weights are read from, or begin at: `<stem>.safetensors`, the index of its sharded form, then the
    `.bin` forms; of several stems the first that there is."""
    present = set(names)
    for stem in stems:
        for suffix in (".safetensors", ".bin"):
            for name in (f"{stem}{suffix}", f"{stem}{suffix}{INDEX}"):
                if name in present:
                    return name
    return None


def read_weights(folder: Path, stems: tuple[str, ...] = STEMS) -> dict[str, Tensor]:
    """All tensors of a directory, by `weights_file`.

    Raises:
        CheckpointError: no weights, a shard named by the index is missing, or a key the index names is not in its shard.
    """
    name = weights_file((file.name for file in folder.iterdir()), stems)
    if name is None:
        names = ", ".join(f"{stem}.safetensors" for stem in stems)
        raise CheckpointError(f"{folder} holds no weights: looked for {names}, their sharded forms and .bin")
    read = read_pickle if name.removesuffix(INDEX).endswith(".bin") else read_safetensors
    return _read_shards(folder / name, read) if name.endswith(INDEX) else read(folder / name)


def shards_of(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        CheckpointError: it is not an index.
    """
    return sorted(set(_places(index).values()))


def _places(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors and their files")
    return places


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    folder, places = index.parent, _places(index)

    def held(names: Iterable[str]) -> str:
        keys = [key for key, name in places.items() if name in names]
        return f"{index.name} has {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''} there"

    missing = [name for name in shards_of(index) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks the shards {', '.join(missing)}; {held(missing)}")
    state: dict[str, Tensor] = {}
    for name in shards_of(index):
        try:
            state.update(read(folder / name))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {held([name])}") from error
    absent = sorted(places.keys() - state.keys())
    if absent:
        raise CheckpointError(f"{index.name} promises {absent[:5]} ({len(absent)} keys) that the shards do not hold")
    return state


def write_weights(state: Mapping[str, Tensor], folder: Path, stem: str = "model", shard_bytes: int = SHARD_BYTES) -> None:
    """Write `<stem>.safetensors`, in shards with an index when the tensors take more than `shard_bytes`.

    Every file is written under another name and moved into place, so that an interrupted save leaves no half file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        filled += size
    stale = set(folder.glob(f"{stem}*.safetensors")) | set(folder.glob(f"{stem}*.safetensors.index.json"))
    if len(shards) == 1:
        _write(shards[0], folder / f"{stem}.safetensors")
        _remove(stale - {folder / f"{stem}.safetensors"})
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        _write(shard, folder / name)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in state.values())},
        "weight_map": {key: name for shard, name in zip(shards, names, strict=True) for key in shard},
    }
    index_file = folder / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    _remove(stale - {index_file, *(folder / name for name in names)})


def _remove(files: set[Path]) -> None:
    """Weights of an earlier save in the other form: readers would take them for the new ones."""
    for file in files:
        file.unlink()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)
