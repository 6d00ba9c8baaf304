"""Fixed-size towers: LLaVA's square, AnyRes tiles (LLaVA-NeXT, OneVision), and OneVision's multi-image and video rules.

Sources: LLaVA `mm_utils.py:152-171` (padding colour), LLaVA-NeXT `mm_utils.py:119-293` (best grid, letterbox, base view) and
`llava_arch.py:337-410` (unpad, down-scale, newlines). Sizes are (height, width) here, as in Hugging Face's pinpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from ..kernels.resize import resized
from .boxes import Affine, BoxFrame, cells
from .image import ImageProcessor, each, open_image
from .media import Clip, MediaError, Piece, Plan, Run, refuse_bounds
from .video import Sampling

Size = tuple[int, int]


def best_grid(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution that keeps most of the picture's pixels, then wastes least; the first of equals wins."""
    height, width = size
    best, most, least = None, 0, float("inf")
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = tall * wide - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (tall, wide), kept, wasted
    if best is None:
        raise MediaError(f"no resolution of {list(pinpoints)} fits a picture of {width} x {height} pixels")
    return best


def letterbox_size(size: Size, target: Size) -> Size:
    """The picture's size inside `target` at its own aspect: one side fits, the other is rounded up."""
    (height, width), (tall, wide) = size, target
    if wide / width < tall / height:
        return min(math.ceil(height * (wide / width)), tall), wide
    return tall, min(math.ceil(width * (tall / height)), wide)


def unpadded(size: Size, grid: Size, *, rounding: bool) -> tuple[Size, Size]:
    """Which rows and columns of a grid of features show the picture and not the letterbox.

    Args:
        size: of the picture in pixels.
        grid: (rows, columns) of features over all tiles.
        rounding: transformers' `int(round(x, 7))` instead of the authors' `int(x)`: other by two in 0.02 % of sizes (PITFALLS D7).

    Returns:
        ((first row, end row), (first column, end column)).
    """
    (height, width), (rows, columns) = size, grid

    def whole(value: float) -> int:
        return int(round(value, 7)) if rounding else int(value)

    if width / height > columns / rows:
        cut = (rows - whole(height * (columns / width))) // 2
        return (cut, rows - cut), (0, columns)
    cut = (columns - whole(width * (rows / height))) // 2
    return (0, rows), (cut, columns - cut)


@dataclass(frozen=True)
class Tiled:
    """Layout of an AnyRes picture: its base view, then `grid` tiles whose features are joined, cut, scaled and given newlines."""

    grid: Size
    rows: Size
    columns: Size
    scaled: Size | None = None

    @property
    def views(self) -> int:
        """How many pictures the tower sees."""
        return 1 + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Whole:
    """Layout of one view: all its features, with a newline at the end where the model has one."""

    newline: bool
    views = 1


@dataclass(frozen=True)
class Frames:
    """Layout of a clip: each frame's features pooled to `pooled`, one newline after the last."""

    count: int
    pooled: Size

    @property
    def views(self) -> int:
        return self.count


