"""Pictures and clips inside a conversation: what a person may give, and what a planner says about it before a pixel is touched."""

from __future__ import annotations

import base64
import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from ..errors import IntermodalError
from .boxes import BoxFrame
from .image import open_image
from .messages import KEYS, check_text
from .transparency import Blend, over_white


class MediaError(IntermodalError):
    """A picture or clip that cannot be read or does not fit the model."""


@dataclass(frozen=True)
class Bounds:
    """How large a part asks to be shown, by qwen-vl-utils' keys: a budget of pixels (of each frame, and of a whole clip), or a size."""

    min_pixels: float | None = None
    max_pixels: float | None = None
    total_pixels: float | None = None
    """Of a clip: its frames share it two at a time, for two become one row of tokens. Of a picture it says nothing."""
    resized_height: float | None = None
    resized_width: float | None = None


_BOUNDS = "bounds of the part"  # where a PIL image's `info` has them


@dataclass(frozen=True)
class Clip:
    """Frames of a video and when each was shown.

    `frames` is (F, H, W, 3) uint8; `times` are seconds from the start, one a frame; `fps` is the rate the frames were sampled at.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    fps: float
    bounds: Bounds | None = None

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


Run = tuple[Piece, ...]
"""What one placeholder token becomes."""


@dataclass(frozen=True)
class Plan:
    """How one media item becomes tokens.

    Each placeholder token of the item becomes one of `runs`; a feature token carries `placeholder` as its id. An item whose format
    is more than its placeholder (Qwen3-VL's timestamps) gives `text`, which takes the place of the rendered `instead` before anything
    is tokenised, with one placeholder in it for each run.
    """

    kind: str
    """"image" or "video"."""
    placeholder: int
    runs: tuple[Run, ...]
    text: str | None = None
    instead: str = ""
    detail: Any = None
    """What the planner needs again to make the pixels (target size, grid of tiles, ...)."""
    boundary: str = ""
    """Written on both sides of the placeholder, once between two items that touch, and with a space before a word that would touch it
    (Idefics2)."""

    def __len__(self) -> int:
        return sum(len(piece) for run in self.runs for piece in run)

    @property
    def features(self) -> int:
        """How many tokens are filled by the vision tower."""
        return sum(len(piece) for run in self.runs for piece in run if piece.grid is not None)


class Planner(Protocol):
    """A family's rule from media to tokens and pixels."""

    placeholders: dict[str, int]
    """Token id of each kind of media in a rendered template: {"image": ..., "video": ...}."""

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        """The tokens of an item, from its size alone; `among` is how many items of its kind the conversation holds."""
        ...

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        """The tower's input for all items, in order."""
        ...

    def visual(self, plans: Sequence[Plan], pixels: Tensor) -> Visual:
        """What the tower reads for items of these plans."""
        ...

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        """Coordinates in a picture (or a clip's frames) of (width, height)."""
        ...

    def positions(self, length: int, runs: Sequence[tuple[int, Run]]) -> Tensor:
        """Position ids of a conversation of `length` tokens: (T,) or, for M-RoPE, (3, T). Runs come with the token each starts at."""
        ...


def kind_of(part: dict[str, Any]) -> str | None:
    """ "text", "image", "image_url", "video" or "box", by a part's type, else by what it holds."""
    return part.get("type") or next((key for key in ("text", "image", "video", "image_url") if key in part), None)


def load_part(part: dict[str, Any], video: Any = None, blend: Blend = over_white) -> Image.Image | Clip | None:
    """The picture or clip of a message part, or None for text.

    Parts: `{"type": "image", "image": PIL, path, bytes, file, uint8 array or tensor, or data-URI}`, transformers' `"url"`, `"path"` and
    `"base64"` in the place of `"image"`, OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, and
    `{"type": "video", "video": path, data-URI, Clip or frames}`: of a path `"fps"` or `"nframes"` beside it says which frames are read,
    `"min_frames"` and `"max_frames"` how few and how many by a rate, `"video_start"` and `"video_end"` between which seconds; of frames
    given as a list of pictures or an array `"fps"` or `"sample_fps"` says how fast they follow each other. `"min_pixels"`,
    `"max_pixels"`, or `"resized_height"` and `"resized_width"` say how large a Qwen-VL shows it, and `"total_pixels"` how large a whole
    clip. A part `{"type": "box", "box": [left, top, right, bottom], "label": ...}`, in pixels of the picture before it (or of `"item"`,
    counted from 0), is text, written as the model's family writes boxes.

    Args:
        video: how a path is decoded and sampled where the part does not say it, a `video.Sampling`.
        blend: lays a picture with transparency on white.

    Raises:
        MediaError: an unknown part, an unreadable file, an address on the network, or a rate or size that is none.
    """
    kind = kind_of(part)
    if kind in ("text", "box"):
        return None
    bounds = _bounds(part)
    if kind in ("image", "image_url"):
        picture = _picture(_source(part, KEYS["image"]), blend)
        if bounds is not None:
            picture = picture.copy()  # the caller's own picture is left as it is
            picture.info[_BOUNDS] = bounds
        return picture
    if kind == "video":
        value = _source(part, KEYS["video"])
        if isinstance(value, (str, Path)):
            value = _decoded(value, part, video)
        clip = value if isinstance(value, Clip) else _frames(value, _rate_of(part))
        return clip if bounds is None else replace(clip, bounds=bounds)
    raise MediaError(f"a message part of type {kind!r:.80} is not known: text, image, image_url, video or box")


def _decoded(value: str | Path, part: dict[str, Any], video: Any) -> Clip:
    from .video import Section, counted, decode, sampling_of

    usual = sampling_of(video, part.get("fps"), part.get("nframes"))
    sampling = counted(usual, part.get("min_frames"), part.get("max_frames"))
    data = _data_of(value, "video/mp4") if isinstance(value, str) else None
    return decode(value if data is None else data, sampling, Section(part.get("video_start"), part.get("video_end")))


def _rate_of(part: dict[str, Any]) -> Any:
    """How fast given frames follow each other: qwen-vl-utils' `sample_fps`, which passes over `fps` there, else `fps`."""
    passed = [key for key in ("video_start", "video_end", "min_frames", "max_frames") if part.get(key) is not None]
    if passed:
        warnings.warn(f"a list of frames is shown whole: {', '.join(passed)} beside it are passed over", stacklevel=3)
    return next((part[key] for key in ("sample_fps", "fps") if part.get(key) is not None), 2.0)


def bounds_of(item: Image.Image | Clip) -> Bounds | None:
    """What the part of an item that `load_part` made asks about its size."""
    return item.bounds if isinstance(item, Clip) else getattr(item, "info", {}).get(_BOUNDS)  # a size alone is planned for, too


def refuse_bounds(item: Image.Image | Clip, family: str) -> None:
    """Of a model that shows everything at sizes of its own: a budget, which sets of data for Qwen-VL give every part, is passed over and
    told of; a size is not.

    Raises:
        MediaError: the part asks for a size.
    """
    bounds = bounds_of(item)
    if bounds is None:
        return
    own = f"{family} shows media at sizes of its own"
    if bounds.resized_height is not None:
        raise MediaError(f"{own}: leave resized_height and resized_width out of the part, or resize the picture before")
    warnings.warn(f"{own}: min_pixels and max_pixels of parts, and total_pixels of clips, are passed over", stacklevel=2)


def _bounds(part: dict[str, Any]) -> Bounds | None:
    given = {field.name: part[field.name] for field in fields(Bounds) if part.get(field.name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and float(value) >= 1):
            raise MediaError(f"{name} of a part is a number of pixels, at least 1, and not {value!r:.80}")
    if ("resized_height" in given) != ("resized_width" in given):
        raise MediaError("resized_height and resized_width of a part go together: give both, or neither")
    if given.get("min_pixels", 1) > given.get("max_pixels", math.inf):
        raise MediaError(f"min_pixels {given['min_pixels']} of a part is more than its max_pixels {given['max_pixels']}")
    return Bounds(**given) if given else None


def _source(part: dict[str, Any], keys: Sequence[str]) -> Any:
    """What a part shows, under the first of the keys that it has."""
    key = next((key for key in keys if part.get(key) is not None), None)
    value = part[key] if key else None
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        return f"data:;base64,{value}"
    return value.get("url") if isinstance(value, dict) else value


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(?:localhost(?=/))?", re.IGNORECASE)


def local_path(address: str | Path, kind: str) -> Path:
    """The file that a path or a `file://` address names, whose `%20` and the like are characters.

    Raises:
        MediaError: an address on the network, or a text too long for a name where there is no file.
        SampleError: half a character, which no file system takes.
    """
    text = str(address)
    try:
        os.fsencode(text)  # not UTF-8: names of files may hold bytes that are none, which Python writes as halves of characters
    except UnicodeEncodeError:
        check_text(text)
    found = _ADDRESS.match(text)
    if found is None:
        _refuse_long(text, kind)
        return Path(os.path.expanduser(text))
    if found[1].lower() != "file":
        raise MediaError(f"{kind} are not fetched from the network: download {text[:80]} and give its path")
    as_written = os.path.expanduser(text[found.end() :])
    if os.path.exists(as_written):
        return Path(as_written)
    unquoted = unquote(text[found.end() :])
    _refuse_long(unquoted, kind)
    return Path(os.path.expanduser(unquoted))


def _refuse_long(text: str, kind: str) -> None:
    """A text longer than names of files are is most often base64: the errors of Pillow and FFmpeg would say all of it."""
    if len(text) > 255 and not os.path.exists(os.path.expanduser(text)):
        form = "image/png" if kind == "pictures" else "video/mp4"
        raise MediaError(f"no such file: {text[:80]}... ({len(text)} characters; base64 begins with data:{form};base64,)")


def _data_of(text: str, form: str) -> bytes | None:
    """The bytes in a data URI; None of another text. Raises MediaError: it is not base64."""
    if text[:5].lower() != "data:":
        return None
    head, comma, body = text.partition(",")
    data = None
    if comma and head.endswith(";base64"):
        with suppress(ValueError):  # binascii.Error is one; letters beyond ASCII are another
            data = base64.b64decode("".join(body.split()), validate=True)
    if data is None:
        raise MediaError(f"a data URI is not base64: it should begin with data:{form};base64,")
    return data


def _picture(value: Any, blend: Blend = over_white) -> Image.Image:
    if value is None:
        raise MediaError('an image part holds no picture; write {"type": "image", "image": path or PIL image}')
    if isinstance(value, str):
        data = _data_of(value, "image/png")
        value = local_path(value, "pictures") if data is None else data
    try:
        return open_image(value, blend)
    except TypeError as error:
        raise MediaError(f"an image part cannot be read: {error}") from error


def _frames(value: Any, fps: Any) -> Clip:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"the fps of a video's frames is a positive number, and not {fps!r:.80}")
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 4)
    if not several or len(value) == 0:
        raise MediaError(
            'a video part holds no frames; write {"type": "video", "video": path or list of pictures, "fps": ...} (arrays have four axes)'
        )
    times = tuple(index / fps for index in range(len(value)))
    whole = value.detach().cpu().movedim(1, -1).numpy() if isinstance(value, Tensor) and value.shape[1] == 3 else value
    if isinstance(whole, np.ndarray) and whole.dtype == np.uint8 and whole.shape[-1] == 3:  # nothing is left to look at in each
        return Clip(np.ascontiguousarray(whole), times, float(fps))
    frames = [np.asarray(_picture(frame)) for frame in value]
    if len({frame.shape for frame in frames}) != 1:
        raise MediaError("the frames of a video must be RGB pictures of one size")
    return Clip(np.stack(frames), times, float(fps))


