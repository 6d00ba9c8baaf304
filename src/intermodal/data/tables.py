"""Tables: JSONL, CSV, TSV and parquet, a picture and its captions a record."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import SampleError
from .records import image_of, json_object, texts_of
from .source import NamedBytes, Sample, SourceError

LONGEST_FIELD = 1 << 30
"""Characters of a CSV field: a picture in base64 is far past the 131,072 that Python allows."""


class TableSource(ABC):
    """Samples that are records: a subclass says what record a number is."""

    columns: dict[str, str]
    allow_urls: bool

    @abstractmethod
    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        """(name, folder that its paths are relative to, the record or the line of JSON that it is).

        Args:
            words: columns that can hold no caption may be left out.
        """

    def __getitem__(self, index: int) -> Sample:
        key, folder, record = self._record(index)
        with _naming(key):
            record = json_object(record) if isinstance(record, str) else record
            return Sample(key, self._picture(key, folder, record), texts_of(record, self.columns.get("text")))

    def picture_at(self, index: int) -> tuple[str, Any]:
        key, folder, record = self._record(index)
        with _naming(key):
            return key, self._picture(key, folder, json_object(record) if isinstance(record, str) else record)

    def captions_at(self, index: int) -> list[str]:
        key, _, record = self._record(index, words=True)
        with _naming(key):
            return texts_of(json_object(record) if isinstance(record, str) else record, self.columns.get("text"))

    def _picture(self, key: str, folder: Path, record: dict[str, Any]) -> Any:
        image = image_of(record, self.columns.get("image"), folder, self.allow_urls)
        return NamedBytes(image, key) if isinstance(image, bytes) else image


@contextmanager
def _naming(key: str):
    """A reject from within begins with the record's name."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{key}: {error}") from error


class LinesSource(TableSource):
    """JSONL, CSV or TSV: one record a line, pictures as paths beside the file, as base64 or data URIs, or as addresses.

    Raises:
        SourceError: a CSV or TSV that cannot be split into fields.
    """

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool):
        self.files, self.columns, self.allow_urls = list(files), columns, allow_urls
        self.name = files[0].name
        self.problems: list[tuple[str, str]] = []
        self.records: list[tuple[int, int, Any]] = []
        for number, file in enumerate(self.files):
            if file.suffix.lower() == ".jsonl":
                with file.open(encoding="utf-8", errors="replace") as lines:
                    self.records += [(number, line, text) for line, text in enumerate(lines, 1) if text.strip()]
            else:
                csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
                with file.open(encoding="utf-8", errors="replace", newline="") as lines:
                    rows = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                    try:
                        self.records += [(number, line, row) for line, row in enumerate(rows, 2)]
                    except csv.Error as error:
                        raise SourceError(f"{file}:{rows.line_num}: not readable as a table: {error}") from error

    def __len__(self) -> int:
        return len(self.records)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        number, line, record = self.records[index]
        file = self.files[number]
        return f"{file.name}:{line}", file.parent, record


class ParquetSource(TableSource):
    """Parquet through `datasets`: memory-mapped, so that a global shuffle costs one read a sample."""

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool):
        import datasets
        import pyarrow.parquet as pq

        self.files, self.name = list(files), files[0].name
        self.columns, self.allow_urls = columns, allow_urls
        self.problems: list[tuple[str, str]] = []
        try:
            table = datasets.Dataset.from_parquet([str(file) for file in files])
        except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged file
            raise SourceError(f"{files[0]}: not readable as parquet: {error}") from error
        assert isinstance(table, datasets.Dataset)
        for column, feature in list(table.features.items()):
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table
        self.ends = list(accumulate(pq.read_metadata(file).num_rows for file in files))
        """Before which record each file ends: paths are relative to the folder of their own."""
        binary = [name for name, kind in table.features.items() if _holds_bytes(kind)]
        self.words = table.remove_columns(binary)
        """The same without the columns of pictures, which are not read for a caption."""

    def __len__(self) -> int:
        return len(self.table)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        folder = self.files[bisect_right(self.ends, range(len(self))[index])].parent
        return f"{self.name}:{index}", folder, (self.words if words else self.table)[index]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this feature may hold encoded pictures. (A struct of texts by language does not.)"""
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind
    return isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and "binary" in kind.dtype)
