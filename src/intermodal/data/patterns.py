"""Names of shards: braces, `*` and `?` expanded, several joined by `::`, as in a shell, open_clip and webdataset."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from .source import SourceError

NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])(?:\.\.(-?\d+))?")


def joined(names: str) -> list[str]:
    """The parts of several names joined by `::`. Raises SourceError: one of them is empty."""
    parts = names.split("::")
    if not all(parts):
        raise SourceError(f"{names}: one of the names joined by :: is empty")
    return parts


def braces(pattern: str) -> list[str]:
    """What a shell and `braceexpand` make of `{000..009}`, `{0..8..2}`, `{a..c}` and `{x,y}`, also of one within another.

    Braces without a comma or a range stay as they are, as `{print}` in a command.
    """
    for begin, letter in enumerate(pattern):
        end = _closing(pattern, begin) if letter == "{" else None
        choices = _choices(pattern[begin + 1 : end]) if end is not None else None
        if end is not None and choices is not None:
            rest = braces(pattern[end + 1 :])
            return [pattern[:begin] + choice + tail for choice in choices for tail in rest]
    return [pattern]


def _closing(pattern: str, begin: int) -> int | None:
    """Where the brace that opens at `begin` is closed."""
    depth = 0
    for at in range(begin, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 0:
            return at
    return None


def _choices(inside: str) -> list[str] | None:
    """What stands between two braces, one by one; None: neither a list nor a range."""
    if found := NUMBERS.fullmatch(inside):
        first, last, step = found.groups()
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in _range(int(first), int(last), step)]
    if found := LETTERS.fullmatch(inside):
        first, last, step = found.groups()
        return [chr(number) for number in _range(ord(first), ord(last), step)]
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[begin:at])
            begin = at + 1
    return [choice for part in (*parts, inside[begin:]) for choice in braces(part)] if parts else None


def _range(first: int, last: int, step: str | None) -> range:
    by = abs(int(step or 1)) or 1
    return range(first, last + 1, by) if last >= first else range(first, last - 1, -by)


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with braces (`braces`), with `*` and `?` (sorted), and of several such joined by `::` one after the other.

    Raises:
        SourceError: nothing is there, or a file of those named is not.
    """
    whole = os.path.expanduser(pattern)
    if os.path.exists(whole):  # whatever is in its name; and not Path.exists, to which a long list of names is an error
        return [Path(whole)]
    if "::" in pattern:
        return [file for part in joined(pattern) for file in expand(part)]
    files: list[Path] = []
    for one in map(os.path.expanduser, braces(pattern)):
        files += map(Path, sorted(glob.glob(one)) if any(letter in one for letter in "*?[") else [one])
    missing = [file for file in files if not file.exists()]
    if missing or not files:
        hint = "; a table's columns are named by ?image=COLUMN&text=COLUMN" if "?" in pattern else ""
        raise SourceError(f"{pattern}: no such file{f' ({missing[0]}, {len(missing)} missing)' if missing else ''}{hint}")
    return files
