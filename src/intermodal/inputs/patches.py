"""Native resolution: how Qwen-VL models size a picture or clip, cut it into patches, and write it into the prompt.

Sources: `qwen_vl_utils/vision_process.py` (sizes, clip budget), Hugging Face `image_processing_pil_qwen2_vl.py` (patch order),
`processing_qwen3_vl.py` (timestamps). Where these disagree see `QwenVLConfig.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from ..batch import Visual
from ..kernels.resize import resized
from .boxes import Affine, BoxFrame, Style, cells
from .image import CLIP_MEAN, CLIP_STD, HALF, LookUp, each, open_image
from .image_settings import levels_of
from .media import Bounds, Clip, MediaError, Piece, Plan, Run, bounds_of, mrope_positions

MOST_ASPECT = 200
BOX_TAGS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
VIDEO_TOKENS = (128, 768)
"""The authors' least and most tokens of one frame (pair)."""
CLIP_TOKENS = 128_000 * 0.9
"""The authors' budget of a whole clip, where its part has no `total_pixels`."""
SIZED_TOKENS = (4, 16_384)
"""The authors' least and most tokens of a size that a part asks for."""


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, *, utils: bool = False
) -> tuple[int, int]:
    """(height, width) in whole multiples of `factor`, near the picture's own size and within the pixel budget.

    Python's rounding (half to even) and the factor beta from the original size are part of the rule.

    Args:
        utils: as qwen-vl-utils rounds: a side under half a factor is one factor. transformers' rounds it to none, by which the picture
            has too few pixels and is made larger on both sides by one measure.

    Raises:
        MediaError: one side is more than 200 times the other.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise MediaError(f"a picture of {width} x {height} pixels is more than {MOST_ASPECT} times longer than wide; crop it")
    tall, wide = (max(factor if utils else 0, round(side / factor) * factor) for side in (height, width))
    if tall * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        tall, wide = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif tall * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        tall, wide = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return tall, wide


def resize_clip(frames: int, height: int, width: int, factor: int, temporal: int, least: float, most: float) -> tuple[int, int]:
    """transformers' rule for Qwen3-VL: as `smart_resize`, with a budget for frames x height x width of the whole clip."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise MediaError(f"a clip of {width} x {height} pixels is more than {MOST_ASPECT} times longer than wide; crop it")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    count = round(frames / temporal) * temporal
    if count * tall * wide > most:
        beta = math.sqrt(frames * height * width / most)
        tall, wide = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif count * tall * wide < least:
        beta = math.sqrt(least / (frames * height * width))
        tall, wide = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return tall, wide


def block_patches(pixels_HWC: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """One frame -> (P, C, patch * patch) in block-major order.

    The merge x merge patches of one token are neighbours; a raster order would load and scramble them.
    """
    height, width, channels = pixels_HWC.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = pixels_HWC.reshape(rows, merge, patch, columns, merge, patch, channels)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch * patch)


