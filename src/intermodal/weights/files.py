"""Checkpoint files on disk: single and sharded safetensors, torch pickles, and their errors in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json

SHARD_BYTES = 5_000_000_000


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """One file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file (cut short while copying?): {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A torch state dict, loaded with `weights_only` so that it cannot run code; a `state_dict` entry is unwrapped."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... on a damaged file
        raise CheckpointError(f"{path} is not a readable torch checkpoint: {type(error).__name__}: {error}") from error
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_weights(folder: Path, stems: tuple[str, ...] = ("model", "pytorch_model")) -> dict[str, Tensor]:
    """All tensors of a directory: `<stem>.safetensors`, its sharded form with an index, or the `.bin` forms.

    Raises:
        CheckpointError: no weights, a shard named by the index is missing, or a key the index names is not in its shard.
    """
    for stem in stems:
        for suffix, read in ((".safetensors", read_safetensors), (".bin", read_pickle)):
            single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
            if single.exists():
                return read(single)
            if index.exists():
                return _read_shards(folder, index, read)
    names = ", ".join(f"{stem}.safetensors" for stem in stems)
    raise CheckpointError(f"{folder} holds no weights: looked for {names}, their sharded forms and .bin")


def _read_shards(folder: Path, index: Path, read) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map", {})
    missing = sorted(name for name in set(places.values()) if not (folder / name).exists())
    if missing:
        keys = [key for key, name in places.items() if name in missing]
        raise CheckpointError(
            f"{folder} lacks the shards {missing} named by {index.name}; they hold {keys[0]} and {len(keys) - 1} more"
        )
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        state.update(read(folder / name))
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
