"""Folders of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SampleError
from .records import IMAGE_SUFFIXES, json_object, lines_of, texts_of
from .source import Sample, SourceError
from .tables import LinesSource


class FolderSource:
    """Pictures under a folder. Captions come from `metadata.jsonl` / `metadata.csv` (Hugging Face's imagefolder: `file_name` and a
    text column), else from a `.txt` beside the picture (a caption a line), else from its `.en.txt`, `.de.txt` and so on, else from the
    name of the folder the picture is in.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.problems: list[tuple[str, str]] = []
        found = list(folder.rglob("*"))
        self.files = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            shard = next((f for f in found if f.suffix == ".tar"), None)
            hint = f"; for the tar shards in it write {shard.parent}/*.tar" if shard else ""
            raise SourceError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}){hint}")
        self.by_language = self._texts_by_language([f for f in found if f.suffix == ".txt" and "." in f.stem])
        """Names of a picture's captions by language, sorted, by the picture's path without its ending."""
        self.captions: dict[str, list[str]] = {}
        for table in (folder / "metadata.jsonl", folder / "metadata.csv"):
            if table.exists():
                lines = LinesSource([table], {}, False)
                for index, (_, line, record) in enumerate(lines.records):
                    try:
                        row = json_object(record) if isinstance(record, str) else lines.records[index][2]
                        self.captions.setdefault(str(row["file_name"]), []).extend(texts_of(row, None))
                    except (SampleError, KeyError) as error:
                        self.problems.append((f"{table.name}:{line}", f"not a caption record: {error}"))

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
        beside = file.with_suffix(".txt")
        texts = self.captions.get(relative.as_posix())
        written = [beside.name] if beside.exists() else self.by_language.get(file.with_suffix(""), [])
        if texts is None and written:
            read = (file.with_name(name).read_text(encoding="utf-8", errors="replace") for name in written)
            texts = [line for text in read for line in lines_of(text)]
        elif texts is None and file.parent != self.folder:
            texts = [file.parent.name.replace("_", " ").replace("-", " ")]
        if not texts:
            raise SampleError(f"{relative}: no caption (no metadata row, no {beside.name}, not in a named folder)")
        return texts
