"""Pictures and clips inside a conversation: what a person may give, and what a planner says about it before a pixel is touched."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from ..errors import IntermodalError
from .image import open_image


class MediaError(IntermodalError):
    """A picture or clip that cannot be read or does not fit the model."""


@dataclass(frozen=True)
class Clip:
    """Frames of a video and when each was shown.

    `frames` is (F, H, W, 3) uint8; `times` are seconds from the start, one a frame; `fps` is the rate the frames were sampled at.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.frames.shape[2], self.frames.shape[1]


@dataclass(frozen=True)
class Piece:
    """A run of tokens that a media item becomes, in order: words (ids) or a grid of visual features.

    A grid of features is (frames, rows, columns) as the decoder sees it, after merging or pooling; ids stand for themselves.
    """

    ids: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    step: float = 1.0
    """M-RoPE: positions between two frames of the grid."""

    def __len__(self) -> int:
        return len(self.ids) if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Plan:
    """How one media item becomes tokens.

    `pieces` replace the item's placeholder token and, where the model's format says so, the tokens just before and after it
    (`swallow`). A feature token carries `placeholder` as its id.
    """

    kind: str
    """"image" or "video"."""
    placeholder: int
    pieces: tuple[Piece, ...]
    swallow: tuple[int, int] = (0, 0)
    detail: Any = None
    """What the planner needs again to make the pixels (target size, grid of tiles, ...)."""

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def features(self) -> int:
        """How many tokens are filled by the vision tower."""
        return sum(len(piece) for piece in self.pieces if piece.grid is not None)


class Planner(Protocol):
    """A family's rule from media to tokens and pixels."""

    placeholders: dict[str, int]
    """Token id of each kind of media in a rendered template: {"image": ..., "video": ...}."""

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        """The tokens of an item, from its size alone; `among` is how many items of its kind the conversation holds."""
        ...

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Visual:
        """The tower's input for all items, in order."""
        ...

    def positions(self, ids: Sequence[int], plans: Sequence[tuple[int, Plan]]) -> Tensor:
        """Position ids of one conversation: (T,) or, for M-RoPE, (3, T). `plans` come with the token each starts at."""
        ...


def load_part(part: dict[str, Any], video: Any = None) -> Image.Image | Clip | None:
    """The picture or clip of a message part, or None for text.

    Parts: `{"type": "image", "image": PIL, path, bytes or data-URI}`, OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, and
    `{"type": "video", "video": path, Clip or frames}` (frames as a list of pictures, with `"fps"` beside them).

    Args:
        video: how a path is decoded and sampled, a `video.Sampling`.

    Raises:
        MediaError: an unknown part, an unreadable file, or an http(s) address.
    """
    kind = part.get("type") or next((key for key in ("text", "image", "video", "image_url") if key in part), None)
    if kind == "text":
        return None
    if kind in ("image", "image_url"):
        value = part.get("image", part.get("image_url"))
        if isinstance(value, dict):
            value = value.get("url")
        return _picture(value)
    if kind == "video":
        value = part.get("video")
        if isinstance(value, Clip):
            return value
        if isinstance(value, (str, Path)):
            from .video import Sampling, decode

            return decode(value, video or Sampling())
        return _frames(value, float(part.get("fps", 2.0)))
    raise MediaError(f"a message part of type {kind!r} is not known: text, image, image_url or video")


def _picture(value: Any) -> Image.Image:
    if value is None:
        raise MediaError('an image part holds no picture; write {"type": "image", "image": path or PIL image}')
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise MediaError(f"pictures are not fetched from the network: download {value[:80]} and give its path")
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, body = value.partition(",")
        try:
            value = base64.b64decode(body, validate=True) if comma and head.endswith(";base64") else None
        except binascii.Error:
            value = None
        if value is None:
            raise MediaError("a data URI is not base64: it should begin with data:image/png;base64,")
    if isinstance(value, str):
        value = Path(value.removeprefix("file://")).expanduser()
    return open_image(value)


def _frames(value: Any, fps: float) -> Clip:
    if value is None or len(value) == 0:
        raise MediaError('a video part holds no frames; write {"type": "video", "video": path or list of pictures, "fps": ...}')
    if fps <= 0:
        raise MediaError(f"a video's fps must be positive, got {fps}")
    frames = value if isinstance(value, np.ndarray) else [np.asarray(open_image(frame)) for frame in value]
    if len({frame.shape for frame in frames}) != 1 or frames[0].ndim != 3 or frames[0].shape[2] != 3:
        raise MediaError("the frames of a video must be RGB pictures of one size")
    return Clip(np.stack(list(frames)), tuple(index / fps for index in range(len(frames))), fps)


@dataclass
class Expanded:
    """Token ids of a conversation with every placeholder replaced by what its item becomes."""

    ids: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    """For each token the index of the rendered token it comes from, -1 for what stands for media."""
    visual: list[bool] = field(default_factory=list)
    """Whether the vision tower fills it."""
    starts: list[int] = field(default_factory=list)
    """Where each media item begins."""


def expand(ids: Sequence[int], plans: Sequence[Plan], placeholders: dict[str, int]) -> Expanded:
    """Put each item's tokens where its placeholder is.

    Raises:
        MediaError: the rendered text holds another number of placeholders than there are items.
    """
    kinds = {token: kind for kind, token in placeholders.items()}
    at = [index for index, token in enumerate(ids) if token in kinds]
    found, given = [kinds[ids[index]] for index in at], [plan.kind for plan in plans]
    if len(found) != len(given):
        raise MediaError(
            f"the rendered conversation has {len(found)} media placeholders {found} for {len(given)} items {given}; "
            f"does a text part contain a placeholder token, or does the template drop media?"
        )
    if found != given:  # a template may list a message's pictures before its videos; order inside a kind is kept
        raise MediaError(f"the template writes media in the order {found}, the messages give {given}")
    out, read = Expanded(), 0

    def copy(stop: int) -> None:
        out.ids += ids[read:stop]
        out.source += range(read, stop)
        out.visual += [False] * (stop - read)

    for index, plan in zip(at, plans, strict=True):
        copy(index - plan.swallow[0])
        read = index + 1 + plan.swallow[1]
        out.starts.append(len(out.ids))
        for piece in plan.pieces:
            count = len(piece)
            out.ids += piece.ids if piece.grid is None else [plan.placeholder] * count
            out.source += [-1] * count
            out.visual += [piece.grid is not None] * count
    copy(len(ids))
    return out


def text_positions(length: int) -> Tensor:
    return torch.arange(length)
