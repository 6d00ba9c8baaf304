"""Pillow's resize, to the bit, several pixels at once (`resize.cpp`). What the kernel cannot take goes through Pillow itself."""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache, lru_cache

import numpy as np
import PIL
import pyarrow
from PIL import Image

from .build import library

POINT = 22
"""Bits of a weight after the point."""
MOST_SCALE = 64
"""How many pixels may become one: the weights of more take longer to find than Pillow takes in all."""
_ONE = threading.RLock()


def _sinc(x: np.ndarray) -> np.ndarray:
    safe = np.where(x == 0, 1.0, x * math.pi)
    return np.where(x == 0, 1.0, np.sin(safe) / safe)


def _bilinear(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


FILTERS = {
    Image.Resampling.BILINEAR: (_bilinear, 1.0),
    Image.Resampling.BICUBIC: (_bicubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}
"""By which function an input's distance becomes its weight, and up to which distance. Source: Pillow, `libImaging/Resample.c`."""


class _Axis(ctypes.Structure):
    _fields_ = (("first", c_void_p), ("weights", c_void_p), ("taps", c_int64), ("outputs", c_int64))


ORDERS: tuple[Callable[[int, int, int, int], bool], ...] = (
    lambda width, height, out_width, out_height: out_height < height and height - out_height > 2 * (width - out_width),
    lambda *sizes: False,
)
"""Whether rows come before columns, which changes the rounding: by Pillow 13 (found by its answers), and by those before 12.2. Between
them there was a third rule."""
PROBES = (
    (40, 30, 21, 17),
    (30, 60, 22, 40),
    (30, 60, 22, 44),
    (30, 60, 22, 45),
    (21, 16, 60, 15),
    (9, 8, 20, 31),
    (20, 2040, 11, 34),
)


@lru_cache(32)
def weights(size: int, out: int, resample: int, times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(out,) where the inputs of each output begin, and (out, taps) their weights, by Pillow's arithmetic (`precompute_coeffs`,
    `normalize_coeffs_8bpc`): doubles, added in the order of the inputs.

    Args:
        times: the taps are a multiple of it, with weights of 0, and each weight stands there as often. They lie within `size`, if that
            many do.
    """
    function, reach = FILTERS[Image.Resampling(resample)]
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), size)
    taps = -(-int((last - first).max()) // times) * times
    exact, total = np.zeros((out, taps)), np.zeros(out)
    for tap in range(taps):
        exact[:, tap] = np.where(tap < last - first, function((tap + first - centre + 0.5) * (1.0 / stretch)), 0.0)
        total += exact[:, tap]
    exact = np.divide(exact, total[:, None], out=exact, where=total[:, None] != 0)
    numbers = (exact * (1 << POINT) + np.where(exact < 0, -0.5, 0.5)).astype(np.int32)  # towards zero, as C does
    begin = np.maximum(np.minimum(first, size - taps), 0)
    for row in np.flatnonzero(begin < first):  # at the end: the zeros come first
        numbers[row] = np.roll(numbers[row], first[row] - begin[row])
    return begin.astype(np.int32), numbers.repeat(times, axis=1)


def _axis(size: int, out: int, resample: int, times: int) -> tuple[_Axis, tuple[np.ndarray, ...]]:
    """And the arrays at whose addresses it looks."""
    if size == out:
        return _Axis(None, None, 0, out), ()
    first, numbers = weights(size, out, resample, times)
    return _Axis(first.ctypes.data, numbers.ctypes.data, numbers.shape[1] // times, out), (first, numbers)


def _by_kernel(
    kernels: ctypes.CDLL, levels: np.ndarray, size: tuple[int, int], resample: int, down_first: bool
) -> np.ndarray | None:
    """(H, W, 3 or 4) uint8 resized; None where it takes more taps than a row has pixels or than `MOST_SCALE` allows, or memory that is not
    there."""
    height, width, channels = levels.shape
    if width > MOST_SCALE * size[0] or height > MOST_SCALE * size[1]:
        return None
    (across, kept), (down, also_kept) = _axis(width, size[0], resample, 4), _axis(height, size[1], resample, 1)
    if across.taps > width:
        return None
    out = np.empty((size[1], size[0], 3), np.uint8)
    failed = kernels.resize(
        c_void_p(levels.ctypes.data), c_int64(channels), c_int64(width), c_int64(height), ctypes.byref(across), ctypes.byref(down),
        c_int64(down_first), c_void_p(out.ctypes.data),
    )  # fmt: skip
    del kept, also_kept  # alive until here
    return None if failed else out


def order() -> Callable[[int, int, int, int], bool] | None:
    """Of `ORDERS` the one by which the Pillow that is installed resizes, found by trying; None, with a warning, if it is another one."""
    with _ONE:  # threads that ask at once
        return _order()


@cache
def _order() -> Callable[[int, int, int, int], bool] | None:
    kernels, noise = library("resize"), np.random.default_rng(0)
    if kernels is None:
        return None
    pictures = [noise.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height, *_ in PROBES]
    for rule in ORDERS:
        if all(
            np.array_equal(
                _by_kernel(kernels, levels, sizes[2:], resample, rule(*sizes)),  # pyright: ignore[reportArgumentType]
                np.asarray(Image.fromarray(levels).resize(sizes[2:], resample)),
            )
            for levels, sizes in zip(pictures, PROBES, strict=True)
            for resample in FILTERS
        ):
            return rule
    warnings.warn(
        f"Pillow {PIL.__version__} resizes otherwise than the versions known here, so it does all resizing, slower", stacklevel=4
    )
    return None


def _levels(picture: Image.Image | np.ndarray) -> np.ndarray | None:
    """(H, W, 3 or 4) uint8, where it can be without a copy; None of what the kernel does not take: other modes or numbers, and a picture so
    large that it does not lie in one piece."""
    if isinstance(picture, np.ndarray):
        return np.ascontiguousarray(picture) if picture.dtype == np.uint8 and picture.shape[2:] == (3,) else None
    if picture.mode != "RGB":
        return None
    if not hasattr(picture, "__arrow_c_array__"):  # before Pillow 11.2
        return np.asarray(picture)
    try:
        return pyarrow.array(picture).values.to_numpy().reshape(picture.height, picture.width, 4)
    except ValueError:
        return None


def resized(picture: Image.Image | np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """An RGB picture, or (H, W, 3) uint8, at (width, height) -> (H, W, 3) uint8, equal to what Pillow's `resize` gives to the bit. What
    has this size already is not copied."""
    if size == (picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]):
        return np.asarray(picture)
    rule = order() if resample in FILTERS and min(size) > 0 else None
    levels = _levels(picture) if rule is not None else None
    if rule is not None and levels is not None and levels.size:
        kernels = library("resize")
        assert kernels is not None
        out = _by_kernel(kernels, levels, size, resample, rule(levels.shape[1], levels.shape[0], *size))
        if out is not None:
            return out
    whole = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return np.asarray(whole.resize(size, Image.Resampling(resample)))
