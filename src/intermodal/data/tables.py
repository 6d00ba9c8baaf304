"""Tables: JSONL, CSV, TSV and parquet, a picture and its captions a record."""

from __future__ import annotations

import csv
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from ..errors import SampleError
from .records import IMAGE_COLUMNS, NAME_A_COLUMN, NUMBERED, TEXT_COLUMNS, image_of, json_object, listed, naming, text_of, texts_of
from .source import NamedBytes, Sample, SourceError

LONGEST_FIELD = 1 << 30
"""Characters of a CSV field: a picture in base64 is far past the 131,072 that Python allows."""
SEPARATORS = (",", "\t", ";")
WHOLE = re.compile(r"\s*(-?[0-9]{1,18})(\.0*)?\s*")
"""Digits that may be the number of a class, also as pandas writes integers beside empty fields (3.0)."""


class TableSource(ABC):
    """Samples that are records: a subclass says what record a number is."""

    columns: dict[str, str]
    allow_urls: bool
    classes: Sequence[str] | None
    """Labels by number, of which an integer in place of a caption names one."""

    @abstractmethod
    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        """(name, folder that its paths are relative to, the record or the line of JSON that it is).

        Args:
            words: columns that can hold no caption may be left out.
        """

    def __getitem__(self, index: int) -> Sample:
        key, folder, record = self._record(index)
        with naming(key):
            record = _as_object(record)
            return Sample(key, self._picture(key, folder, record), self._captions(record))

    def picture_at(self, index: int) -> tuple[str, Any]:
        key, folder, record = self._record(index)
        with naming(key):
            return key, self._picture(key, folder, _as_object(record))

    def captions_at(self, index: int) -> list[str]:
        key, _, record = self._record(index, words=True)
        with naming(key):
            return self._captions(_as_object(record))

    def described_at(self, index: int) -> tuple[str, str | None, list[str] | str]:
        """Of a table that lies beside pictures: (the record's name, its `file_name` or None, its captions or why it has none)."""
        key, _, record = self._record(index, words=True)
        file = None
        try:
            record = _as_object(record)
            value = record.get("file_name")
            file = text_of(value, "its file_name") if isinstance(value, str) and value else None
            if file is None:
                raise SampleError(f"no file_name among {listed(record)}: the picture's path, relative to this file")
            return key, file, self._captions(record, f"beside pictures it is one of {', '.join(TEXT_COLUMNS)}")
        except SampleError as error:
            return key, file, str(error)

    def _captions(self, record: dict[str, Any], advice: str = NAME_A_COLUMN) -> list[str]:
        return texts_of(record, self.columns.get("text"), advice, self.classes)

    def _picture(self, key: str, folder: Path, record: dict[str, Any]) -> Any:
        image = image_of(record, self.columns.get("image"), folder, self.allow_urls)
        return NamedBytes(image, key) if isinstance(image, bytes) else image


def _as_object(record: str | dict[str, Any]) -> dict[str, Any]:
    return json_object(record) if isinstance(record, str) else record


class LinesSource(TableSource):
    """JSONL, CSV or TSV: one record a line, pictures as paths beside the file, as base64 or data URIs, or as addresses.

    A .csv is separated by what its header is separated by: comma, tab (open_clip's default) or semicolon.

    Raises:
        SourceError: a CSV or TSV that cannot be split into fields.
    """

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool, classes: Sequence[str] | None = None):
        self.files, self.columns, self.allow_urls, self.classes = list(files), columns, allow_urls, classes
        self.name = files[0].name
        self.problems: list[tuple[str, str]] = []
        self.records: list[tuple[int, int, Any]] = []
        for number, file in enumerate(self.files):
            # bytes that are not UTF-8 are kept as what `text_of` refuses, so that only records whose caption has some are rejects
            with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
                if file.suffix.lower() == ".jsonl":
                    self.records += [(number, line, text) for line, text in enumerate(lines, 1) if text.strip()]
                else:
                    self.records += [(number, line, row) for line, row in enumerate(self._rows(file, lines), 2)]

    def _rows(self, file: Path, lines: TextIO) -> Iterator[dict[str, Any]]:
        """The records of a CSV or TSV. Raises SourceError."""
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
        rows = None
        try:
            rows = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else self._separator(lines))
            for row in rows:
                yield self._with_numbers(row)
        except csv.Error as error:
            raise SourceError(f"{file}:{rows.line_num if rows else 1}: not readable as a table: {error}") from error

    def _with_numbers(self, row: dict[str, Any]) -> dict[str, Any]:
        """Text and numbers look alike in a CSV: digits where a class's number may be are one, as an integer is in other tables."""
        asked = [self.columns["text"]] if self.classes is not None and "text" in self.columns else []
        for name in (*NUMBERED, *asked):
            found = WHOLE.fullmatch(value) if isinstance(value := row.get(name), str) else None
            if found is not None:
                row[name] = int(found[1])
        return row

    def _separator(self, lines: TextIO) -> str:
        """That by which the header holds most of the names that are asked for or known, then most names at all."""
        known = {*IMAGE_COLUMNS, *TEXT_COLUMNS, *self.columns.values()}

        def held(separator: str) -> tuple[int, int]:
            lines.seek(0)
            names = next(csv.reader(lines, delimiter=separator), [])
            return len(known.intersection(names)), len(names)

        separator = max(SEPARATORS, key=held)
        lines.seek(0)
        return separator

    def __len__(self) -> int:
        return len(self.records)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        number, line, record = self.records[index]
        file = self.files[number]
        return f"{file.name}:{line}", file.parent, record


