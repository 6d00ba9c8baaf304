"""Pictures that are given as arrays or tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def array_of(source: np.ndarray | Tensor) -> np.ndarray:
    """A picture's levels as (H, W[, C]) in an array that Pillow takes.

    Of three axes the first may be the channels, as in most tensors: where either could be, an array's are last and a tensor's first.

    Raises:
        TypeError: other numbers than uint8 (or, with two axes, bool), whose range could only be guessed; axes of no picture.
    """
    if source.dtype not in ((torch.uint8, torch.bool, np.uint8, np.bool_) if source.ndim == 2 else (torch.uint8, np.uint8)):
        raise TypeError(f"an array of a picture holds uint8, 0 to 255, and not {source.dtype}; scale and convert it first")
    channels, firsts = (1, 2, 3, 4), isinstance(source, Tensor)
    levels = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
    if levels.ndim == 3 and levels.shape[0] in channels and (firsts or levels.shape[2] not in channels):
        levels = levels.transpose(1, 2, 0)
    if levels.ndim not in (2, 3) or (levels.ndim == 3 and levels.shape[2] not in channels):
        raise TypeError(f"an array of a picture has axes (H, W), (H, W, C) or (C, H, W), and not {tuple(source.shape)}")
    return np.ascontiguousarray(levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)


def is_rgb(image: Any) -> bool:
    """Whether this is an RGB picture as an array already, such as a tile or a frame."""
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0
