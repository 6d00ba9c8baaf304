"""Readers for what people have: WebDataset tar shards, parquet, JSONL, CSV, folders of pictures, hub data sets."""

from __future__ import annotations

import base64
import binascii
import csv
import glob
import http.client
import json
import os
import re
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..config import override
from ..errors import IntermodalError, SampleError, nearest
from ..inputs.image import open_image
from .source import Sample, Source
from .stream import StreamSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "filepath", "file_name", "image_path", "path", "url", "image_url")
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "title", "texts", "label")
URL_TIMEOUT = 20
LONGEST_NAME = 100


class SourceError(IntermodalError):
    """A source that cannot be opened at all."""


def open_source(spec: str, *, side: int = 64, seed: int = 0, allow_urls: bool = False) -> Source | StreamSource:
    """A source from its name on the command line.

    Args:
        spec: `scenes:core`, `scenes:all` (with settings of `SceneConfig` as `?pair_share=0.3&forms=3`), `sprites:core`,
            `sprites:all`, `signs` (printed words, with settings of `SignConfig`), `tuxpaint:<.deb or folder>` (with settings of
            `TuxPaintConfig`),
            `hf:<owner/name>[:split]`, or a path: a folder of pictures, or files ending in .tar, .parquet, .jsonl, .csv, with
            `{000..009}` and `*` expanded. `?image=COLUMN&text=COLUMN` after a table's path or a hub data set names its columns.
        side: pixels of a side for sources that draw their pictures.
        allow_urls: fetch pictures that a table names by http(s) address.

    Raises:
        SourceError: nothing there, or nothing readable.
    """
    from .drawn import SpriteConfig, SpriteSource
    from .scenes import SceneConfig, Scenes
    from .signs import SignConfig, Signs
    from .tuxpaint import TuxPaint, TuxPaintConfig

    kind, _, rest = spec.partition(":")
    if kind in ("scenes", "sprites"):
        rest, _, query = rest.partition("?")
        which = rest or "core"
        if which not in ("core", "all"):
            raise SourceError(f"{spec!r}: {kind} come as {kind}:core or {kind}:all{nearest(which, ('core', 'all'))}")
        settings = [assignment for assignment in query.split("&") if assignment]
        if kind == "sprites":
            return SpriteSource(override(SpriteConfig(side=side, concepts=which), settings))
        return Scenes(override(SceneConfig(side=side, concepts=which, seed=seed), settings))
    name, _, asked = spec.partition("?")
    settings = [assignment for assignment in asked.split("&") if assignment]
    if name == "signs":
        return Signs(override(SignConfig(side=side, seed=seed), settings))
    if name.partition(":")[0] == "tuxpaint":
        return TuxPaint(name.partition(":")[2], override(TuxPaintConfig(), settings))
    if kind == "hf":
        return open_pairs(rest, seed=seed, allow_urls=allow_urls)
    path, _, query = spec.partition("?")
    columns = columns_of(query)
    files = expand(path)
    if len(files) == 1 and files[0].is_dir():
        return FolderSource(files[0])
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1:
        raise SourceError(f"{path}: files of several kinds ({', '.join(sorted(suffixes))}); give one source a kind")
    suffix = suffixes.pop()
    if suffix == ".tar":
        return TarSource(files)
    if suffix == ".parquet":
        return ParquetSource(files, columns, allow_urls)
    if suffix in (".jsonl", ".csv", ".tsv"):
        return LinesSource(files, columns, allow_urls)
    if suffix in (".gz", ".zst", ".xz"):
        raise SourceError(
            f"{files[0]}: a compressed shard has no random access; unpack it to .tar first (pictures do not shrink anyway)"
        )
    raise SourceError(f"{files[0]}: unknown kind {suffix!r}; readable are a folder, .tar, .parquet, .jsonl, .csv, .tsv")


def columns_of(query: str) -> dict[str, str]:
    """`image=COLUMN&text=COLUMN` as a dict. Raises SourceError: another name."""
    columns = dict(parse_qsl(query))
    unknown = next((name for name in columns if name not in ("image", "text")), None)
    if unknown is not None:
        hint = nearest(unknown, ("image", "text"))
        raise SourceError(f"a table has no setting {unknown!r}{hint}; write ?image=COLUMN&text=COLUMN")
    return columns