@dataclass
class Expanded:
    """Token ids of a conversation with every placeholder replaced by what its item becomes."""

    ids: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    """For each token the index of the rendered token it comes from, -1 for what stands for media."""
    visual: list[bool] = field(default_factory=list)
    """Whether the vision tower fills it."""
    runs: list[tuple[int, Run]] = field(default_factory=list)
    """Every run with the token it begins at."""
    placeholders: list[int] = field(default_factory=list)
    """For each run the index of the rendered token that it took the place of."""


def expand(ids: Sequence[int], plans: Sequence[Plan]) -> Expanded:
    """Put each run's tokens where its placeholder is; `rewrite` has checked that they belong together.

    Raises:
        MediaError: tokenising lost or made placeholders.
    """
    runs = [(plan.placeholder, run) for plan in plans for run in plan.runs]
    tokens = {placeholder for placeholder, _ in runs}
    at = [index for index, token in enumerate(ids) if token in tokens]
    if [ids[index] for index in at] != [placeholder for placeholder, _ in runs]:
        raise MediaError(f"the tokenised conversation holds {len(at)} media placeholders for {len(runs)} runs of media tokens")
    out, read = Expanded(), 0

    def copy(stop: int) -> None:
        out.ids += ids[read:stop]
        out.source += range(read, stop)
        out.visual += [False] * (stop - read)

    for index, (placeholder, run) in zip(at, runs, strict=True):
        copy(index)
        read = index + 1
        out.runs.append((len(out.ids), run))
        out.placeholders.append(index)
        for piece in run:
            count = len(piece)
            out.ids += piece.ids if piece.grid is None else [placeholder] * count
            out.source += [-1] * count
            out.visual += [piece.grid is not None] * count
    copy(len(ids))
    return out


def mrope_positions(length: int, runs: Sequence[tuple[int, Run]], *, past_time: bool) -> Tensor:
    """M-RoPE ids (3, T): text counts on all axes alike; a grid counts frames, rows and columns from where it begins.

    Args:
        past_time: text after a grid goes on after the largest position of any axis, as the authors' `rope2d.py` does; otherwise after
            the larger side alone, as transformers does, which gives text after a long clip positions of the clip (PITFALLS D1).
    """
    out = torch.empty(3, length, dtype=torch.long)
    read = now = 0

    def words(count: int) -> None:
        nonlocal read, now
        out[:, read : read + count] = torch.arange(now, now + count)
        read, now = read + count, now + count

    for start, run in runs:
        words(start - read)
        for piece in run:
            if piece.grid is None:
                words(len(piece))
                continue
            frames, rows, columns = piece.grid
            time = (torch.arange(frames) * piece.step).long()
            axes = torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")
            out[:, read : read + len(piece)] = torch.stack([axis.flatten() for axis in axes]) + now
            read += len(piece)
            now += max(int(time[-1]) + 1 if past_time else 0, rows, columns)
    words(length - read)
    return out
