"""What an image processor's JSON says, checked as it is read: a wrong value would be met at the first picture, or never."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from ..errors import CheckpointError


def size_of(value: Any) -> tuple[int, int] | int:
    """`size`: the shortest edge, or (height, width). A number alone is the shortest edge.

    Raises:
        CheckpointError: it says something else, as `longest_edge` alone does.
    """
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return length_of(value["shortest_edge"], "size.shortest_edge")
        return _sides(value, "size", "shortest_edge, or height and width")
    if isinstance(value, list | tuple):
        return _sides(value, "size", "shortest_edge, or height and width")
    return length_of(value, "size")


def crop_of(value: Any) -> tuple[int, int]:
    """`crop_size`: (height, width); a number alone is a square's side.

    Raises:
        CheckpointError: it says something else.
    """
    if isinstance(value, dict | list | tuple):
        return _sides(value, "crop_size", "height and width")
    side = length_of(value, "crop_size")
    return side, side


def levels_of(settings: dict[str, Any]) -> dict[str, Any]:
    """`resample`, `rescale_factor`, `mean` and `std` by those names; None for what the settings leave out (`do_rescale` false).

    Raises:
        CheckpointError: a filter that is not one of Pillow's numbers, or three channels' numbers that are none; a std of 0 would make
            every pixel infinite or NaN.
    """
    normal, rescaled = settings.get("do_normalize", True), settings.get("do_rescale", True)
    resample, factor = settings["resample"], settings.get("rescale_factor", 1 / 255)
    filters = {int(each): each.name.lower() for each in Image.Resampling}
    if not _is_number(resample) or resample not in filters:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(filters.items()))
        raise _wrong("resample", resample, f"one of {known}")
    if rescaled and not (_is_number(factor) and factor > 0):
        raise _wrong("rescale_factor", factor, "a number above 0")
    mean, std = settings["image_mean"], settings["image_std"]
    if normal and not _three(mean):
        raise _wrong("image_mean", mean, "three numbers")
    if normal and not (_three(std) and all(value > 0 for value in std)):
        raise _wrong("image_std", std, "three numbers above 0")
    return {
        "resample": int(resample),
        "rescale_factor": factor if rescaled else None,
        "mean": tuple(mean) if normal else None,
        "std": tuple(std) if normal else None,
    }


def _sides(value: Any, name: str, wanted: str) -> tuple[int, int]:
    sides = [value.get("height"), value.get("width")] if isinstance(value, dict) else list(value)
    if len(sides) != 2 or None in sides:
        raise _wrong(name, value, wanted)
    return length_of(sides[0], name), length_of(sides[1], name)


def length_of(value: Any, name: str) -> int:
    """Raises CheckpointError: the setting of this name is no whole number above 0."""
    if not (_is_number(value) and value == int(value) and value > 0):
        raise _wrong(name, value, "a whole number above 0")
    return int(value)


def _three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    """A finite number; true is none, though Python takes it for 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"the image processor's settings (preprocessor_config.json): {name} is {value!r}; wanted is {wanted}")
