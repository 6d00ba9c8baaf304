"""Where things are, through every resize, pad and tile: a stored affine for each picture, and each family's way of writing boxes.

A box is (left, top, right, bottom), edges in pixels. Families differ: Qwen2.5-VL writes pixels of the resized picture, the other Qwen
models thousandths of the picture, LLaVA parts of one of the padded square (PITFALLS 6.7; QwenLM/Qwen3-VL issues 721, 866, 1486).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

Box = tuple[float, float, float, float]
Style = Literal["tags", "json", "plain"]


@dataclass(frozen=True)
class Affine:
    """x -> x * scale + shift, an axis at a time."""

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def __call__(self, box: Sequence[float]) -> Box:
        (a, b), (c, d) = self.scale, self.shift
        left, top, right, bottom = box
        return left * a + c, top * b + d, right * a + c, bottom * b + d

    def then(self, after: Affine) -> Affine:
        """This, and `after` of what comes out."""
        (a, b), (c, d) = self.scale, self.shift
        (e, f), (g, h) = after.scale, after.shift
        return Affine((a * e, b * f), (c * e + g, d * f + h))

    def inverse(self) -> Affine:
        (a, b), (c, d) = self.scale, self.shift
        return Affine((1 / a, 1 / b), (-c / a, -d / b))

    @staticmethod
    def resize(before: tuple[float, float], after: tuple[float, float]) -> Affine:
        """From a picture of one (width, height) to the same at another."""
        return Affine((after[0] / before[0], after[1] / before[1]))

    @staticmethod
    def pad(left: float, top: float) -> Affine:
        return Affine(shift=(left, top))


@dataclass(frozen=True)
class BoxFrame:
    """One picture's coordinate spaces.

    `views` are the pictures that the tower sees, each with its (width, height) and the affine from original pixels to its own.
    """

    size: tuple[int, int]
    """(width, height) of the original picture."""
    views: tuple[tuple[tuple[int, int], Affine], ...]
    convention: Literal["resized", "thousandths", "unit"]
    style: Style = "tags"
    tags: tuple[str, str, str, str] = ("", "", "", "")
    """Before and after a label, before and after a box."""
    tokens: tuple[Box | None, ...] = ()
    """For each visual token the part of the original picture that it stands on; None for newlines and the like."""
    frames: int = 1
    """A clip's tokens show this many of its frames (or pairs of frames), one after another."""
    unit_of_view: bool = False
    """Parts of one count along the (padded) first view and not along the picture."""

    def space(self, name: str) -> Affine:
        """From original pixels to "original", "resized" (the first view), "thousandths" or "unit", or to "view N".

        Raises:
            ValueError: there is no such space.
        """
        if name == "original":
            return Affine()
        if name == "resized":
            return self.views[0][1]
        if name in ("thousandths", "unit"):
            most = 1000.0 if name == "thousandths" else 1.0
            if self.unit_of_view:
                side, view = self.views[0]
                return view.then(Affine.resize(side, (most, most)))
            return Affine.resize(self.size, (most, most))
        number = name.removeprefix("view ")
        if name.startswith("view ") and number.isdigit() and int(number) < len(self.views):
            return self.views[int(number)][1]
        raise ValueError(
            f"there is no space {name!r}: original, resized, thousandths, unit, or view 0 to view {len(self.views) - 1}"
        )

    def convert(self, box: Sequence[float], source: str = "original", target: str | None = None) -> Box:
        """A box from one space in another; the model's own by default. Nothing is rounded."""
        return self.space(source).inverse().then(self.space(target or self.convention))(box)

    def write(self, box: Sequence[float], label: str = "") -> str:
        """A box of the original picture as this model writes it, cut to the picture.

        Raises:
            ValueError: this is no box; no part of it lies in the picture; the label is no text, or holds a mark that ends labels.
        """
        width, height = self.size
        box = _checked(box)
        if not isinstance(label, str):
            raise ValueError(f"the label of a box is a text, and not {short(label)}")
        left, top, right, bottom = (min(max(value, 0), most) for value, most in zip(box, (width, height) * 2, strict=True))
        if left >= right or top >= bottom:
            raise ValueError(f"the box {box} has no area in a picture of {width} x {height} pixels")
        values = self.convert((left, top, right, bottom))
        if self.style == "plain":
            return f"[{', '.join(f'{value:.2f}' for value in values)}]"
        whole = [round(value) for value in values]
        if self.style == "json":
            return json.dumps({"bbox_2d": whole} | ({"label": label} if label else {}), ensure_ascii=False)
        before, after, start, stop = self.tags
        if label and (before in label or after in label):
            raise ValueError(
                f"the label {label!r} holds {before} or {after}, between which labels stand: it could not be read back"
            )
        named = f"{before}{label}{after}" if label else ""
        return f"{named}{start}({whole[0]},{whole[1]}),({whole[2]},{whole[3]}){stop}"

    def read(self, text: str) -> list[tuple[str, Box]]:
        """Every (label, box of the original picture) in a reply; what is not a box is passed over."""
        back = self.space(self.convention).inverse()
        found = [(label, back(values)) for label, values in self._found(text)]
        return [(label, box) for label, box in found if all(map(math.isfinite, box))]  # hundreds of digits, NaN, Infinity

    def _found(self, text: str) -> list[tuple[str, Box]]:
        number = r"\s*(-?\d+(?:\.\d+)?)\s*"
        if self.style == "plain":
            pattern = rf"\[{','.join([number] * 4)}\]"
            return [("", _box(match.groups())) for match in re.finditer(pattern, text)]
        if self.style == "json":
            return list(_json_boxes(text))
        before, after, start, stop = map(re.escape, self.tags)
        label = rf"(?P<label>(?:(?!{before}|{after}).)*)"
        pattern = rf"(?:{before}{label}{after})?{start}\({number},{number}\)\s*,\s*\({number},{number}\){stop}"
        return [(match["label"] or "", _box(match.groups()[1:])) for match in re.finditer(pattern, text, re.DOTALL)]


