"""The one contract between inputs and models: what a packed batch of images, texts or pairs holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .nn.attention import Segments


@dataclass
class Images:
    """Pictures ready for a vision tower.

    `pixels` is (B, C, H, W) for towers of a fixed size. For native-resolution towers it is (P, patch values), the patches of all
    pictures end to end, and `grids` gives each picture's (rows, columns).
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
