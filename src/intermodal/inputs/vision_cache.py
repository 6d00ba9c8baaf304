"""What the vision tower said of a picture, kept by the picture's content: across the turns of a chat, or on disk across epochs.

A key names the pixels as they were given, how the planner lays them out, and the planner's settings. What is kept is the tower's own
states, before the connector, so that a projector may go on learning beside a cache of a frozen tower.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..batch import States
from .media import Clip, Plan, Planner

MEMORY = 512 << 20
"""Bytes that a chat's cache may hold."""
SAMPLED = 32
"""Values of each of the tower's parameters that are compared."""


class Tower(dict[str, nn.Parameter]):
    """A vision tower's parameters by name, and `adapters`: by layer, how much each one on it counts. Their weights do not say when they
    are switched off, or scaled."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], adapters: Mapping[str, Mapping[str, float]]):
        super().__init__(parameters)
        self.adapters = {layer: dict(counting) for layer, counting in adapters.items()}


class VisionCache(Protocol):
    def get(self, key: str) -> States | None: ...

    def put(self, key: str, states: States) -> None: ...


def content_key(item: Image.Image | Clip, plan: Plan, planner: Planner) -> str:
    """Names an item by its pixels and everything that decides what the tower reads of them."""
    pixels = item.frames if isinstance(item, Clip) else np.asarray(item)
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=20)
    digest.update(repr((pixels.shape, plan.kind, plan.detail, planner)).encode())
    return digest.hexdigest()


class MemoryCache:
    """The most recently used states, up to `limit` bytes. Other weights in the tower empty it."""

    def __init__(self, limit: int = MEMORY):
        self.limit, self.held = limit, 0
        self._items: OrderedDict[str, States] = OrderedDict()
        self._weights: Any = None

    def begin(self, tower: Tower) -> None:
        """Forget everything if the tower's weights, or how it computes, are not those of the last time."""
        weights = _state_of(tower)
        if weights != self._weights:
            self._items.clear()
            self._weights, self.held = weights, 0

    def get(self, key: str) -> States | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: str, states: States) -> None:
        if key in self._items:
            return
        kept = tuple(state.clone() for state in states)  # a view would keep its whole batch alive
        self.held += _size(kept)
        self._items[key] = kept
        while self.held > self.limit:
            self.held -= _size(self._items.popitem(last=False)[1])


def _state_of(tower: Tower) -> tuple[Any, ...]:
    """What differs when a tower would say something else. Addresses and versions alone do not tell: a fused optimizer changes weights
    and leaves both as they are, so a few values of every parameter are compared too."""
    if not tower:
        return ()
    places = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in tower.values()]
    samples = [p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].float() for p in tower.values()]
    return places, torch.cat(samples).cpu().numpy().tobytes(), tower.adapters, _autocast(tower)


def _autocast(tower: Tower) -> torch.dtype | None:
    """What the tower's products are rounded to, where that is not the type of its weights."""
    device = next(iter(tower.values())).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _size(states: States) -> int:
    return sum(state.nbytes for state in states)


class DiskCache:
    """States of a frozen tower in a folder, one safetensors file an item. Several processes may read and write it at once.

    Args:
        weights: names the tower and its precision, as `fingerprint` does; another tower never finds these files.
    """

    def __init__(self, folder: Path, weights: str):
        self.folder = folder / weights
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> States | None:
        try:
            found = load_file(self._file(key))
        except (FileNotFoundError, SafetensorError):  # not there, or another disk's damage: look again
            return None
        return tuple(found[str(index)] for index in range(len(found)))

    def put(self, key: str, states: States) -> None:
        file = self._file(key)
        if file.exists():
            return
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({str(index): state.cpu().contiguous().clone() for index, state in enumerate(states)}, part)
        part.replace(file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def fingerprint(tower: Tower) -> str:
    """Names a tower by its weights' content, its adapters, and the autocast that is on: all that its states depend on."""
    digest = hashlib.blake2b(digest_size=10)
    for name, value in sorted(tower.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    if tower.adapters or _autocast(tower):  # else the name stays what it was before these counted
        digest.update(f"{tower.adapters} {_autocast(tower)}".encode())
    return digest.hexdigest()
