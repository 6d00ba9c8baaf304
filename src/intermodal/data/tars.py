"""WebDataset tar shards."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import SampleError
from .records import IMAGE_SUFFIXES, member_captions
from .source import NamedBytes, Sample, SourceError
from .tar_index import shard_indexes

OPEN_SHARDS = 64
"""Files that one tar source keeps open: a process may often have no more than 1,024, and a data set has thousands of shards."""


class TarSource:
    """WebDataset shards: members whose names are equal up to the first dot are a sample, a picture and its captions.

    Captions are the lines of its `.txt`; of its `.en.txt`, `.de.txt` and so on where there is none; else what its `.json` holds. With
    `classes` a `.cls` without a `.txt` is the number of one of them, which is then the caption.

    The headers are read once, and where they are is kept for the next time (`tar_index`); after that any sample is one seek away. A
    shard that is cut short gives the samples before the cut and one problem that names it.

    Raises:
        SourceError: no shard holds anything.
    """

    def __init__(self, files: Sequence[Path], classes: Sequence[str] | None = None):
        self.files, self.classes = list(files), classes
        self.name = files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"
        self.shards = shard_indexes(self.files)
        self.problems = [(str(file), shard.problem) for file, shard in zip(self.files, self.shards, strict=True) if shard.problem]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        """Before which sample each shard ends."""
        if not len(self):
            file, why = self.problems[0] if self.problems else (str(files[0]), "no files are in it")
            raise SourceError(f"{self.name} holds no samples: {file}: {why}")
        self._open: OrderedDict[tuple[int, int], Any] = OrderedDict()
        """Files by process (a file position is not shared over a fork) and shard, the one that was read last at the end."""

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, index: int) -> Sample:
        return Sample(*self.picture_at(index), self.captions_at(index))

    def picture_at(self, index: int) -> tuple[str, Any]:
        number, name, parts, members = self._member(index)
        suffix = next((s for s in parts if f".{s}" in IMAGE_SUFFIXES), None)
        if suffix is None:
            raise SampleError(f"{name}: no picture among its members ({members}); a picture is one of {', '.join(IMAGE_SUFFIXES)}")
        return name, NamedBytes(self._read(number, *parts[suffix]), f"{name}.{suffix}")

    def captions_at(self, index: int) -> list[str]:
        number, name, parts, _ = self._member(index)
        return member_captions(name, list(parts), lambda ending: self._read(number, *parts[ending]), self.classes)

    def _member(self, index: int) -> tuple[int, str, dict[str, tuple[int, int]], str]:
        """(number of the shard, the sample's name, where its members are, their endings for a message)."""
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        shard, at = self.shards[number], index - (self.ends[number - 1] if number else 0)
        parts = shard.parts(at)
        return number, f"{self.files[number].name}/{shard.keys[at]}", parts, ", ".join(f".{suffix}" for suffix in parts)

    def _read(self, number: int, offset: int, size: int) -> bytes:
        which = (os.getpid(), number)
        handle = self._open.pop(which, None) or self.files[number].open("rb")
        self._open[which] = handle
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        handle.seek(offset)
        return handle.read(size)