def _json_boxes(text: str) -> Iterator[tuple[str, Box]]:
    """(label, box) of the objects with a "bbox_2d" in a text that need not be JSON elsewhere; of objects in objects too."""
    at, read = text.find("{"), json.JSONDecoder().raw_decode
    while at >= 0:
        after = at + 1
        try:
            entry, stop = read(text, at)
            found = str(entry.get("label") or ""), _box(_four_numbers(entry["bbox_2d"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # braces that hold something else
            pass
        else:
            yield found
            after = stop
        at = text.find("{", after)


def _box(values: Sequence[str | float]) -> Box:
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom


def _four_numbers(value: Any) -> list[float]:
    """Raises ValueError: the value is no list of four numbers. A text of four digits and booleans are none, though float() takes them."""
    values = value.tolist() if hasattr(value, "tolist") else value  # an array's or tensor's
    if not isinstance(values, list | tuple) or len(values) != 4:
        raise ValueError("no list of four")
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in values):
        raise ValueError("no numbers")
    return list(values)


def _checked(value: Any) -> Box:
    """The box that a person gives. Raises ValueError: it is none; with what was given."""
    try:
        box = _box(_four_numbers(value))
    except (ValueError, OverflowError):
        box = None
    if box is None or not all(map(math.isfinite, box)):
        raise ValueError(f"a box is four finite numbers [left, top, right, bottom], and not {short(value)}")
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError(f"a box is [left, top, right, bottom] with left <= right and top <= bottom, and not {short(value)}")
    return box


def short(value: Any) -> str:
    """What was given, as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = "a value with thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def cells(
    view: Affine, area: Sequence[float], rows: int, columns: int, size: tuple[int, int], *, newline: bool = False
) -> list[Box | None]:
    """What each cell of a grid over `area` (a box of a view) shows of the original picture, row by row, cut to the picture.

    Args:
        rows, columns: 0 where a picture is thinner than one cell: what is left are the newlines of the rows, if any.
        newline: a token that shows nothing follows each row.
    """
    left, top, right, bottom = area
    back = view.inverse()
    wide, tall = (right - left) / max(columns, 1), (bottom - top) / max(rows, 1)
    out: list[Box | None] = []
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * wide, top + row * tall
            box = back((x, y, x + wide, y + tall))
            a, b, c, d = (min(max(value, 0.0), float(most)) for value, most in zip(box, size * 2, strict=True))
            out.append((a, b, c, d) if a < c and b < d else None)  # a cell of padding alone shows nothing
        out += [None] if newline else []
    return out
