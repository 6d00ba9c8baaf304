"""Folders of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SampleError
from .records import IMAGE_SUFFIXES, lines_of, naming
from .source import Sample, SourceError
from .tables import LinesSource, ParquetSource

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class FolderSource:
    """Pictures under a folder, those aside whose name or folder begins with a dot.

    Captions come from `metadata.jsonl`, `.csv` or `.parquet` in the folder or in any within it (Hugging Face's imagefolder: `file_name`,
    relative to the file itself, and a text column), else from a `.txt` beside the picture (a caption a line), else from its `.en.txt`,
    `.de.txt` and so on, else, where there is no metadata at all, from the name of the folder the picture is in.

    Args:
        classes: labels by number, of which an integer in the metadata's `label` names one.

    Raises:
        SourceError: no pictures are there, or a metadata file is not readable as a table.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None):
        self.folder, self.name = folder, folder.name
        self.problems: list[tuple[str, str]] = []
        # a dot: what macOS writes beside each file as ._NAME, checkpoints of notebooks, caches
        found = [f for f in folder.rglob("*") if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
        self.files = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            shard = next((f for f in found if f.suffix == ".tar"), None)
            hint = f"; for the tar shards in it write {shard.parent}/*.tar" if shard else ""
            raise SourceError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}){hint}")
        self.by_language = self._texts_by_language([f for f in found if f.suffix == ".txt" and "." in f.stem])
        """Names of a picture's captions by language, sorted, by the picture's path without its ending."""
        self.captions: dict[str, list[str]] = {}
        """What metadata says of a picture, by its whole path."""
        self.refused: dict[str, tuple[str, str]] = {}
        """The first record that names a picture and holds no caption, and why."""
        self.metadata = sorted(f for f in found if f.name in METADATA)
        pictures = {os.path.abspath(file) for file in self.files} if self.metadata else set()
        for file in self.metadata:
            self._read_metadata(file, pictures, classes)
        # a picture without any caption is a reject of its own
        self.problems += [self.refused[picture] for picture in self.refused if picture in self.captions]

    def _read_metadata(self, file: Path, pictures: set[str], classes: Sequence[str] | None) -> None:
        """What a metadata file says of pictures; a record of none is a problem."""
        table = (ParquetSource if file.suffix == ".parquet" else LinesSource)([file], {}, False, classes)
        folder = file.parent.relative_to(self.folder)
        for index in range(len(table)):
            key, name, texts = table.described_at(index)
            key = (folder / key).as_posix()
            if name is None:
                self.problems.append((key, f"not a caption record: {texts}"))
                continue
            picture = os.path.abspath(file.parent / name)  # without the ./ and ../ that it may be written with
            if picture not in pictures:
                self.problems.append(
                    (key, f"its picture {name} is {'of no kind that is read' if os.path.exists(picture) else 'not there'}")
                )
            elif isinstance(texts, str):
                self.refused.setdefault(picture, (key, texts))
            else:
                self.captions.setdefault(picture, []).extend(texts)

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
        return Sample(f"{self.name}/{file.relative_to(self.folder).as_posix()}", str(file), self.captions_at(index))

    def picture_at(self, index: int) -> tuple[str, Any]:
        return str(self.files[index]), str(self.files[index])

    def captions_at(self, index: int) -> list[str]:
        file = self.files[index]
        relative = file.relative_to(self.folder)
        path, beside = os.path.abspath(file), file.with_suffix(".txt")
        if path in self.captions:
            return self.captions[path]
        if path in self.refused:
            raise SampleError(f"{relative}: no caption: {': '.join(self.refused[path])}")
        written = [beside.name] if beside.exists() else self.by_language.get(file.with_suffix(""), [])
        texts: list[str] = []
        for name in written:
            with naming(str(relative.with_name(name))):
                texts += lines_of(file.with_name(name).read_bytes())
        named = file.parent != self.folder and not self.metadata  # with metadata a folder's name is that of a split
        if not written and named:
            texts = [file.parent.name.replace("_", " ").replace("-", " ")]
        if not texts:
            where = "no metadata row" if self.metadata else "no metadata, not in a named folder"
            raise SampleError(f"{relative}: no caption (no text in {beside.name}, {where})")
        return texts