class ParquetLines(LinesSource):
    """A small parquet, read whole: the metadata of a folder. Only what may be of use there is: not what else such a file may hold.

    Raises:
        SourceError: it is not readable as parquet.
    """

    def __init__(self, file: Path, classes: Sequence[str] | None = None):
        import pyarrow.parquet as pq

        self.files, self.columns, self.allow_urls, self.classes = [file], {}, False, classes
        self.name = file.name
        self.problems = []
        try:
            with pq.ParquetFile(file) as table:
                schema, names = table.schema_arrow, table.schema_arrow.names
                named: dict[str, list[str]] = {}
                if b"huggingface" in (schema.metadata or {}):  # where `datasets` keeps names of classes
                    import datasets

                    named = class_names(datasets.Features.from_arrow_schema(schema))
                batches = table.iter_batches(columns=[name for name in ("file_name", *TEXT_COLUMNS) if name in names])
                rows = [row for batch in batches for row in batch.to_pylist()]
        except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged file
            raise SourceError(f"{file}: not readable as parquet: {error}") from error
        # an error names all columns, those too that were not read
        self.records = [(0, at, with_names({**dict.fromkeys(names), **row}, named)) for at, row in enumerate(rows)]


class ParquetSource(TableSource):
    """Parquet through `datasets`: memory-mapped, so that a global shuffle costs one read a sample."""

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool, classes: Sequence[str] | None = None):
        import datasets
        import pyarrow.parquet as pq

        self.files, self.name = list(files), files[0].name
        self.columns, self.allow_urls, self.classes = columns, allow_urls, classes
        self.problems: list[tuple[str, str]] = []
        try:
            rows = [pq.read_metadata(file).num_rows for file in files]
            if not any(rows):
                raise SourceError(f"{files[0]}: it holds no records")
            # of a file without rows `datasets` says that it cannot be read
            table = datasets.Dataset.from_parquet([str(file) for file, count in zip(files, rows, strict=True) if count])
        except SourceError:
            raise
        except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged file
            raise SourceError(f"{files[0]}: not readable as parquet: {error}") from error
        assert isinstance(table, datasets.Dataset)
        for column, feature in list(table.features.items()):
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        self.table, self.named = table, class_names(table.features)
        self.ends = list(accumulate(rows))
        """Before which record each file ends: paths are relative to the folder of their own."""
        captions = {*TEXT_COLUMNS, columns.get("text")}
        binary = [name for name, kind in table.features.items() if _holds_bytes(kind) and name not in captions]
        self.words = table.remove_columns(binary)
        """The same without the columns of pictures, which are not read for a caption."""

    def __len__(self) -> int:
        return len(self.table)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        folder = self.files[bisect_right(self.ends, range(len(self))[index])].parent
        part = self.words if words else self.table
        record = part[index] if part.column_names else {}  # a table that has no column left has no rows either
        # an error names all columns, those too that were not read
        return f"{self.name}:{index}", folder, with_names({**dict.fromkeys(self.table.column_names), **record}, self.named)


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this feature may hold encoded pictures. (A struct of texts by language does not.)"""
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind
    return isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and "binary" in kind.dtype)


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of classes that a table keeps beside their numbers (`datasets`' ClassLabel), by column."""
    import datasets

    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}  # of a list of classes its element's
    return {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel) and kind.names}


def with_names(record: dict[str, Any], named: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A record with classes by name. One without a class, which `datasets` writes as -1, has None."""

    def name(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [name(one, names) for one in value]
        if isinstance(value, str):
            return value
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None

    return {**record, **{column: name(record[column], names) for column, names in named.items() if column in record}}
