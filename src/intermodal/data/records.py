"""What a record's picture and captions are, whichever file it is from: a line of a table, a tar's members, a hub data set's row."""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import re
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import SampleError, nearest
from .source import SourceError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "filepath", "file_name", "image_path", "path", "url", "image_url")
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "title", "texts", "label")
URL_TIMEOUT = 20
LONGEST_NAME = 100
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]+)*", re.IGNORECASE)
NAME_A_COLUMN = "name it with ?text=COLUMN"
CLASS_NUMBER = (
    "a .cls is the number of a class and no caption: write the class's name, or a caption, into a .txt beside each picture; "
    "zero-shot `eval` takes it as a line of --classes FILE (the first is 0)"
)


def columns_of(query: str) -> dict[str, str]:
    """`image=COLUMN&text=COLUMN` as a dict. Raises SourceError: another name."""
    columns = dict(parse_qsl(query))
    unknown = next((name for name in columns if name not in ("image", "text")), None)
    if unknown is not None:
        hint = nearest(unknown, ("image", "text"))
        raise SourceError(f"a table has no setting {unknown!r}{hint}; write ?image=COLUMN&text=COLUMN")
    return columns


def json_object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SampleError(f"a JSON {type(value).__name__} where an object was expected")
    return value


def image_of(record: dict[str, Any], column: str | None, folder: Path, allow_urls: bool) -> Any:
    """The picture of a record: bytes, `{"bytes", "path"}`, a path relative to `folder`, base64 of a data URI, or an address.

    Raises:
        SampleError: there is none, it is of a type that no picture is of, or its address cannot be fetched.
    """
    value = record.get(_column(record, column, IMAGE_COLUMNS, "picture", "name it with ?image=COLUMN"))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            return fetch(value, allow_urls)
        if value.startswith("data:"):
            try:
                return base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise SampleError(f"a data URI that is not base64: {error}") from error
        return _plain_base64(value) or str(folder / value)
    if value is None:
        raise SampleError("the picture is empty")
    if not isinstance(value, bytes | Image.Image | np.ndarray):
        kind = type(value).__name__
        raise SampleError(f"the picture is {str(value)[:40]}, of type {kind}, and not bytes, base64, a path or an address")
    return value


def _plain_base64(value: str) -> bytes | None:
    """The bytes of a picture that is written out: longer than a name, and of letters that no name with a suffix is made of."""
    try:
        return base64.b64decode(value, validate=True) if len(value) > LONGEST_NAME else None
    except binascii.Error:
        return None


def caption_names(suffixes: Iterable[str]) -> list[str]:
    """Of the endings of a sample's files those that hold its captions: `txt`; where there is none `en.txt`, `de.txt` and so on."""
    known = sorted(suffixes)
    return ["txt"] if "txt" in known else [suffix for suffix in known if suffix.endswith(".txt")]


def class_label(number: Any, classes: Sequence[str]) -> list[str]:
    """The label that a `.cls` (a number, or its digits) stands for, as the only caption. Raises SampleError: it stands for none."""
    try:
        at = int(number)
    except ValueError:
        raise SampleError(f"its .cls is {number!r} and no number") from None
    if not 0 <= at < len(classes) or not classes[at]:
        raise SampleError(f"its .cls is {at}, and line {at} of the {len(classes)} class names (the first is 0) names none")
    return [classes[at]]


def lines_of(text: str) -> list[str]:
    """Captions written one a line: stripped, empty ones left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def texts_of(record: dict[str, Any], column: str | None, advice: str = NAME_A_COLUMN) -> list[str]:
    """All captions of a record, stripped, empty ones left out: a text, a list of them, or either by language (`{"en": ..., "de": ...}`).

    Args:
        advice: what an error says can be done.

    Raises:
        SampleError: there is none.
    """
    value = record.get(_column(record, column, TEXT_COLUMNS, "caption", advice))
    values: list[Any] = []
    if isinstance(value, dict) and all(LANGUAGE.fullmatch(str(name)) for name in value):
        given = list(value.values())
    else:
        given = [value]
    for one in given:
        values += one if isinstance(one, list | tuple) else [one]
    if any(isinstance(text, dict) for text in values):
        raise SampleError(f"the caption is an object and no text; {advice}")
    texts = [str(text).strip() for text in values if text is not None and str(text).strip()]
    if not texts:
        raise SampleError("the caption is empty")
    return texts


def _column(record: dict[str, Any], column: str | None, known: tuple[str, ...], what: str, advice: str) -> str:
    if column is not None and column in record:
        return column
    found = next((name for name in known if column is None and name in record), None)
    if found is None:
        raise SampleError(f"no {what} column among {', '.join(map(str, record))}; {advice}")
    return found


def fetch(address: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise SampleError(f"{address}: pictures by address are off; data.allow_urls=true fetches them")
    try:
        with urllib.request.urlopen(address, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: an address that is none, a reply cut short
        raise SampleError(f"{address}: {error}") from error