def expand(pattern: str) -> list[Path]:
    """`a-{000..002}.tar` and `*`, sorted. Raises SourceError when nothing is there."""
    patterns = [pattern]
    while any(re.search(r"\{(\d+)\.\.(\d+)\}", p) for p in patterns):
        grown = []
        for p in patterns:
            found = re.search(r"\{(\d+)\.\.(\d+)\}", p)
            if not found:
                grown.append(p)
                continue
            first, last = found.groups()
            numbers = range(int(first), int(last) + 1)
            grown += [f"{p[: found.start()]}{n:0{len(first)}d}{p[found.end() :]}" for n in numbers]
        patterns = grown
    files: list[Path] = []
    for p in patterns:
        matches = sorted(glob.glob(os.path.expanduser(p))) if any(c in p for c in "*?[") else [os.path.expanduser(p)]
        files += [Path(match) for match in matches]
    missing = [file for file in files if not file.exists()]
    if missing or not files:
        raise SourceError(f"{pattern}: no such file{f' ({missing[0]}, {len(missing)} missing)' if missing else ''}")
    return files


class TarSource:
    """WebDataset shards: members with one stem are a sample, a picture and its `.txt` or `.json` caption.

    The headers are read once; after that any sample is one seek away. A shard that is cut short gives the samples before the cut and
    one problem that names it.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.name = files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"
        self.problems: list[tuple[str, str]] = []
        self.index: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, file in enumerate(self.files):
            self._scan(number, file)
        self._open: dict[tuple[int, int], Any] = {}

    def _scan(self, number: int, file: Path) -> None:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                size = file.stat().st_size
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} reaches past the end of the file")
                    samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix.lower()] = (
                        member.offset_data,
                        member.size,
                    )
                # tarfile ends quietly at a header that is cut; a whole archive ends in a block of zeros
                archive.fileobj.seek(archive.offset)  # pyright: ignore[reportOptionalMemberAccess]
                if archive.fileobj.read(512) != bytes(512):  # pyright: ignore[reportOptionalMemberAccess]
                    raise tarfile.ReadError("it ends without an end mark")
        except (tarfile.TarError, OSError, EOFError) as error:
            self.problems.append((str(file), f"cut short or damaged after {len(samples)} samples: {error}"))
        self.index += [(number, key, parts) for key, parts in samples.items()]

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> Sample:
        number, key, parts = self.index[index]
        picture = next((s for s in parts if f".{s}" in IMAGE_SUFFIXES), None)
        if picture is None:
            raise SampleError(f"{self.files[number].name}/{key}: no picture among its members ({', '.join(parts)})")
        texts: list[str] = []
        if "txt" in parts:
            texts = [self._read(number, *parts["txt"]).decode("utf-8", "replace").strip()]
        elif "json" in parts:
            texts = texts_of(json_object(self._read(number, *parts["json"])), None)
        if not any(texts):
            raise SampleError(f"{self.files[number].name}/{key}: no caption (.txt or .json) beside the picture")
        return Sample(f"{self.files[number].name}/{key}", self._read(number, *parts[picture]), texts)

    def _read(self, number: int, offset: int, size: int) -> bytes:
        handle = self._open.get((os.getpid(), number))
        if handle is None:
            handle = self._open[os.getpid(), number] = self.files[number].open("rb")  # a file position is not shared over a fork
        handle.seek(offset)
        return handle.read(size)


class LinesSource:
    """JSONL, CSV or TSV: one record a line, pictures as paths beside the file, as base64 or data URIs, or as addresses."""

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
                with file.open(encoding="utf-8", errors="replace", newline="") as lines:
                    rows = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                    self.records += [(number, line, row) for line, row in enumerate(rows, 2)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        number, line, record = self.records[index]
        file = self.files[number]
        record = json_object(record) if isinstance(record, str) else record
        image = image_of(record, self.columns.get("image"), file.parent, self.allow_urls)
        return Sample(f"{file.name}:{line}", image, texts_of(record, self.columns.get("text")))


class ParquetSource:
    """Parquet through `datasets`: memory-mapped, so that a global shuffle costs one read a sample."""

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool):
        import datasets

        self.name, self.columns, self.allow_urls, self.folder = files[0].name, columns, allow_urls, files[0].parent
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

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        record = self.table[index]
        image = image_of(record, self.columns.get("image"), self.folder, self.allow_urls)
        return Sample(f"{self.name}:{index}", image, texts_of(record, self.columns.get("text")))


class FolderSource:
    """Pictures under a folder. Captions come from `metadata.jsonl` / `metadata.csv` (Hugging Face's imagefolder: `file_name` and a
    text column), else from a `.txt` beside the picture (a caption a line), else from the name of the folder the picture is in.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.problems: list[tuple[str, str]] = []
        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise SourceError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
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

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        relative = file.relative_to(self.folder)
        beside = file.with_suffix(".txt")
        texts = self.captions.get(relative.as_posix())
        if texts is None and beside.exists():
            texts = [line.strip() for line in beside.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        elif texts is None and file.parent != self.folder:
            texts = [file.parent.name.replace("_", " ").replace("-", " ")]
        if not texts:
            raise SampleError(f"{relative}: no caption (no metadata row, no {beside.name}, not in a named folder)")
        return Sample(f"{self.name}/{relative.as_posix()}", str(file), texts)


def open_pairs(
    rest: str, *, seed: int, allow_urls: bool = False, to_talk: Callable[[str, Sample], Any] | None = None
) -> StreamSource:
    """`owner/name[:split][?image=COLUMN&text=COLUMN]`: pictures with captions, streamed.

    Args:
        to_talk: makes something else of each sample and its key (a conversation).
    """
    name, _, query = rest.partition("?")
    return open_hub(name, seed=seed, to_sample=partial(_pair, columns_of(query), allow_urls, to_talk))


def _pair(columns: dict[str, str], allow_urls: bool, to_talk: Any, key: str, record: dict[str, Any]) -> Any:
    inside = record.get("json")
    if isinstance(inside, dict):  # a tar's .json beside a picture
        record = {**inside, **record}
    image = open_image(image_of(record, columns.get("image"), Path(), allow_urls))
    sample = Sample(key, image, texts_of(record, columns.get("text")))
    return to_talk(key, sample) if to_talk is not None else sample


def open_hub(rest: str, *, seed: int, to_sample: Callable[[str, dict[str, Any]], Any]) -> StreamSource:
    """`owner/name[:split]`, streamed by `datasets`; also a local folder of shards that `datasets` knows how to stream.

    Args:
        to_sample: what a record becomes, from its key and content.
    """
    import datasets

    name, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the hub's client raises many kinds
        raise SourceError(f"cannot stream {name}: {error}") from error
    assert isinstance(stream, datasets.IterableDataset)
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    return StreamSource(name, stream, to_sample, seed=seed)


def json_object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SampleError(f"a JSON {type(value).__name__} where an object was expected")
    return value


def image_of(record: dict[str, Any], column: str | None, folder: Path, allow_urls: bool) -> Any:
    """The picture of a record: bytes, `{"bytes", "path"}`, a path relative to `folder`, base64 of a data URI, or an address."""
    value = record.get(_column(record, column, IMAGE_COLUMNS, "picture"))
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
    return value


def _plain_base64(value: str) -> bytes | None:
    """The bytes of a picture that is written out: longer than a name, and of letters that no name with a suffix is made of."""
    try:
        return base64.b64decode(value, validate=True) if len(value) > LONGEST_NAME else None
    except binascii.Error:
        return None


def texts_of(record: dict[str, Any], column: str | None) -> list[str]:
    """All captions of a record, stripped, empty ones left out."""
    value = record.get(_column(record, column, TEXT_COLUMNS, "caption"))
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, dict) for text in values):
        raise SampleError("the caption is an object and no text; name one of its columns with ?text=COLUMN")
    texts = [str(text).strip() for text in values if text is not None and str(text).strip()]
    if not texts:
        raise SampleError("the caption is empty")
    return texts


def _column(record: dict[str, Any], column: str | None, known: tuple[str, ...], what: str) -> str:
    if column is not None and column in record:
        return column
    found = next((name for name in known if column is None and name in record), None)
    if found is None:
        name = what.replace("picture", "image").replace("caption", "text")
        raise SampleError(f"no {what} column among {', '.join(map(str, record))}; name it with ?{name}=COLUMN")
    return found


def fetch(address: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise SampleError(f"{address}: pictures by address are off; data.allow_urls=true fetches them")
    try:
        with urllib.request.urlopen(address, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: an address that is none, a reply cut short
        raise SampleError(f"{address}: {error}") from error