@dataclass
class LlavaPlanner:
    """Tokens and pixels of media for `llava`, `llava_next` and `llava_onevision`."""

    family: str
    placeholders: dict[str, int]
    side: int
    """Pixels of the tower's square input."""
    grid: int
    """Features along one side of a view."""
    processor: ImageProcessor
    pinpoints: tuple[Size, ...] = ()
    max_tiles: int | None = None
    """OneVision's `anyres_max_N`: features beyond N views are scaled down; None keeps all."""
    authors: bool = True
    pad: bool = False
    """transformers' rule for `llava`: pad to a square only where the files say `do_pad`; otherwise the picture is cropped."""
    most_frames: int = 32
    extra: int = 0
    """`llava`: features of a view beside its grid, before it: 1 for CLIP's class token where it is kept, -1 where the first feature of a
    tower without one is dropped like it."""
    _single: ImageProcessor | None = field(default=None, repr=False)

    @property
    def sampling(self) -> Sampling:
        """Two frames a second, and no more than the model takes, of the whole length."""
        return Sampling(most=self.most_frames, pair=1)

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        refuse_bounds(item, self.family)
        if isinstance(item, Clip):
            return self._clip(item)
        placeholder, side = self.placeholders["image"], self.grid
        base = Piece(grid=(1, side, side))
        if self.family == "llava":
            whole = base if not self.extra else Piece(grid=(1, 1, side**2 + self.extra))
            return Plan("image", placeholder, ((whole,),), detail=Whole(newline=False))
        if self.family == "llava_onevision" and among > 1:  # several pictures leave AnyRes
            return Plan("image", placeholder, ((base, Piece(grid=(1, 1, 1))),), detail=Whole(newline=True))
        size = (item.height, item.width)
        best = best_grid(size, self.pinpoints)
        tiles = (best[0] // self.side, best[1] // self.side)
        rows, columns = unpadded(size, (tiles[0] * side, tiles[1] * side), rounding=not self.authors)
        tall, wide, scaled = rows[1] - rows[0], columns[1] - columns[0], None
        if self.max_tiles is not None:
            times = math.sqrt(tall * wide / (self.max_tiles * side**2))
            if times > 1.1:
                scaled = tall, wide = int(tall // times), int(wide // times)
        detail = Tiled(tiles, rows, columns, scaled)
        return Plan("image", placeholder, ((base, Piece(grid=(1, tall, wide + 1))),), detail=detail)

    def _clip(self, clip: Clip) -> Plan:
        if self.family != "llava_onevision":
            raise MediaError(f"{self.family} takes no videos; give frames as pictures, or use a LLaVA-OneVision or Qwen-VL model")
        if len(clip.frames) > self.most_frames:
            raise MediaError(
                f"a clip of {len(clip.frames)} frames; this model takes {self.most_frames}: sample fewer (--frames, Sampling(frames=...))"
            )
        pooled = -(-self.grid // 2)
        frames = Piece(grid=(len(clip.frames), pooled, pooled))
        run = (frames, Piece(grid=(1, 1, 1)))
        return Plan("video", self.placeholders["video"], (run,), detail=Frames(len(clip.frames), (pooled, pooled)))

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        views = [view for made in each(self.views, items, plans) for view in made] if items else []
        return self.processor(views).pixels if views else torch.empty(0, 3, self.side, self.side)

    def visual(self, plans: Sequence[Plan], pixels: Tensor) -> Visual:
        return Visual(pixels, layout=tuple(plan.detail for plan in plans))

    def views(self, item: Image.Image | Clip, plan: Plan) -> Sequence[Image.Image | np.ndarray]:
        """The pictures that go through the image processor, in the tower's order."""
        if isinstance(item, Clip):
            return list(item.frames)
        picture = open_image(item)
        if isinstance(plan.detail, Tiled):
            return self._tiles(picture, plan.detail)
        if self.family == "llava" and not self.authors and not self.pad:
            return [picture]
        mean = self.processor.mean or (0.0, 0.0, 0.0)
        return [squared(picture, tuple(int(value * 255) for value in mean))]

    def _tiles(self, picture: Image.Image, detail: Tiled) -> list[np.ndarray]:
        """The base view by a plain resize, then the letterboxed picture cut into tiles, row by row."""
        side, resample = self.side, self.processor.resample
        target = (detail.grid[0] * side, detail.grid[1] * side)
        tall, wide = letterbox_size((picture.height, picture.width), target)
        canvas = np.zeros((*target, 3), np.uint8)
        top, left = (target[0] - tall) // 2, (target[1] - wide) // 2
        canvas[top : top + tall, left : left + wide] = resized(picture, (wide, tall), resample)
        tiles = (canvas[y : y + side, x : x + side] for y in range(0, target[0], side) for x in range(0, target[1], side))
        return [resized(picture, (side, side), resample), *tiles]

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        detail, side, grid = plan.detail, self.side, self.grid
        square = (0.0, 0.0, float(side), float(side))
        if isinstance(detail, Frames):
            view = self.processor.affine(size)
            tokens = cells(view, square, *detail.pooled, size) * detail.count
            views = (((side, side), view),) * detail.count
            return BoxFrame(size, views, "unit", "plain", tokens=(*tokens, None), frames=detail.count)
        if isinstance(detail, Whole):
            view = self.processor.affine(size)
            padded = self.family != "llava" or self.authors or self.pad
            if padded:
                longer = max(size)
                middle = Affine.pad((longer - size[0]) // 2, (longer - size[1]) // 2)
                view = middle.then(self.processor.affine((longer, longer)))
            shown = cells(view, square, grid, grid, size)[max(0, -self.extra) :]
            tokens = [*[None] * self.extra, *shown, *([None] if detail.newline else [])]
            return BoxFrame(
                size, (((side, side), view),), "unit", "plain", tokens=tuple(tokens), unit_of_view=self.family == "llava"
            )
        base = Affine.resize(size, (side, side))
        target = (detail.grid[0] * side, detail.grid[1] * side)
        tall, wide = letterbox_size((size[1], size[0]), target)
        canvas = Affine.resize(size, (wide, tall)).then(Affine.pad((target[1] - wide) // 2, (target[0] - tall) // 2))
        tiles = [Affine.pad(-column * side, -row * side) for row in range(detail.grid[0]) for column in range(detail.grid[1])]
        views = [base, *(canvas.then(tile) for tile in tiles)]
        pixel = side / grid
        shown = [value * pixel for value in (detail.columns[0], detail.rows[0], detail.columns[1], detail.rows[1])]
        rows, columns = detail.scaled or (detail.rows[1] - detail.rows[0], detail.columns[1] - detail.columns[0])
        tokens = [*cells(base, square, grid, grid, size), *cells(canvas, shown, rows, columns, size, newline=True)]
        return BoxFrame(size, tuple(((side, side), view) for view in views), "unit", "plain", tokens=tuple(tokens))

    def positions(self, length: int, runs: Sequence[tuple[int, Run]]) -> Tensor:
        return torch.arange(length)


def squared(picture: Image.Image, colour: Any) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(picture.size)
    if picture.width == picture.height:
        return picture
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def without_crop(processor: ImageProcessor, side: int) -> ImageProcessor:
    """A processor for views that are square already."""
    return replace(processor, size=(side, side), crop=None)


def assemble(features_NSD: Tensor, layout: Sequence[Tiled | Whole | Frames], grid: int, newline_D: Tensor | None) -> Tensor:
    """Projected features of all views, (N, grid * grid, D), -> the tokens of all items end to end, (V, D)."""
    out: list[Tensor] = []
    for entry, views in zip(layout, features_NSD.split([entry.views for entry in layout]), strict=True):
        end = [] if newline_D is None else [newline_D[None].to(views.dtype)]
        if isinstance(entry, Tiled):
            out += [views[0], _joined(views[1:], entry, grid, newline_D)]
        elif isinstance(entry, Frames):
            square = views.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
            pooled = torch.nn.functional.interpolate(square, size=entry.pooled, mode="bilinear")
            out += [pooled.permute(0, 2, 3, 1).flatten(0, 2), *end]
        else:
            out += [views[0], *(end if entry.newline else [])]
    return torch.cat(out)


def _joined(tiles_NSD: Tensor, entry: Tiled, grid: int, newline_D: Tensor | None) -> Tensor:
    """Tiles -> one map -> cut to the picture -> scaled down -> a newline after each row -> (rows * (columns + 1), D)."""
    (down, across), (top, bottom), (left, right) = entry.grid, entry.rows, entry.columns
    whole = tiles_NSD.unflatten(1, (grid, grid)).unflatten(0, (down, across)).permute(4, 0, 2, 1, 3)  # D, down, row, across, column
    picture = whole.flatten(1, 2).flatten(2, 3)[:, top:bottom, left:right]
    if entry.scaled is not None:
        picture = torch.nn.functional.interpolate(picture[None], size=entry.scaled, mode="bilinear")[0]
    if newline_D is not None:
        picture = torch.cat([picture, newline_D[:, None, None].to(picture.dtype).expand(-1, picture.shape[1], 1)], dim=-1)
    return picture.flatten(1).T


def as_sizes(values: Any) -> tuple[Size, ...]:
    return tuple((int(height), int(width)) for height, width in np.asarray(values).tolist())
