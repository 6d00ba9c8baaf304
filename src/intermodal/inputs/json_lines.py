"""JSON that other people wrote: what Python cannot read of it is one error, and files of one value a line are read line by line."""

from __future__ import annotations

import codecs
import json
from typing import Any

from ..errors import SampleError


def json_lines(data: bytes) -> list[tuple[int, bytes]]:
    """The lines that are not blank, each with its number in the file, from 1. They are bytes, so that one that is no text spoils no other,
    and end at line feeds alone: JSON text may hold whatever else Unicode calls the end of a line."""
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def json_of(text: bytes) -> Any:
    """What a line, or a whole file, of JSON holds.

    Raises:
        SampleError: it is not UTF-8, or not JSON that Python can read.
    """
    try:
        return parsed(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SampleError(
            f"not UTF-8: byte 0x{error.object[error.start]:02x} at its place {error.start}; save the file as UTF-8"
        ) from None


def parsed(text: str | bytes) -> Any:
    """What JSON holds. Raises SampleError: it is none, or none that Python can read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise SampleError("not JSON that can be read: its lists and objects are too deep inside each other") from None
    except ValueError as error:  # also a number of thousands of digits
        raise SampleError(f"not JSON: {error}") from None
