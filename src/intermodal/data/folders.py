"""Folders of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SampleError
from .records import IMAGE_SUFFIXES, lines_of, naming
from .source import Sample, SourceError
from .tables import LinesSource, ParquetLines

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class FolderSource:
    """Pictures under a folder, those aside whose name or folder begins with a dot.

    Captions come from `metadata.jsonl`, `.csv` or `.parquet` in the folder or in any within it (Hugging Face's imagefolder: `file_name`,
    relative to the file itself, and a text column), else from a `.txt` beside the picture (a caption a line), else from its `.en.txt`,
    `.de.txt` and so on, else from the name of the folder the picture is in, where no metadata of that folder or of one above it name any
    picture.

    Args:
        classes: labels by number, of which an integer in the metadata's `label` names one.

    Raises:
        SourceError: no pictures are there, or a metadata file is not readable as a table.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None):
        self.folder, self.name = folder, folder.name
        self._root = os.path.join(os.path.abspath(folder), "")
        self._above = 0 if folder == Path() else len(os.path.join(folder, ""))  # what is found in the folder . has no ./ before it
        self.problems: list[tuple[str, str]] = []
        # a dot: what macOS writes beside each file as ._NAME, checkpoints of notebooks, caches
        found = [f for f in folder.rglob("*") if f"{os.sep}." not in os.sep + str(f)[self._above :]]
        self.files = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            shard = next((f for f in found if f.suffix == ".tar"), None)
            hint = f"; for the tar shards in it write {shard.parent}/*.tar" if shard else ""
            raise SourceError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}){hint}")
        self.by_language = self._texts_by_language([f for f in found if f.suffix == ".txt" and "." in f.stem])
        """Names of a picture's captions by language, sorted, by the picture's path without its ending."""
        self.captions: dict[str, list[str]] = {}
        """What metadata say of a picture, by its whole path."""
        self.refused: dict[str, tuple[str, str]] = {}
        """The first record that names a picture and holds no caption, and why."""
        self.described: set[Path] = set()
        """Folders with metadata that name at least one picture: in and under them a folder's name is that of a split."""
        metadata = sorted(f for f in found if f.name in METADATA)
        pictures = {self._absolute(file) for file in self.files} if metadata else set()
        for file in metadata:
            self._read_metadata(file, pictures, classes)
        # a picture without any caption is a reject of its own
        self.problems += [self.refused[picture] for picture in self.refused if picture in self.captions]

    def _within(self, file: Path) -> str:
        """A file's path below the folder; `relative_to` takes twenty times as long, which tens of thousands of pictures show."""
        return str(file)[self._above :].replace(os.sep, "/")

    def _absolute(self, file: Path) -> str:
        return self._root + str(file)[self._above :]

    def _read_metadata(self, file: Path, pictures: set[str], classes: Sequence[str] | None) -> None:
        """What a metadata file says of pictures. All its records of pictures that are not here are one problem, and so are all its
        records where none says of which picture it is."""
        table = ParquetLines(file, classes) if file.suffix == ".parquet" else LinesSource([file], {}, False, classes)
        name, above = self._within(file), os.path.dirname(self._absolute(file))
        unnamed: list[tuple[str, str]] = []
        absent, first = 0, ""
        for index in range(len(table)):
            key, written, texts = table.described_at(index)
            key = name.removesuffix(file.name) + key
            if written is None:
                unnamed.append((key, f"not a caption record: {texts}"))
                continue
            picture = os.path.normpath(os.path.join(above, written))  # without the ./ and ../ that it may be written with
            if picture not in pictures:
                if not absent:
                    why = "of no kind that is read" if os.path.exists(picture) else "not there"
                    first = f"{key} names {written}, which is {why}"
                absent += 1
                continue
            if isinstance(texts, str):
                self.refused.setdefault(picture, (key, texts))
            else:
                self.captions.setdefault(picture, []).extend(texts)
        if absent + len(unnamed) < len(table):
            self.described.add(file.parent)
        if absent:
            self.problems.append((name, f"{absent:,} of its {len(table):,} records name no picture here; the first: {first}"))
        if len(unnamed) == len(table) > 1:
            which = f"none of its {len(table):,} records says which picture it is of; the first: {': '.join(unnamed[0])}"
            unnamed = [(name, which)]
        self.problems += unnamed

    def _texts_by_language(self, texts: list[Path]) -> dict[Path, list[str]]:
        """`1.en.txt` is of `1.png`, but `1.v2.txt` and `1.v2.en.txt` are of `1.v2.png` where there is one."""
        pictures = {file.with_suffix("") for file in self.files} if texts else set()
        found: dict[Path, list[str]] = {}
        for text in sorted(texts):
            stem = text.with_suffix("")
            while stem not in pictures and stem.suffix:
                stem = stem.with_suffix("")
            if stem in pictures and stem != text.with_suffix(""):
                found.setdefault(stem, []).append(text.name)
        return found

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        return Sample(f"{self.name}/{self._within(file)}", str(file), self.captions_at(index))

    def picture_at(self, index: int) -> tuple[str, Any]:
        return str(self.files[index]), str(self.files[index])

    def captions_at(self, index: int) -> list[str]:
        file = self.files[index]
        path, beside = self._absolute(file), file.with_suffix(".txt")
        if path in self.captions:
            return self.captions[path]
        within = self._within(file)
        if path in self.refused:
            raise SampleError(f"{within}: no caption: {': '.join(self.refused[path])}")
        written = [beside.name] if beside.exists() else self.by_language.get(file.with_suffix(""), [])
        texts: list[str] = []
        for name in written:
            with naming(within.removesuffix(file.name) + name):
                texts += lines_of(file.with_name(name).read_bytes())
        described = not self.described.isdisjoint(file.parents)
        if not written and not described and file.parent != self.folder:
            texts = [file.parent.name.replace("_", " ").replace("-", " ")]
        if not texts:
            where = "no metadata row" if described else "no metadata that name pictures, not in a named folder"
            raise SampleError(f"{within}: no caption (no text in {beside.name}, {where})")
        return texts
