"""The one contract between inputs and models: what a packed batch of images, texts or pairs holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from math import prod
from typing import Any

import torch
from torch import Tensor

from .nn.attention import Segments


@dataclass
class Images:
    """Pictures ready for a vision tower.

    `pixels` is (B, C, H, W) for towers of a fixed size. For native-resolution towers it is (P, patch values), the patches of all
    pictures end to end, and `grids` gives each picture's (rows, columns). A tower reads normalised float32; data workers hand over
    uint8, which the processor's `normalised` turns into it.
    """

    pixels: Tensor
    grids: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0] if self.grids is None else len(self.grids)

    def to(self, device: torch.device | str) -> Images:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> Images:
        if self.grids is None:
            return Images(self.pixels[start:stop])
        sizes = [rows * columns for rows, columns in self.grids]
        at, end = sum(sizes[:start]), sum(sizes[:stop])
        return Images(self.pixels[at:end], self.grids[start:stop])


@dataclass
class Texts:
    """Token ids of many texts end to end: `ids` (T,) int64 and the length of each text."""

    ids: Tensor
    segments: Segments

    def __len__(self) -> int:
        return len(self.segments)

    @staticmethod
    def pack(texts: Sequence[Sequence[int]]) -> Texts:
        return Texts(torch.tensor([i for text in texts for i in text], dtype=torch.long), Segments([len(text) for text in texts]))

    def to(self, device: torch.device | str) -> Texts:
        return replace(self, ids=self.ids.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> Texts:
        at, end = int(self.segments.offsets[start]), int(self.segments.offsets[stop])
        return Texts(self.ids[at:end], Segments(self.segments.lengths[start:stop]))


@dataclass
class PairBatch:
    """Image i belongs to text i. `keys` name the samples in errors and rejects.

    `groups`, where given, holds one integer a pair; pairs with the same integer show the same thing (the same caption on several
    pictures) and a loss may count them as positives of each other.
    """

    images: Images
    texts: Texts
    keys: list[str] = field(default_factory=list)
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> PairBatch:
        groups = None if self.groups is None else self.groups.to(device, non_blocking=True)
        return PairBatch(self.images.to(device), self.texts.to(device), self.keys, groups)

    def slice(self, start: int, stop: int) -> PairBatch:
        groups = None if self.groups is None else self.groups[start:stop]
        return PairBatch(self.images.slice(start, stop), self.texts.slice(start, stop), self.keys[start:stop], groups)


States = tuple[Tensor, ...]
"""What a vision tower says of one item before the connector: one tensor (rows, ...), and one more for each DeepStack layer."""


@dataclass
class Visual:
    """What a vision tower of a stitched model reads, for all media of a batch end to end.

    `pixels` is (N, C, H, W) for towers of a fixed size, or (P, patch values) with `grids` (frames, rows, columns) of patches for
    native resolution. `layout` says, item by item, how features become the decoder's tokens where that is not their own order
    (tiles, newlines, pooling); its entries belong to the model family and say how many `views` the tower sees.

    Where a cache is in use, `keys` names each item, and `known` holds, item by item, what the tower said of it earlier (or None);
    `pixels` are then those of the unknown items only.
    """

    pixels: Tensor
    grids: tuple[tuple[int, int, int], ...] | None = None
    layout: tuple[Any, ...] = ()
    keys: tuple[str, ...] = ()
    known: tuple[States | None, ...] = ()

    def to(self, device: torch.device | str) -> Visual:
        known = tuple(None if states is None else tuple(s.to(device, non_blocking=True) for s in states) for states in self.known)
        return replace(self, pixels=self.pixels.to(device, non_blocking=True), known=known)

    def rows(self) -> list[int]:
        """For each item, how many rows of the tower's input and of its states are its own: patches, or views."""
        return [prod(grid) for grid in self.grids] if self.grids is not None else [entry.views for entry in self.layout]

    def unknown(self) -> Visual:
        """The items that the tower has to look at."""
        new = [states is None for states in self.known] if self.known else [True] * len(self.grids or self.layout)
        grids = None if self.grids is None else tuple(compress(self.grids, new))
        return Visual(self.pixels, grids, tuple(compress(self.layout, new)), tuple(compress(self.keys, new)))

    @staticmethod
    def join(parts: Sequence[Visual]) -> Visual | None:
        """Several conversations' media as one, or None where there is none."""
        if not parts:
            return None
        grids = None if parts[0].grids is None else tuple(grid for part in parts for grid in part.grids or ())
        pixels = torch.cat([part.pixels for part in parts])
        layout, keys, known = (
            tuple(entry for part in parts for entry in getattr(part, name)) for name in ("layout", "keys", "known")
        )
        return Visual(pixels, grids, layout, keys, known)


@dataclass
class TokenBatch:
    """Conversations end to end: what a decoder trains on or reads.

    Shapes: `ids` (T,) int64; `positions` (T,) or (3, T); `supervised` (T,) bool, True where a token is to be predicted; `visual_rows`
    (V,) int64, the tokens that the vision tower fills, in the order of its features.
    """

    ids: Tensor
    segments: Segments
    positions: Tensor
    supervised: Tensor
    visual: Visual | None = None
    visual_rows: Tensor | None = None
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.segments)

    def to(self, device: torch.device | str) -> TokenBatch:
        moved = {name: getattr(self, name) for name in ("ids", "positions", "supervised", "visual", "visual_rows")}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})

    @staticmethod
    def pack(parts: Sequence[TokenBatch]) -> TokenBatch:
        """Conversations, or packs of them, as one pack."""
        offsets = torch.tensor([0, *(part.ids.shape[0] for part in parts)]).cumsum(0).tolist()
        rows = [part.visual_rows + at for part, at in zip(parts, offsets, strict=False) if part.visual_rows is not None]
        return TokenBatch(
            ids=torch.cat([part.ids for part in parts]),
            segments=Segments([length for part in parts for length in part.segments.lengths]),
            positions=torch.cat([part.positions for part in parts], dim=-1),
            supervised=torch.cat([part.supervised for part in parts]),
            visual=Visual.join([part.visual for part in parts if part.visual is not None]),
            visual_rows=torch.cat(rows) if rows else None,
            keys=[key for part in parts for key in part.keys],
        )
