"""What a record's picture and captions are, whichever file it is from: a line of a table, a tar's members, a hub data set's row."""

from __future__ import annotations

import base64
import binascii
import http.client
import math
import re
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import SampleError, nearest
from ..inputs.json_lines import parsed
from .source import SourceError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "filepath", "file_name", "image_path", "path", "url", "image_url")
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "title", "texts", "label")
URL_TIMEOUT = 20
LONGEST_NAME = 100
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]+)*", re.IGNORECASE)
NAME_A_COLUMN = "name it with ?text=COLUMN"
NUMBERED = ("label", "labels", "cls")
"""The columns whose integers are numbers of classes."""
TAR_CAPTIONS = f"a caption is a .txt (one a line) or a .json with one of {', '.join(TEXT_COLUMNS)}"
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


def json_object(value: Any) -> dict[str, Any]:
    """An object that is written as JSON. Raises SampleError: it is none. (What `datasets` decodes is a list, a text or a number then.)"""
    value = parsed(value) if isinstance(value, str | bytes) else value
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
        value = text_of(value, "the picture's path")
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
    except ValueError:  # binascii's own, and that of a name with letters that are not of ASCII
        return None


def caption_names(suffixes: Iterable[str]) -> list[str]:
    """Of the endings of a sample's files those that hold its captions: `txt`; where there is none `en.txt`, `de.txt` and so on."""
    known = sorted(suffixes)
    return ["txt"] if "txt" in known else [suffix for suffix in known if suffix.endswith(".txt")]


def member_captions(
    name: str, endings: Sequence[str], read: Callable[[str], Any], classes: Sequence[str] | None, advice: str = TAR_CAPTIONS
) -> list[str]:
    """The captions of a tar's sample, at least one; the same whether the tar is a file or is streamed.

    Args:
        endings: of the sample's members.
        read: the content of the one with an ending, as bytes or as `datasets` decodes it. What gives no caption is not asked for.
        classes: labels by number, of which a `.cls` without a text beside it names one.

    Raises:
        SampleError: there is none, or what holds it cannot be read.
    """
    written = caption_names(endings)
    texts: list[str] = []
    for ending in written:
        with naming(f"{name}.{ending}"):
            texts += lines_of(read(ending))
    if not written and classes is not None and "cls" in endings:
        with naming(name):
            return class_label(read("cls"), classes)
    if not written and "json" in endings:
        with naming(f"{name}.json"):
            inside = read("json")
            return texts_of(inside if isinstance(inside, dict) else json_object(inside), None, advice, classes)
    if not texts:
        number = f"; {CLASS_NUMBER}" if "cls" in endings else ""
        raise SampleError(f"{name}: no caption in its members ({', '.join(f'.{ending}' for ending in endings)}); {advice}{number}")
    return texts


@contextmanager
def naming(name: str):
    """A reject from within begins with a name."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{name}: {error}") from error


def class_label(number: Any, classes: Sequence[str], what: str = ".cls") -> list[str]:
    """The label that a class's number (or its digits, in a `.cls`) stands for, as the only caption. Raises SampleError: for none."""
    try:
        at = int(number)
    except ValueError:
        raise SampleError(f"its {what} is {number!r} and no number") from None
    if not 0 <= at < len(classes) or not classes[at]:
        raise SampleError(f"its {what} is {at}, and line {at} of the {len(classes)} class names (the first is 0) names none")
    return [classes[at]]


def text_of(text: str | bytes, what: str = "its text") -> str:
    """A text, without the mark that some editors begin UTF-8 with. Raises SampleError: `what` is in another encoding."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8-sig")
        text.encode(
            "utf-8"
        )  # tables are read with `surrogateescape`: other bytes than UTF-8's come as characters that it does not have
    except UnicodeDecodeError as error:
        raise SampleError(_not_utf8(what, error.object[error.start])) from None
    except UnicodeEncodeError as error:
        raise SampleError(_not_utf8(what, ord(error.object[error.start]))) from None
    return text.removeprefix("\ufeff")


def _not_utf8(what: str, code: int) -> str:
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    said = f"byte 0x{byte:02x}" if byte <= 0xFF else f"half a character, \\u{byte:04x}"
    return f"{what} is not UTF-8 ({said}); save it as UTF-8, of Latin-1 for example by iconv -f latin1 -t utf-8"


def lines_of(text: str | bytes) -> list[str]:
    """Captions written one a line: stripped, empty ones left out. Raises SampleError: they are not UTF-8."""
    return [line.strip() for line in text_of(text).splitlines() if line.strip()]


def texts_of(
    record: dict[str, Any], column: str | None, advice: str = NAME_A_COLUMN, classes: Sequence[str] | None = None
) -> list[str]:
    """All captions of a record, stripped, empty ones left out: a text, a list of them, or either by language (`{"en": ..., "de": ...}`).

    An integer under one of `NUMBERED` is the number of a class and no caption; in another column that was asked for only with `classes`.

    Args:
        advice: what an error says can be done, where no column was asked for.
        classes: labels by number, of which such an integer names one.

    Raises:
        SampleError: there is none.
    """
    name = _column(record, column, TEXT_COLUMNS, "caption", advice)
    value = record.get(name)
    values: list[Any] = []
    if isinstance(value, dict) and all(LANGUAGE.fullmatch(str(name)) for name in value):
        given = list(value.values())
    else:
        given = [value]
    for one in given:
        values += one if isinstance(one, list | tuple) else [one]
    hint = f"; {advice}" if column is None else ""
    if any(isinstance(text, dict) for text in values):
        raise SampleError(f"the caption is an object and no text{hint}")
    numbered = name in NUMBERED or (column is not None and classes is not None)
    texts = [_caption(one, name, numbered, hint, classes).strip() for one in values if one is not None]
    if not any(texts):
        raise SampleError("the caption is empty")
    return [text for text in texts if text]


def _caption(value: Any, name: str, numbered: bool, hint: str, classes: Sequence[str] | None) -> str:
    """One caption of the column `name` as a text, whose numbers may be of classes. Raises SampleError: it is none."""
    if isinstance(value, str | bytes):
        return text_of(value)
    if isinstance(value, bool) and name in NUMBERED:
        raise SampleError(f"its {name} is {value}, which is no caption{hint}")
    if isinstance(value, float) and math.isnan(value):  # what pandas writes for nothing
        return ""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 3.0: pandas' integers beside nothing
    if numbered and whole and not isinstance(value, bool):
        if classes is None:
            raise SampleError(
                f"its {name} is {int(value)}, the number of a class and no caption{hint}; zero-shot `eval` takes it as a line of "
                f"--classes FILE (the first is 0)"
            )
        return class_label(value, classes, name)[0]
    if isinstance(value, int | float):
        return str(value)
    raise SampleError(f"the caption is of type {type(value).__name__} and no text{hint}")


def _column(record: dict[str, Any], column: str | None, known: tuple[str, ...], what: str, advice: str) -> str:
    if column is not None and column in record:
        return column
    found = next((name for name in known if column is None and name in record), None)
    if found is None:
        raise SampleError(f"no {what} column among {listed(record)}; {advice}")
    return found


def listed(names: Iterable[Any]) -> str:
    """Names of columns for a message, which a terminal must be able to show: what was not UTF-8 in them as `?`."""
    return ", ".join(map(str, names)).encode("utf-8", "replace").decode()


def fetch(address: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise SampleError(f"{address}: pictures by address are off; data.allow_urls=true fetches them")
    try:
        with urllib.request.urlopen(address, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: an address that is none, a reply cut short
        raise SampleError(f"{address}: {error}") from error
