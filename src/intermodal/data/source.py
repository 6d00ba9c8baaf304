"""What a data source is: numbered samples that can be asked for in any order, from any process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..errors import IntermodalError

TOLD = 10
"""Problems of a source that are named one by one."""


class SourceError(IntermodalError):
    """A source that cannot be opened at all."""


@dataclass
class Sample:
    """One picture with its captions.

    `image` is whatever `inputs.image.open_image` takes (encoded bytes, a path, an array); it is decoded late, in a worker.
    """

    key: str
    """Names the sample in errors, rejects and NaN reports: source and place within it."""
    image: Any
    texts: list[str]
    meta: dict[str, Any] = field(default_factory=dict)


class NamedBytes(bytes):
    """An encoded picture that knows where it is from, so that whoever decodes it later can say which one was broken."""

    name: str

    def __new__(cls, data: bytes, name: str = "") -> NamedBytes:
        out = super().__new__(cls, data)
        out.name = name
        return out


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Random access by number; must survive pickling into a worker."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`. Raises SampleError when that one cannot be read."""
        ...


@runtime_checkable
class Apart(Protocol):
    """A source of files, whose pictures and captions can be read apart: who needs the one is not refused for the other."""

    def picture_at(self, index: int) -> tuple[str, Any]:
        """A sample's name and picture. Raises SampleError."""
        ...

    def captions_at(self, index: int) -> list[str]:
        """Its captions, at least one, without the picture being read or fetched. Raises SampleError."""
        ...
