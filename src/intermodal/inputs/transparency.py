"""Pictures with transparency, laid on white: in two ways, which differ in how they round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Blend = Callable[[Image.Image], Image.Image]


def over_white(picture: Image.Image) -> Image.Image:
    """A picture with transparency -> RGB, laid on white as Hugging Face's processors do: Pillow's compositing, which rounds."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")


def over_white_truncated(picture: Image.Image) -> Image.Image:
    """The same as Chameleon's authors do (`image_tokenizer.py`), in floats that are then truncated: up to three levels lower."""
    values_HWC = np.asarray(picture.convert("RGBA"))
    alpha = values_HWC[..., 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * values_HWC[..., :3]).astype(np.uint8))