def _budget(settings: dict[str, Any]) -> tuple[int | None, int | None]:
    """Least and most pixels as a processor's file gives them; None where it does not."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    return least, settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")


@dataclass
class QwenPlanner:
    """Tokens, pixels and positions of media for Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

    family: str
    placeholders: dict[str, int]
    vision_start: str
    """Text of the token before media, and of the one after."""
    vision_end: str
    names: dict[str, str]
    """Text of the placeholders."""
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    video_pixels: tuple[int, int] = (128 * 28 * 28, 768 * 28 * 28)
    """transformers' rule: least and most pixels, of a frame or (Qwen3-VL) of the clip."""
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    resample: int = 3
    rescale_factor: float | None = 1 / 255
    tokens_per_second: float = 1.0
    authors: bool = True
    _table: LookUp | None = field(default=None, repr=False)

    @classmethod
    def from_hf(cls, config: Any, settings: dict[str, Any], video: dict[str, Any], tokenizer: Tokenizer) -> QwenPlanner:
        """From a model's config and the JSON of its image processor and of its video processor.

        Raises:
            CheckpointError: a setting that is not of its kind, by its name.
        """
        vision, third = config.vision, config.family == "qwen3_vl"
        least, most = _budget(settings)
        clip, unit = _budget(video), (32 if third else 28) ** 2
        name, given = tokenizer.id_to_token, {key: value for key, value in settings.items() if value is not None}
        usual = {"resample": 3, "image_mean": HALF if third else CLIP_MEAN, "image_std": HALF if third else CLIP_STD}
        placeholders = {"image": config.image_id, "video": config.video_id}
        return cls(
            family=config.family,
            placeholders=placeholders,
            vision_start=name(config.vision_start_id) or "<|vision_start|>",
            vision_end=name(config.vision_end_id) or "<|vision_end|>",
            names={kind: str(name(token)) for kind, token in placeholders.items()},
            patch=vision.patch_size,
            temporal=vision.temporal_patch,
            merge=vision.merge,
            min_pixels=least or 56 * 56,
            max_pixels=most or 28 * 28 * 1280,
            video_pixels=(clip[0] or unit * VIDEO_TOKENS[0], clip[1] or unit * VIDEO_TOKENS[1]),
            **levels_of(usual | given),
            tokens_per_second=config.tokens_per_second,
            authors=config.rules == "authors",
        )

    @property
    def factor(self) -> int:
        """Pixels of a side of one token."""
        return self.patch * self.merge

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        if not isinstance(item, Clip):
            asked = bounds_of(item)
            # the authors show a picture that asks for nothing by transformers' image processor; a clip's total_pixels say nothing of it
            utils = asked is not None and any((asked.min_pixels, asked.max_pixels, asked.resized_height))
            size = self._size(item.size, asked, self.min_pixels, self.max_pixels, utils)
            grid = (1, size[0] // self.factor, size[1] // self.factor)
            return Plan("image", self.placeholders["image"], ((Piece(grid=grid),),), detail=self._patches(1, size))
        size = self.clip_size(item)
        count = -(-len(item.frames) // self.temporal)
        rows, columns = size[0] // self.factor, size[1] // self.factor
        placeholder = self.placeholders["video"]
        if self.family != "qwen3_vl":
            step = self.tokens_per_second * self.temporal / item.fps if self.family == "qwen2_5_vl" else 1.0
            return Plan(
                "video", placeholder, ((Piece(grid=(count, rows, columns), step=step),),), detail=self._patches(count, size)
            )
        wrapped = f"{self.vision_start}{self.names['video']}{self.vision_end}"
        text = "".join(f"<{time:.1f} seconds>{wrapped}" for time in self.timestamps(item))
        runs: tuple[Run, ...] = ((Piece(grid=(1, rows, columns)),),) * count
        return Plan("video", placeholder, runs, text, wrapped if self.authors else self.names["video"], self._patches(count, size))

    def _size(self, size: tuple[int, int], asked: Bounds | None, least: float, most: float, utils: bool) -> tuple[int, int]:
        """(height, width) of a picture of (width, height), or of every frame of a clip.

        Args:
            asked: what its part says; least and most are what the model's files say. A wish goes before a file.
            utils: by qwen-vl-utils' rounding; see `smart_resize`.
        """
        if asked and asked.resized_height and asked.resized_width:
            sized = (self.factor**2 * tokens for tokens in SIZED_TOKENS)
            return smart_resize(round(asked.resized_height), round(asked.resized_width), self.factor, *sized, utils=utils)
        if asked and asked.max_pixels:
            most, least = asked.max_pixels, min(least, asked.max_pixels)
        if asked and asked.min_pixels:
            least, most = asked.min_pixels, max(most, asked.min_pixels)
        return smart_resize(size[1], size[0], self.factor, least, most, utils=utils)

    def _patches(self, count: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """(frames or frame pairs, rows, columns) of patches: the detail of a plan."""
        return count, size[0] // self.patch, size[1] // self.patch

    def timestamps(self, clip: Clip) -> list[float]:
        """Seconds of each frame pair: the mean of its first and last frame, an odd last frame counted twice."""
        times = [*clip.times, *[clip.times[-1]] * (-len(clip.times) % self.temporal)]
        return [(times[at] + times[at + self.temporal - 1]) / 2 for at in range(0, len(times), self.temporal)]

    def clip_size(self, clip: Clip) -> tuple[int, int]:
        """(height, width) of every frame, by the authors' budget or by transformers'. Where the part asks for a size, by the authors':
        transformers knows no such parts, and qwen-vl-utils has made the frames before it sees them."""
        width, height = clip.size
        frames, unit, asked = len(clip.frames), self.factor**2, bounds_of(clip)
        if self.authors or asked:
            least = (asked and asked.min_pixels) or VIDEO_TOKENS[0] * unit
            whole = (asked and asked.total_pixels) or CLIP_TOKENS * unit
            pairs = -(-frames // self.temporal)  # an odd clip's last frame counts twice
            most = max(min(VIDEO_TOKENS[1] * unit, whole / pairs), int(least * 1.05))
            if asked and asked.max_pixels:  # no more than the clip's budget leaves each frame
                asked = replace(asked, max_pixels=min(asked.max_pixels, most))
            return self._size(clip.size, asked, least, most, utils=True)
        if self.family == "qwen3_vl":
            return resize_clip(frames, height, width, self.factor, self.temporal, *self.video_pixels)
        return smart_resize(height, width, self.factor, *self.video_pixels)

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        ends = np.cumsum([0, *(math.prod(plan.detail) for plan in plans)]).tolist()
        out = np.empty((ends[-1], 3, self.temporal, self.patch**2), np.float32)
        if items:
            each(self._fill, items, plans, [out[start:stop] for start, stop in pairwise(ends)])
        return torch.from_numpy(out.reshape(len(out), 3 * self.temporal * self.patch**2))

    def _fill(self, item: Image.Image | Clip, plan: Plan, out_PCTK: np.ndarray) -> None:
        """One item's patches. Bytes are laid out in patches first: they are a quarter of the numbers that they become."""
        table = self._table = self._table or LookUp(self.rescale_factor, self.mean, self.std)
        count, rows, columns = plan.detail
        pictures = item.frames if isinstance(item, Clip) else [open_image(item)]
        size, each_frame = (columns * self.patch, rows * self.patch), out_PCTK.reshape(count, rows * columns, *out_PCTK.shape[1:])
        for index in range(count * self.temporal):
            frame, place = divmod(index, self.temporal)
            target = each_frame[frame, :, :, place]
            if index < len(pictures):
                pixels = resized(pictures[index], size, self.resample)
                table.patches(block_patches(pixels, self.patch, self.merge), target)
            else:  # a still is shown twice, an odd clip's last frame again
                target[:] = each_frame[(index - 1) // self.temporal, :, :, (index - 1) % self.temporal]

    def visual(self, plans: Sequence[Plan], pixels: Tensor) -> Visual:
        return Visual(pixels, tuple(plan.detail for plan in plans))

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        count, rows, columns = plan.detail
        resized = (columns * self.patch, rows * self.patch)
        view = Affine.resize(size, resized)
        tokens = cells(view, (0, 0, *resized), rows // self.merge, columns // self.merge, size) * count
        style: Style = "tags" if self.family == "qwen2_vl" else "json"
        convention = "resized" if self.family == "qwen2_5_vl" else "thousandths"
        return BoxFrame(size, ((resized, view),), convention, style, BOX_TAGS, tuple(tokens), count)

    def positions(self, length: int, runs: Sequence[tuple[int, Run]]) -> Tensor:
        return mrope_positions(length, runs, past_time=self.authors)
