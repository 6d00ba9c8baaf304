"""Pictures to pixels, equal to the last bit to what the checkpoint's own processor makes (Hugging Face's PIL back end)."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..batch import Images
from ..errors import CheckpointError, SampleError
from ..files import read_json
from ..kernels.resize import resized
from .arrays import array_of, is_rgb
from .boxes import Affine
from .image_settings import crop_of, length_of, levels_of, size_of
from .transparency import Blend, over_white, over_white_truncated

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def open_image(source: Any, blend: Blend = over_white) -> Image.Image:
    """A PIL image, a path, bytes, an open file, or an array or tensor of uint8 (`array_of`) -> an upright RGB image.

    EXIF rotation is applied as Hugging Face's `load_image` does, and transparency is laid on white as its processors do. (`load_image`
    itself drops the alpha channel of a file, so that transformers treats one picture in two ways; here it is always white.) A PIL image
    that is upright RGB already is returned as it is: whoever draws on it copies it first.

    Args:
        blend: lays a picture with transparency on white.

    Raises:
        SampleError: the bytes are not a picture, are cut short, or the path does not exist; a side has no pixels. Bytes and files with a
            `name` are named by it.
        TypeError: something else was given, or an array of another type.
    """
    given, inside = source, isinstance(source, bytes | bytearray | memoryview) or hasattr(source, "read")
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            source = Image.open(io.BytesIO(source))
        elif isinstance(source, str | os.PathLike) or inside:
            source = Image.open(source)
        elif isinstance(source, np.ndarray | Tensor):
            source = Image.fromarray(array_of(source))
        if not isinstance(source, Image.Image):
            raise TypeError(f"expected a PIL image, a path, bytes or an array, got {type(source).__name__}")
        if 0 in source.size:
            raise ValueError(f"it has {source.width} x {source.height} pixels")
        if source.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # it copies what it leaves as it is, too
            source = ImageOps.exif_transpose(source)
        if "A" in source.getbands() or source.info.get("transparency") is not None:
            source = blend(source)
        source.load()
        return source if source.mode == "RGB" else source.convert("RGB")
    except FileNotFoundError as error:
        raise SampleError(f"no such picture: {error.filename}") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, even TypeError on broken files
        if isinstance(error, TypeError) and not (inside or isinstance(given, str | os.PathLike)):
            raise
        name = given if isinstance(given, str | os.PathLike) else getattr(given, "name", "") if inside else ""
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # PIL's words name a buffer by its address in memory
            why = "it is empty" if _is_empty(given) else "it is of no picture format that Pillow knows"
        raise SampleError(f"cannot read the picture {name}: {why}" if name else f"cannot read the picture: {why}") from error


def _is_empty(given: Any) -> bool:
    try:
        length = len if hasattr(given, "__len__") and not hasattr(given, "encode") else os.path.getsize  # a str has both
        return not (given.tell() or given.read(1)) if hasattr(given, "read") else not length(given)
    except (OSError, ValueError, AttributeError):  # a stream that cannot say where it is
        return False


class LookUp:
    """Rescale and normalise uint8 by table: 256 values a channel, computed in the reference's order of roundings."""

    def __init__(self, factor: float | None, mean: Sequence[float] | None, std: Sequence[float] | None):
        levels = np.arange(256, dtype=np.float64)
        values = (levels * factor if factor is not None else levels).astype(np.float32)
        table = np.stack([values] * 3)
        if mean is not None and std is not None:
            table = (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
        self.table = table

    def __call__(self, pixels_HWC: np.ndarray, out_CHW: np.ndarray) -> None:
        for channel in range(3):
            np.take(self.table[channel], pixels_HWC[..., channel], out=out_CHW[channel], mode="clip")  # clip: no buffer, no checks

    def patches(self, pixels_PCK: np.ndarray, out_PCK: np.ndarray) -> None:
        for channel in range(3):
            out_PCK[:, channel] = np.take(self.table[channel], pixels_PCK[:, channel], mode="clip")

    def tensor(self, levels: Tensor, axis: int) -> Tensor:
        """uint8 of any shape with three channels along `axis` -> float32 of the same shape, on the same device."""
        table, out = torch.from_numpy(self.table).to(levels.device), torch.empty_like(levels, dtype=torch.float32)
        for channel in range(3):  # one at a time: an index takes four bytes
            chosen = levels.select(axis, channel)
            values = table[channel].index_select(0, chosen.flatten().int())
            out.select(axis, channel).copy_(values.view(chosen.shape))
        return out


def each(function: Callable[..., Any], *items: Any) -> list[Any]:
    """`function` of every item, on as many threads as torch has (one in a data worker): Pillow and numpy let others run meanwhile."""
    threads = min(torch.get_num_threads(), len(items[0]))
    if threads < 2:
        return [function(*item) for item in zip(*items, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *items))


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, centre crop, rescale, normalise: CLIP's and SigLIP's pixels from `preprocessor_config.json`."""

    size: tuple[int, int] | int
    """(height, width), or the length of the shortest edge."""
    crop: tuple[int, int] | None = None
    resample: int = BICUBIC
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = HALF
    std: tuple[float, ...] | None = HALF
    rounded: bool = False
    """After a shortest-edge resize the longer side is rounded (Chameleon's authors) and not truncated (torchvision, Hugging Face)."""
    letterbox: bool = False
    """Resize the longer side to fit `size`, a square, and centre the picture on `fill`: open_clip's `resize_mode: longest`."""
    fill: int = 0
    """Grey level around a letterboxed picture."""
    truncated_blend: bool = False
    """Transparency is laid on white by `over_white_truncated` (Chameleon's authors). A picture that was opened already has none left."""

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every picture that comes out.

        Raises:
            CheckpointError: the files ask for no crop after a shortest-edge resize, so pictures would differ in size.
        """
        if self.crop:
            return self.crop
        if isinstance(self.size, int):
            raise CheckpointError(
                "preprocessor_config.json resizes the shortest edge without a crop: pictures would not have one size"
            )
        return self.size

    def __call__(self, images: Sequence[Any]) -> Images:
        """N pictures -> Images with (N, 3, H, W) float32 pixels."""
        height, width = self.output_size
        lut = LookUp(self.rescale_factor, self.mean, self.std)
        out = np.empty((len(images), 3, height, width), np.float32)
        each(lambda row, image: lut(self.resized(image), row), out, images)
        return Images(torch.from_numpy(out))

    def levels(self, resized: Sequence[np.ndarray]) -> Images:
        """What `resized` gave of N pictures -> Images with (N, 3, H, W) uint8 pixels, a quarter of the bytes; `normalised` takes them."""
        out = np.empty((len(resized), 3, *self.output_size), np.uint8)
        for row, pixels_HWC in zip(out, resized, strict=True):
            row[:] = pixels_HWC.transpose(2, 0, 1)
        return Images(torch.from_numpy(out))

    def normalised(self, levels: Images) -> Images:
        """`levels`, on any device -> Images in float32 there, equal to the last bit to what calling the processor makes."""
        return replace(levels, pixels=LookUp(self.rescale_factor, self.mean, self.std).tensor(levels.pixels, 1))

    @property
    def blend(self) -> Blend:
        return over_white_truncated if self.truncated_blend else over_white

    def resized(self, image: Any) -> np.ndarray:
        """One picture -> (H, W, 3) uint8, resized and cropped but not yet normalised."""
        picture = image if is_rgb(image) else open_image(image, self.blend)
        size = picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size
        pixels = resized(picture, self._before_crop(size), self.resample)
        if self.letterbox:
            return centred(pixels, self.output_size, self.fill)
        return centre_crop(pixels, self.crop) if self.crop else pixels

    def _before_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that a picture of (width, height) is resized to."""
        if not isinstance(self.size, int):
            if self.letterbox:
                shrink = max(size[0] / self.size[1], size[1] / self.size[0])
                return max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink))
            return self.size[1], self.size[0]
        if not self.size:
            return size
        exact = self.size * max(size) / min(size)
        scaled = round(exact) if self.rounded else int(exact)
        return (self.size, scaled) if size[0] <= size[1] else (scaled, self.size)

    def affine(self, size: tuple[int, int]) -> Affine:
        """From the pixels of a picture of (width, height) to those of what comes out."""
        width, height = self._before_crop(size)
        resized = Affine.resize(size, (width, height))
        if self.letterbox:
            rows, columns = self.output_size
            return resized.then(Affine.pad((columns - width) // 2, (rows - height) // 2))
        return resized.then(Affine.pad(-((width - self.crop[1]) // 2), -((height - self.crop[0]) // 2))) if self.crop else resized

    def for_size(self, side: int) -> ImageProcessor:
        """The same recipe for a square of `side` pixels."""
        return replace(self, size=side if isinstance(self.size, int) else (side, side), crop=(side, side) if self.crop else None)

    @classmethod
    def from_hf(cls, config: dict[str, Any], defaults: dict[str, Any]) -> ImageProcessor:
        """Read an image processor's JSON; `defaults` are the class attributes of that Hugging Face class.

        Raises:
            CheckpointError: a setting that is not of its kind, by its name.
        """
        get = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        size = size_of(get["size"]) if get.get("do_resize", True) else 0
        cropped = get.get("do_center_crop") and get.get("crop_size") is not None
        return cls(size, crop_of(get["crop_size"]) if cropped else None, **levels_of(get))

    def to_hf(self, family: str) -> dict[str, Any]:
        """Raises CheckpointError: the recipe is open_clip's letterbox, which no processor of transformers has."""
        if self.letterbox:
            raise CheckpointError(
                "these pictures are letterboxed (open_clip's resize_mode: longest), which no CLIP or SigLIP processor of transformers "
                "does; save with layout='open_clip', or set processor.images to another ImageProcessor first"
            )
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else {"height": self.size[0], "width": self.size[1]}
        resize = {"do_resize": True, "size": size} if self.size else {"do_resize": False}
        name = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[family]
        crop: dict[str, Any] = {"do_center_crop": False}
        if self.crop:
            crop = {"do_center_crop": True, "crop_size": {"height": self.crop[0], "width": self.crop[1]}}
        return {
            "image_processor_type": name,
            "do_convert_rgb": True,
            **resize,
            **crop,
            "resample": int(self.resample),
            "do_rescale": self.rescale_factor is not None,
            "rescale_factor": self.rescale_factor or 1 / 255,
            "do_normalize": self.mean is not None,
            "image_mean": list(self.mean or HALF),
            "image_std": list(self.std or HALF),
        }


@dataclass(frozen=True)
class NaflexProcessor:
    """SigLIP 2's native aspect ratio: resize to whole patches, at most `max_patches`, and cut into packed patches.

    A patch is flattened (row, column, channel), as Hugging Face's `Siglip2ImageProcessor` does. There is no padding.
    """

    patch_size: int = 16
    max_patches: int = 256
    resample: int = BILINEAR
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = HALF
    std: tuple[float, ...] | None = HALF

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches for a picture of this size in pixels."""
        return naflex_grid(height, width, self.patch_size, self.max_patches)

    def __call__(self, images: Sequence[Any]) -> Images:
        """Pictures -> Images with (P, patch * patch * 3) float32 patches, those of all pictures end to end."""
        return self.normalised(self.levels(each(self.resized, images)))

    def resized(self, image: Any) -> np.ndarray:
        """One picture -> (H, W, 3) uint8, whole patches, not yet normalised."""
        picture, patch = open_image(image), self.patch_size
        rows, columns = self.grid(*picture.size)
        return resized(picture, (columns * patch, rows * patch), self.resample)

    def levels(self, resized: Sequence[np.ndarray]) -> Images:
        """What `resized` gave -> Images with (P, patch * patch * 3) uint8 patches, a quarter of the bytes; `normalised` takes them."""
        patch, pieces, grids = self.patch_size, [np.empty((0, self.patch_size**2 * 3), np.uint8)], []
        for pixels_HWC in resized:
            rows, columns = pixels_HWC.shape[0] // patch, pixels_HWC.shape[1] // patch
            cut = pixels_HWC.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
            pieces.append(cut.reshape(rows * columns, -1))
            grids.append((rows, columns))
        return Images(torch.from_numpy(np.concatenate(pieces)), tuple(grids))

    def normalised(self, levels: Images) -> Images:
        """As `ImageProcessor.normalised`."""
        colours = levels.pixels.unflatten(1, (-1, 3))
        values = LookUp(self.rescale_factor, self.mean, self.std).tensor(colours, 2)
        return replace(levels, pixels=values.flatten(1))

    @classmethod
    def from_hf(cls, config: dict[str, Any], defaults: dict[str, Any]) -> NaflexProcessor:
        get = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        return cls(
            length_of(get["patch_size"], "patch_size"), length_of(get["max_num_patches"], "max_num_patches"), **levels_of(get)
        )

    def to_hf(self, family: str) -> dict[str, Any]:
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "patch_size": self.patch_size,
            "max_num_patches": self.max_patches,
            "resample": int(self.resample),
            "do_rescale": self.rescale_factor is not None,
            "rescale_factor": self.rescale_factor or 1 / 255,
            "do_normalize": self.mean is not None,
            "image_mean": list(self.mean or HALF),
            "image_std": list(self.std or HALF),
        }


# Class attributes of the Hugging Face processors: a file may leave out what equals them.
CLIP_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
SIGLIP_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
}
SIGLIP2_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "max_num_patches": 256,
    "resample": BILINEAR,
    "image_mean": HALF,
    "image_std": HALF,
}


def naflex_grid(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns): the largest whole-patch size of the same shape within `max_patches`, each side at least one patch.

    The binary search, its bounds and its stopping width are the authors' (big_vision `pp/proj/image_text/ops_naflex.py:47-79`):
    another search would land on another grid for some sizes.
    """

    def patches(scale: float, side: int) -> int:
        return max(1, math.ceil(side * scale / patch))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if patches(middle, height) * patches(middle, width) <= max_patches:
            low = middle
        else:
            high = middle
    return patches(low, height), patches(low, width)


def centre_crop(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop the middle, padding with black where the picture is smaller; Hugging Face's rounding (`image_transforms.center_crop`)."""
    height, width = pixels_HWC.shape[:2]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    if top >= 0 and left >= 0:
        return pixels_HWC[top : top + size[0], left : left + size[1]]
    tall, wide = max(size[0], height), max(size[1], width)
    canvas = np.zeros((tall, wide, pixels_HWC.shape[2]), pixels_HWC.dtype)
    down, right = -((height - tall) // 2), -((width - wide) // 2)  # ceil((tall - height) / 2)
    canvas[down : down + height, right : right + width] = pixels_HWC
    top, left = top + down, left + right
    return canvas[max(0, top) : min(tall, top + size[0]), max(0, left) : min(wide, left + size[1])]


def centred(pixels_HWC: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """A picture in the middle of (height, width); an odd row or column left over goes below and to the right."""
    height, width = pixels_HWC.shape[:2]
    out = np.full((*size, 3), fill, np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    out[top : top + height, left : left + width] = pixels_HWC
    return out


def read_processor(folder: Path, kind: str = "image") -> dict[str, Any]:
    """The "image" or "video" processor's settings, in the order in which transformers looks for them: in `processor_config.json`
    (transformers 5), then `video_preprocessor_config.json` for clips, then `preprocessor_config.json` for both (4)."""
    nested = folder / "processor_config.json"
    if nested.exists():
        config = read_json(nested)
        if isinstance(config.get(f"{kind}_processor"), dict):
            return config[f"{kind}_processor"]
    names = ["preprocessor_config.json"] if kind == "image" else ["video_preprocessor_config.json", "preprocessor_config.json"]
    return next((read_json(folder / name) for name in names if (folder / name).exists()), {})
